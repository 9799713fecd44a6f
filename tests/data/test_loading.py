"""Batches off the main thread."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cairn.data.loading import Loader, encoded
from cairn.errors import DataError


class Counted:
    """Items whose value is their index; counts how often each was opened."""

    def __init__(self, number, bad=None):
        self.labels = np.arange(number) % 3
        self.opened, self.bad = [], bad

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index == self.bad:
            raise DataError(f"item {index} is damaged")
        self.opened.append(index)
        return np.full(4, index, dtype=np.float32)

    def describe(self, index):
        return str(index)


def loader(images, **options):
    return Loader(images, torch.from_numpy, lambda x: x, **options)


def test_in_order_with_a_smaller_last_batch():
    images = Counted(10)
    batches = list(loader(images, batch=4))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.cat([x for x, _ in batches])[:, 0].tolist() == list(range(10))
    assert torch.cat([y for _, y in batches]).tolist() == images.labels.tolist()


def test_an_epoch_is_a_permutation_drawn_from_its_generator():
    source = loader(Counted(50), batch=8)

    def order(seed):
        return torch.cat([x for x, _ in source.epoch(torch.Generator().manual_seed(seed))])[:, 0].tolist()

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(50))
    x, y = next(source.epoch(torch.Generator().manual_seed(0)))
    assert y.tolist() == [int(v) % 3 for v in x[:, 0]]


@pytest.mark.parametrize(("room", "opened"), [(1 << 20, 10), (5 * 16, 15), (0, 20)])
def test_what_fits_is_opened_once(room, opened):
    images = Counted(10)
    source = loader(images, batch=4, cache_bytes=room)
    first, second = (encoded(source, lambda x: x)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(images.opened) == opened


def test_an_image_that_cannot_be_opened_is_named():
    with pytest.raises(DataError, match="item 7 is damaged"):
        list(loader(Counted(10, bad=7), batch=4))


def test_stopping_early_leaves_nothing_running():
    batches = iter(loader(Counted(100), batch=4))
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)

"""Batches off the main thread."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from cairn.data import loading
from cairn.data.loading import Loader
from cairn.errors import DataError

ITEM = 16
"""Bytes of an item of `Counted`."""


class Counted:
    """Items whose value is their index; counts how often each was opened."""

    def __init__(self, number, bad=(), seconds=0.0):
        self.labels = np.arange(number) % 3
        self.opened, self.bad, self.seconds = [], bad, seconds

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        if index in self.bad:
            raise DataError(f"item {index} is damaged")
        self.opened.append(index)
        return np.full(4, index, dtype=np.float32)

    def describe(self, index):
        return str(index)


class Made:
    """Items of any shape and type, different from one another."""

    def __init__(self, number, shape, dtype):
        rng = np.random.default_rng(0)
        self.labels = np.arange(number)
        self.values = torch.from_numpy(rng.integers(0, 256, (number, *shape))).to(dtype)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.values[index]


def loader(images, **options):
    return Loader(images, torch.from_numpy, lambda x: x, **options)


def plain_epoch(images, batch, order, kept):
    """The plain form: every item by itself, from a dictionary if it was opened before."""
    for rows in order.split(batch):
        for i in rows.tolist():
            if i not in kept:
                kept[i] = images[i]
        yield torch.stack([kept[i] for i in rows.tolist()]), torch.from_numpy(images.labels)[rows]


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


@pytest.mark.parametrize("workers", [1, 2, 5, None])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 6, 6), torch.uint8), ((7,), torch.float32), ((2,), torch.int64), ((), torch.float32)]
)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_batches_are_those_of_the_plain_form_to_the_bit(shape, dtype, workers, share):
    images, kept = Made(23, shape, dtype), {}
    room = int(share * images.values.nbytes)
    source = Loader(images, lambda item: item, lambda x: x, batch=5, workers=workers, cache_bytes=room)
    for seed in range(3):
        order = torch.randperm(23, generator=torch.Generator().manual_seed(seed))
        ours = list(source.epoch(torch.Generator().manual_seed(seed)))
        for (x, y), (expected, labels) in zip(ours, plain_epoch(images, 5, order, kept), strict=True):
            assert x.dtype == expected.dtype
            assert x.is_contiguous()
            assert torch.equal(x, expected)
            assert torch.equal(y, labels)


def test_nothing_gives_no_batch():
    assert list(loader(Counted(0))) == []


def test_skipped_batches_are_not_opened():
    images = Counted(10)
    ((x, _),) = loader(images, batch=4).ordered(skip=2)
    assert x[:, 0].tolist() == [8, 9] == sorted(images.opened)
    source = loader(Counted(50), batch=8)
    epochs = [torch.cat([x for x, _ in source.epoch(torch.Generator().manual_seed(0), skip)]) for skip in (0, 3)]
    assert torch.equal(epochs[0][24:], epochs[1])


def test_a_batch_is_the_readers_own():
    source = loader(Counted(6), batch=6)
    next(iter(source))[0].zero_()
    assert next(iter(source))[0][:, 0].tolist() == list(range(6))


@pytest.mark.parametrize(("room", "opened"), [(1 << 20, 10), (5 * ITEM, 15), (5 * ITEM - 1, 16), (0, 20)])
@pytest.mark.parametrize("workers", [1, 4])
def test_what_fits_is_opened_once(room, opened, workers):
    images = Counted(10)
    source = loader(images, batch=4, cache_bytes=room, workers=workers)
    first, second = (torch.cat([x for x, _ in source]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(images.opened) == opened


def test_nothing_is_opened_before_it_is_asked_for():
    images = Counted(100)
    source = loader(images, batch=4)
    batches = source.epoch(torch.Generator().manual_seed(0))
    assert not images.opened
    next(batches)
    batches.close()
    assert 4 <= len(images.opened) <= 4 * loading.AHEAD


def test_an_epoch_after_a_broken_off_one_opens_what_is_missing():
    images = Counted(40)
    source = loader(images, batch=4, workers=3)
    batches = iter(source)
    next(batches)
    batches.close()
    assert torch.cat([x for x, _ in source])[:, 0].tolist() == list(range(40))
    assert sorted(images.opened) == list(range(40))


def test_two_readers_at_once_see_the_same():
    source = loader(Counted(30), batch=4, workers=3)
    for (a, _), (b, _) in zip(source, source, strict=True):
        assert torch.equal(a, b)


def test_the_items_of_one_batch_are_opened_by_all_workers():
    together = threading.Barrier(4, timeout=10)

    class Meeting(Counted):
        def __getitem__(self, index):
            together.wait()  # breaks unless four are there at the same time
            return super().__getitem__(index)

    ((x, _),) = loader(Meeting(8), batch=8, workers=4)
    assert x[:, 0].tolist() == list(range(8))


def test_waiting_is_counted():
    slow = loader(Counted(8, seconds=0.02), batch=4, workers=1)
    assert slow.waited == 0
    list(slow)
    first = slow.waited
    assert first > 0.1
    list(slow)
    assert slow.waited - first < first


def test_what_is_ready_is_not_waited_for():
    source = loader(Counted(12, seconds=0.02), batch=4, workers=1)
    for _ in source:
        time.sleep(0.2)
    assert source.waited < 12 * 0.02


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_cannot_be_opened_is_named(workers):
    before = threading.active_count()
    with pytest.raises(DataError, match=r"^item 7 is damaged$"):
        list(loader(Counted(100, bad=(7, 12, 50)), batch=10, workers=workers))
    assert threading.active_count() == before


def test_of_several_damaged_images_the_first_is_named():
    for _ in range(5):
        with pytest.raises(DataError, match="item 3 "):
            list(loader(Counted(32, bad=(3, 14, 15, 30)), batch=32, workers=4))


def test_an_error_leaves_the_batches_behind_unopened():
    images = Counted(1000, bad=(0,), seconds=0.005)
    with pytest.raises(DataError):
        list(loader(images, batch=100, workers=2))
    assert len(images.opened) < 200


def test_a_batch_of_unequal_items_is_an_error():
    class Unequal(Counted):
        def __getitem__(self, index):
            return np.zeros(4 + (index == 5), dtype=np.float32)

    for room in (0, 1 << 20):
        with pytest.raises(ValueError, match="shape"):
            list(loader(Unequal(10), batch=4, cache_bytes=room))


def test_stopping_early_leaves_nothing_running():
    before = threading.active_count()
    batches = iter(loader(Counted(100), batch=4))
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    assert threading.active_count() == before


def test_workers_and_room_follow_the_machine(monkeypatch):
    assert 1 <= loader(Counted(1)).workers <= loading.MOST_WORKERS
    assert loading.available_bytes() > 0
    for cores, workers in ((1, 1), (6, 6), (64, 8)):
        monkeypatch.setattr(loading, "usable_cores", lambda cores=cores: cores)
        assert loader(Counted(1)).workers == workers
    assert loader(Counted(1), workers=12).workers == 12
    for available, room in ((100 << 20, 256 << 20), (4 << 30, 1 << 30), (256 << 30, 8 << 30)):
        monkeypatch.setattr(loading, "available_bytes", lambda available=available: available)
        assert loading.room_for_images() == room


def test_room_is_asked_for_when_the_first_item_is_there(monkeypatch):
    images = Counted(10)
    source = loader(images, batch=4)
    monkeypatch.setattr(loading, "room_for_images", lambda: 5 * ITEM)
    list(source), list(source)
    assert len(images.opened) == 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("room", [0, 5 * ITEM, 1 << 20])
def test_batches_for_an_accelerator_are_page_locked_and_the_same(room):
    torch.cuda.init()
    source = Loader(
        Counted(10),
        torch.from_numpy,
        lambda x: (x.is_pinned(), x.to("cuda", non_blocking=True)),
        batch=4,
        cache_bytes=room,
    )
    for _ in range(2):
        batches = [x for x, _ in source]
        assert all(pinned for pinned, _ in batches)
        assert torch.cat([x for _, x in batches])[:, 0].tolist() == list(range(10))

"""Batches of real rows and draws."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.replay import ReplayBatches


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def world():
    """Forty real rows of classes 4 and 5; a memory of classes 0 to 3."""
    d = 6
    centres = 5 * torch.eye(d)
    mixing = torch.randn(d, d, generator=rng(1)) * 0.3
    old_labels = torch.arange(4).repeat_interleave(50)
    old = unit(centres[old_labels] + torch.randn(200, d, generator=rng(2)) @ mixing.T)
    labels = torch.arange(4, 6).repeat_interleave(20)
    real = unit(centres[labels] + torch.randn(40, d, generator=rng(3)) @ mixing.T)
    return real, labels, GaussianMemory(d).add(old, old_labels)


def test_each_real_row_once_per_epoch_and_half_of_each_batch(world):
    real, labels, memory = world
    batches = ReplayBatches(real, labels, memory, batch=16, real_share=0.5)
    assert len(batches) == 5
    seen = []
    for x, y in batches.epoch(rng()):
        assert len(x) == 16
        assert (y >= 4).sum() == 8
        seen.append(x[y >= 4])
    assert sorted(torch.cat(seen).tolist()) == sorted(real.tolist())


def test_drawn_rows_are_balanced_unit_and_of_their_class(world):
    real, labels, memory = world
    drawn = [
        (x[y < 4], y[y < 4]) for x, y in ReplayBatches(real, labels, memory, batch=16, real_share=0.5).epoch(rng())
    ]
    x, y = torch.cat([a for a, _ in drawn]), torch.cat([b for _, b in drawn])
    counts = torch.bincount(y, minlength=4)
    assert counts.max() - counts.min() <= 2
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(len(x)))
    nearest = (x @ unit(memory.means.float()).T).argmax(1)
    assert (nearest == y).float().mean() > 0.95


def test_null_gives_each_class_the_same_share(world):
    real, labels, memory = world
    batches = ReplayBatches(real, labels, memory, batch=12, real_share=None)
    for _, y in list(batches.epoch(rng()))[:-1]:
        assert (y >= 4).sum() == 4  # two of six classes are real


def test_a_share_of_zero_is_all_drawn(world):
    real, labels, memory = world
    batches = ReplayBatches(real, labels, memory, batch=8, real_share=0.0)
    ys = [y for _, y in batches.epoch(rng())]
    assert len(ys) == 5
    assert all(len(y) == 8 and y.max() < 4 for y in ys)


@pytest.mark.parametrize(
    ("batch", "share", "real_rows", "drawn_rows"),
    [
        (1, 0.5, 1, 1),
        (1, None, 1, 1),
        (2, 0.99, 1, 1),
        (16, 0.99, 15, 1),
        (16, 0.01, 1, 15),
        (16, 1.0, 16, 0),
        (1, 0.0, 0, 1),
    ],
)
def test_a_batch_of_both_kinds_has_at_least_one_row_of_each(world, batch, share, real_rows, drawn_rows):
    real, labels, memory = world
    _, y = next(ReplayBatches(real, labels, memory, batch=batch, real_share=share).epoch(rng()))
    assert ((y >= 4).sum(), (y < 4).sum()) == (real_rows, drawn_rows)


def test_one_old_class_among_many_new_ones_is_replayed(world):
    """Its even share of a batch, 4 / 41, is less than half a row."""
    real, _, memory = world
    only = memory.without(3).without(2).without(1)
    _, y = next(ReplayBatches(real, 1 + torch.arange(40), only, batch=4, real_share=None).epoch(rng()))
    assert (y == 0).sum() == 1


def test_without_a_memory_all_is_real(world):
    real, labels, _ = world
    batches = ReplayBatches(real, labels, GaussianMemory(6), batch=16, real_share=0.5)
    ys = [y for _, y in batches.epoch(rng())]
    assert [len(y) for y in ys] == [16, 16, 8]


def test_epochs_differ_and_repeat_by_their_generator(world):
    real, labels, memory = world
    batches = ReplayBatches(real, labels, memory, batch=16, real_share=0.5)
    first, again, other = (torch.cat([x for x, _ in batches.epoch(rng(seed))]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("ahead", [1, 200, 2**25])
def test_epochs_together_are_the_epochs_alone(world, ahead, monkeypatch):
    real, labels, memory = world
    monkeypatch.setattr("cairn.memory.replay.AHEAD_VALUES", ahead)
    batches = ReplayBatches(real, labels, memory, batch=16, real_share=0.5)
    together = [list(epoch) for epoch in batches.epochs([rng(seed) for seed in range(5)])]
    assert len(together) == 5
    for seed, epoch in enumerate(together):
        for (x, y), (x_alone, y_alone) in zip(epoch, batches.epoch(rng(seed)), strict=True):
            assert torch.equal(x, x_alone)
            assert torch.equal(y, y_alone)


def test_a_factor_is_made_once_for_several_epochs(world, monkeypatch):
    """What no cache holds is factorised once per group of epochs, not once per epoch."""
    real, labels, memory = world
    monkeypatch.setattr("cairn.memory.gaussians.CACHE_BYTES", 0)
    made = []
    plain = type(memory.kind).factors
    monkeypatch.setattr(type(memory.kind), "factors", lambda *args: made.append(1) or plain(*args))
    batches = ReplayBatches(real, labels, memory, batch=16, real_share=0.5)
    for epoch in batches.epochs([rng(seed) for seed in range(6)]):
        list(epoch)
    assert len(made) == 1


class OnDevice(TorchDispatchMode):
    """Sizes of what is copied to the device `meta`, and the products there."""

    def __init__(self):
        super().__init__()
        self.copied: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            self.copied.append(args[0].numel())
        result = func(*args, **kwargs)
        self.products += func is torch.ops.aten.bmm.default and result.device.type == "meta"
        return result


@pytest.mark.parametrize("batch", [8, 16])
def test_batches_lie_on_the_device_of_training_without_a_copy_of_their_own(world, batch, monkeypatch):
    """Of each epoch its order, its random numbers and their order are copied, whatever the number of batches and of the chunks of
    classes in which they are drawn; of all epochs together the means, and the factors with what was added to each."""
    monkeypatch.setattr("cairn.memory.gaussians.CHUNK_VALUES", 1)
    batches = ReplayBatches(*world, batch=batch, real_share=0.5, device=torch.device("meta"))
    with OnDevice() as seen:
        epochs = [
            [(x.device.type, y.device.type, x.shape) for x, y in epoch] for epoch in batches.epochs([rng(), rng(1)])
        ]
    plain = ReplayBatches(*world, batch=batch, real_share=0.5)
    assert epochs == [[("meta", "meta", x.shape) for x, _ in plain.epoch(rng())]] * 2
    assert len(epochs[0]) == 80 / batch
    assert sorted(seen.copied) == sorted([*[40, 40 * 6, 40] * 2, 4 * 6, *[36, 1] * 4])
    assert seen.products == 2
    with OnDevice() as later:
        list(batches.epoch(rng(2)))
    assert sorted(later.copied) == sorted([40, 40 * 6, 40, 4 * 6])  # factors are kept there

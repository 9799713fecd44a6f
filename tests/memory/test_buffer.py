"""A sample of a stream that is seen once: how likely an item is to stay, how many of each class, what a draw brings."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom, chisquare

from cairn.memory.buffer import Buffer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def stream(labels):
    """Items that are their own numbers, so that one sees which stayed."""
    labels = torch.tensor(labels)
    return torch.arange(len(labels), dtype=torch.uint8)[:, None].repeat(1, 3), labels


def kept(labels, capacity, insertion, seed, pieces=(4,)):
    """Numbers of the items that stayed of a stream in pieces."""
    items, y = stream(labels)
    buffer, generator = Buffer(capacity, insertion), rng(seed)
    for some, names in zip(items.split(*pieces), y.split(*pieces), strict=True):
        buffer = buffer.add(some, names, generator)
        assert len(buffer) <= capacity
        assert torch.equal(buffer.labels, y[buffer.items[:, 0].long()])
    return buffer, buffer.items[:, 0].tolist()


def test_a_reservoir_keeps_each_item_with_the_same_chance():
    """M / n, by the chi-squared test and, item by item, within what a binomial count allows."""
    n, M, runs = 15, 6, 1500
    counts = torch.zeros(n)
    for seed in range(runs):
        _, found = kept([0] * 11 + [1] * 4, M, "reservoir", seed)
        counts[found] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-3
    low, high = binom.ppf([1e-5, 1 - 1e-5], runs, M / n)
    assert ((counts >= low) & (counts <= high)).all()


def test_a_balanced_buffer_keeps_items_of_a_class_with_the_same_chance_and_classes_alike():
    """Whatever their order: the first class is there before the others come, the last one comes back to a full buffer."""
    labels = [0] * 9 + [1] * 5 + [2] * 2 + [0, 1] * 3 + [3] * 6
    runs, counts = 500, torch.zeros(len(labels))
    y = torch.tensor(labels)
    for seed in range(runs):
        buffer, found = kept(labels, 10, "balanced", seed)
        counts[found] += 1
        sizes = buffer.labels.bincount().tolist()
        assert sizes[2] == 2  # all there are
        assert max(sizes) - min(sizes[:2] + sizes[3:]) <= 1
    assert (counts[y == 2] == runs).all()
    for c in (0, 1, 3):
        assert chisquare(counts[y == c].numpy()).pvalue > 1e-3


def test_classes_that_all_overflow_differ_by_one_at_most():
    for seed in range(20):
        order = torch.randperm(60, generator=rng(seed)).tolist()
        buffer, _ = kept([i % 4 for i in order], 10, "balanced", seed, pieces=(7,))
        assert sorted(buffer.labels.bincount().tolist()) == [2, 2, 3, 3]


@pytest.mark.parametrize("insertion", ["balanced", "reservoir"])
def test_pieces_make_no_difference_and_nothing_changes_in_place(insertion):
    labels = [0, 1, 2, 0, 0, 1] * 5
    one, two = (kept(labels, 9, insertion, 3, pieces=(size,))[1] for size in (30, 4))
    assert one == two
    items, y = stream(labels)
    first = Buffer(9, insertion).add(items[:9], y[:9], rng())
    before = {key: value.clone() for key, value in first.state_dict().items()}
    first.add(items[9:], y[9:], rng())
    first.without(1)
    assert all(torch.equal(before[key], value) for key, value in first.state_dict().items())


def test_a_draw_takes_turns_among_the_classes_and_nothing_twice():
    items, y = stream([0] * 7 + [1] * 2 + [2] * 5)
    buffer, seen = Buffer(20).add(items, y, rng()), torch.zeros(14)
    for seed in range(300):
        places = buffer.draw(8, rng(seed))
        assert len(places.unique()) == 8
        assert buffer.labels[places].bincount().tolist() == [3, 2, 3]
        assert len(buffer.labels[buffer.draw(2, rng(seed))].unique()) == 2
        seen[places] += 1
    assert chisquare(seen[:7].numpy()).pvalue > 1e-3
    assert sorted(buffer.draw(99, rng()).tolist()) == list(range(14))
    assert not len(Buffer(3).draw(5, rng()))


def test_a_class_that_is_gone_leaves_room_and_bytes():
    items, y = stream([0, 0, 1, 1, 1, 2])
    buffer = Buffer(6).add(items, y, rng())
    assert buffer.bytes == 6 * 3 + 6 * 8 + 3 * 8
    left = buffer.without(1)
    assert left.labels.tolist() == [0, 0, 1]
    assert left.items[:, 0].tolist() == [0, 1, 5]
    assert left.seen.tolist() == [2, 1]
    again = Buffer(6).restored(left.state_dict()).add(items[:2], torch.tensor([2, 2]), rng())
    assert again.labels.tolist() == [0, 0, 1, 2, 2]
    empty = left.without(0).without(0)
    assert empty.bytes == 0
    assert len(empty.add(items[:1], y[:1], rng())) == 1

"""RAPF: what the hinge pushes apart, what fusion keeps, and when neither has a say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import rows
from torch.nn.functional import cross_entropy

from cairn.config import with_settings
from cairn.data.images import Concatenation, Subset
from cairn.maths.fusion import fused
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.replay import ReplayBatches
from cairn.methods.catalogue import METHODS
from cairn.methods.rapf import _WithPairs, hinge, neighbours
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def build(towers, *assignments):
    entry = METHODS["rapf"]
    config = with_settings(entry.default_config(towers), ["schedule.epochs=2", "schedule.batch=16", *assignments])
    return entry.build(towers, config, seed=1)


def world(k=5, n=12, d=6, seed=0):
    """Class texts in a cone, rows around them with one scatter that is neither diagonal nor the same in all directions."""
    rng = torch.Generator().manual_seed(seed)
    T = unit(2 * torch.randn(d, generator=rng) + torch.randn(k, d, generator=rng)).double()
    mixing = torch.randn(d, d, generator=rng).double() * torch.logspace(0, -1, d)
    y = torch.randint(k, (n,), generator=rng)
    return unit(T[y] + 0.3 * torch.randn(n, d, generator=rng).double() @ mixing), T, y


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 3.0])
def test_neighbours_are_pairs_of_an_old_and_a_new_class_with_near_texts(threshold):
    _, T, _ = world()
    near = neighbours(T, 3, threshold)
    for i in range(5):
        for j in range(5):
            distance = sum(float(a - b) ** 2 for a, b in zip(T[i], T[j], strict=True)) ** 0.5
            assert bool(near[i, j]) == (i < 3 <= j and distance < threshold)
    assert int(near.sum()) == {0.0: 0, 3.0: 6}.get(threshold, int(near.sum()))


@pytest.mark.parametrize("by", ["cosine", "distance"])
def test_hinge_is_the_written_mean_over_rows_and_their_rivals(by):
    z, T, y = world()
    rival, margin, terms = (y + 1 + torch.arange(len(y)) % 4) % 5, 0.1, []
    for i in range(len(z)):
        if by == "cosine":
            short = float(z[i] @ T[rival[i]]) - float(z[i] @ T[y[i]]) + margin
        else:
            short = float((z[i] - T[y[i]]).norm() - (z[i] - T[rival[i]]).norm()) + margin
        terms.append(max(0.0, short))
    assert 0 in terms
    assert max(terms) > 0
    assert hinge(z, T, y, rival, margin, by).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert hinge(z[:0], T, y[:0], rival[:0], margin, by).item() == 0
    assert torch.autograd.gradcheck(lambda z: hinge(z, T, y, rival, margin, by), (z.requires_grad_(),))


@pytest.mark.parametrize(("mask", "fusion"), [("clipped", 0.6), ("clipped", 0.0), ("ratio", 0.7)])
def test_fusion_is_the_written_mixture_in_the_basis_of_the_old_weights(mask, fusion):
    rng = torch.Generator().manual_seed(3)
    old, change = (torch.randn(4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    new = old + 0.1 * change
    vectors = np.linalg.svd(old.numpy())[0]
    R, R2 = vectors.T @ old.numpy(), vectors.T @ new.numpy()
    mean, largest = np.abs(R2 - R).mean(), np.abs(R2 - R).max()
    mixed = np.empty((4, 4))
    for i in range(4):
        for j in range(4):
            D = abs(R2[i, j] - R[i, j])
            M = min(1, D / largest + fusion) if mask == "clipped" else D / (D + fusion * mean)
            mixed[i, j] = (1 - M) * R[i, j] + M * R2[i, j]
    torch.testing.assert_close(fused(old, new, fusion, mask), torch.from_numpy(vectors @ mixed), rtol=0, atol=1e-12)


def test_fusion_ends_at_the_new_weights_and_at_the_old_ones():
    rng = torch.Generator().manual_seed(3)
    old, new = (torch.randn(5, 5, generator=rng) for _ in range(2))
    torch.testing.assert_close(fused(old, new, 0.0, "ratio"), new)
    torch.testing.assert_close(fused(old, new, 1e9, "ratio"), old)
    torch.testing.assert_close(fused(old, new, 1.0), new)
    for mask in ("clipped", "ratio"):
        torch.testing.assert_close(fused(old, old, 1.0, mask), old)
        torch.testing.assert_close(fused(old, old, 0.0, mask), old)
    gaps = [(fused(old, new, fusion, "ratio") - old).norm().item() for fusion in (0.0, 0.5, 1.0, 2.0)]
    assert gaps == sorted(gaps, reverse=True)


def correlated_memory(sizes, d=5):
    """Gaussians of old classes of unequal sizes with one scatter that is neither diagonal nor isotropic, far apart."""
    rng = torch.Generator().manual_seed(4)
    mixing = torch.randn(d, d, generator=rng) * torch.logspace(0, -1, d)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    means = 20 * torch.randn(len(sizes), d, generator=rng)
    return GaussianMemory(d).add(means[y] + torch.randn(len(y), d, generator=rng) @ mixing, y), means


def test_every_pair_gets_fresh_draws_of_its_own_old_class_in_every_step():
    old, means = correlated_memory([40, 7, 25])
    pairs = torch.tensor([[0, 3], [0, 4], [2, 3]])
    x, y = torch.randn(10, 5), torch.full((10,), 3)
    batches = _WithPairs(
        ReplayBatches(x, y, old, batch=8, real_share=0.5, sphere=False), old, pairs, 6, 50, lambda v: v
    )
    found = list(next(batches.epochs([torch.Generator().manual_seed(0)])))
    assert len(found) == len(batches) == 3
    drawn = []
    for z, labels in found:
        own = labels[:, 1] < 0
        assert own.sum() == len(z) - 18
        assert labels[~own].tolist() == [[0, 3]] * 6 + [[0, 4]] * 6 + [[2, 3]] * 6
        nearest = torch.cdist(z[~own], means).argmin(1)
        assert nearest.tolist() == labels[~own, 0].tolist()
        assert (z[~own].norm(dim=1) > 2).all()  # not brought to length 1
        drawn.append(z[~own])
    drawn = torch.cat(drawn)
    assert len(drawn.unique(dim=0)) == len(drawn)
    left = list(next(batches.epochs([torch.Generator().manual_seed(0)], skip=2)))
    assert all(torch.equal(one, other) for one, other in zip(left[0], found[2], strict=True))


def test_pairs_beyond_the_limit_take_turns():
    old, _ = correlated_memory([9, 12, 5, 30])
    pairs = torch.tensor([[c, 4] for c in range(4)])
    x, y = torch.randn(12, 5), torch.full((12,), 4)
    batches = _WithPairs(ReplayBatches(x, y, old, batch=4, real_share=0.75), old, pairs, 2, 3, unit)
    turns = [labels[labels[:, 1] >= 0, 0].tolist() for _, labels in next(batches.epochs([torch.Generator()]))]
    assert turns == [[0, 0, 1, 1, 2, 2], [3, 3, 0, 0, 1, 1], [2, 2, 3, 3, 0, 0], [1, 1, 2, 2, 3, 3]]


# --- learning ---------------------------------------------------------------------------------------------------------


DESCENT = ("schedule.epochs=1", "schedule.optimizer=sgd", "schedule.lr=1e-3", "schedule.clip=1e9",
           "schedule.weight_decay=0", "schedule.milestones=[]", "threshold=2", "separation=50", "margin=1")  # fmt: skip


def test_a_step_follows_cross_entropy_and_the_hinge_on_draws(flat, stream):
    """One step of plain descent, against gradients of the loss as written, on the batch that the seed says."""
    method = build(flat, *DESCENT, "schedule.batch=200", "real_share=0.5", "fusion=1")
    method.learn(stream.tasks[0], Context(Seeds(1)))
    before, old, task = method.W.clone(), method.memory, stream.tasks[1]
    method.learn(task, Context(Seeds(1)))

    x, y = rows(task.train), torch.as_tensor(task.train.labels)
    pairs = torch.tensor([[i, j] for i in (0, 1) for j in (2, 3)])
    batches = ReplayBatches(x, y, old, batch=200, real_share=0.5, sphere=False)
    batches = _WithPairs(batches, old, pairs, 40, 50, lambda v: v)
    ((x, labels),) = next(batches.epochs([Seeds(1).at(task=1).at(epoch=0).generator("batches")]))
    y, rival = labels.T
    own = len(task.train) + 100  # half of a batch of 200 is drawn of old classes
    assert len(y) == own + 4 * 40
    W = before.clone().requires_grad_()
    z, T = unit(x @ W.T), flat._text[:4]
    short = [(z[i] @ T[rival[i]] - z[i] @ T[y[i]] + 1).clamp(min=0) for i in range(own, own + 160)]
    assert set(y[:own].tolist()) == {0, 1, 2, 3}
    assert sum(value.item() > 0 for value in short) > 10
    (cross_entropy(flat.logit_scale * z[:own] @ T.T, y[:own]) + 50 * torch.stack(short).mean()).backward()
    torch.testing.assert_close(method.W - before, -1e-3 * W.grad, rtol=1e-3, atol=1e-6)


def test_the_first_form_hinges_on_the_rows_of_the_batch(flat, stream):
    method = build(
        flat,
        *DESCENT,
        "schedule.batch=200",
        "real_share=null",
        "fusion=0",
        "mask=ratio",
        "start=identity",
        "unit_features=true",
        "hinge=distance",
        "pair_draws=null",
    )
    assert torch.equal(method.W, torch.eye(16))
    method.learn(stream.tasks[0], Context(Seeds(1)))
    before, old, task = method.W.clone(), method.memory, stream.tasks[1]
    method.learn(task, Context(Seeds(1)))
    x, y = unit(rows(task.train)), torch.as_tensor(task.train.labels)
    rng = Seeds(1).at(task=1).at(epoch=0).generator("batches")
    torch.randint(2**62, (), generator=rng)
    ((x, y),) = ReplayBatches(x, y, old, batch=200, real_share=None).epoch(rng)
    W = before.clone().requires_grad_()
    z, T = unit(x @ W.T), flat._text[:4]
    short = [
        ((z[i] - T[y[i]]).norm() - (z[i] - T[j]).norm() + 1).clamp(min=0)
        for i in range(len(z))
        if y[i] < 2
        for j in (2, 3)
    ]
    assert sum(value.item() > 0 for value in short) > 10
    (cross_entropy(flat.logit_scale * z @ T.T, y) + 50 * torch.stack(short).mean()).backward()
    torch.testing.assert_close(method.W - before, -1e-3 * W.grad, rtol=1e-3, atol=1e-6)


def test_the_first_task_keeps_its_weights_and_the_next_are_fused(flat, stream):
    plain, mixed = build(flat, "fusion=1"), build(flat, "fusion=0.2")
    for method in (plain, mixed):
        method.learn(stream.tasks[0], Context(Seeds(1)))
    assert torch.equal(plain.W, mixed.W)
    before = plain.W
    for method in (plain, mixed):
        method.learn(stream.tasks[1], Context(Seeds(1)))
    torch.testing.assert_close(mixed.W, fused(before, plain.W, 0.2), rtol=1e-4, atol=1e-6)
    assert (mixed.W - before).norm() < 0.9 * (plain.W - before).norm()


def test_the_start_is_uniform_and_the_seed_s_alone(flat):
    one, other = build(flat).W, build(flat).W
    assert torch.equal(one, other)
    assert 0.2 < one.abs().max() <= 16**-0.5
    assert one.mean().abs() < 0.05
    assert not torch.equal(METHODS["rapf"].build(flat, METHODS["rapf"].config(), seed=2).W, one)


def test_without_neighbours_the_hinge_has_no_say(flat, stream):
    learned = []
    for assignments in (("threshold=0",), ("separation=0",), ("threshold=9",)):
        method = build(flat, "margin=1", *assignments)
        for task in stream.tasks[:2]:
            method.learn(task, Context(Seeds(1)))
        learned.append(method.W)
    assert torch.equal(learned[0], learned[1])
    assert not torch.allclose(learned[0], learned[2], atol=1e-5)


def test_separation_puts_old_images_further_from_the_texts_of_new_neighbours(flat, stream):
    short = []
    for weight in (0, 100):
        method = build(
            flat,
            f"separation={weight}",
            "threshold=9",
            "margin=1",
            "schedule.epochs=10",
            "schedule.lr=3e-3",
            "schedule.milestones=[]",
            "start=identity",
            "fusion=1",
        )
        for task in stream.tasks[:2]:
            method.learn(task, Context(Seeds(1)))
        z, y = unit(unit(rows(stream.tests[0])) @ method.W.T), torch.as_tensor(stream.tests[0].labels)
        short.append(sum(hinge(z, method.anchors, y, torch.full_like(y, new), 1).item() for new in (2, 3)))
    assert short[1] < 0.9 * short[0]


@pytest.mark.parametrize("units", [False, True])
def test_the_gaussians_describe_features_of_the_frozen_tower(flat, stream, units):
    method = build(flat, f"unit_features={units}")
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    x, y = rows(stream.tasks[0].train).double(), torch.as_tensor(stream.tasks[0].train.labels)
    x = unit(x) if units else x
    for c in range(2):
        torch.testing.assert_close(method.memory.mean(c), x[y == c].mean(0), atol=1e-6, rtol=0)
    pixels = rows(stream.tests[0])
    assert torch.equal(method.embed(pixels), pixels)


@pytest.mark.parametrize("text", [True, False])
def test_old_classes_alone_single_images_and_no_texts_are_learned(embedded_dataset, flat, stream, text):
    flat.has_text = text
    method = build(flat)
    first, second = stream.tasks[:2]
    one = [np.flatnonzero(first.train.labels == c)[:1] for c in range(2)]
    lone = Subset(
        first.train,
        np.concatenate([one[0], np.flatnonzero(first.train.labels == 1)]),
        np.concatenate([[0], first.train.labels[first.train.labels == 1]]),
    )
    method.learn(replace(first, train=lone), Context(Seeds(1)))
    again = Subset(first.train, one[0], first.train.labels[one[0]])
    before = method.W
    method.learn(replace(first, index=1, classes=range(2, 2), names=(), train=again), Context(Seeds(1)))
    assert not torch.equal(before, method.W)
    method.learn(replace(second, index=2, train=Concatenation([again, second.train])), Context(Seeds(1)))
    assert method.memory.counts.tolist() == [3, 18, 30, 46]
    assert torch.isfinite(method.scores(method.embed(rows(stream.tests[0])))).all()


class Cut(BaseException):
    pass


def test_a_task_cut_off_at_any_step_ends_where_an_untouched_one_does(flat, stream):
    whole = build(flat)
    for task in stream.tasks[:2]:
        whole.learn(task, Context(Seeds(1)))
    start = build(flat)
    start.learn(stream.tasks[0], Context(Seeds(1)))
    work, pieces = {}, 0
    while True:
        kept = Checkpoint(steps=1)

        def keep(now, kept=kept):
            work.update({name: {key: value.clone() for key, value in held.items()} for name, held in now.items()})
            kept.written = getattr(kept, "written", 0) + 1
            if kept.written > 3:
                raise Cut

        kept.begin(dict(work))
        kept.kept_by(keep)
        method = build(flat)
        method.load_state_dict({key: value.clone() for key, value in start.state_dict().items()})
        try:
            method.learn(stream.tasks[1], Context(Seeds(1), checkpoint=kept))
            break
        except Cut:
            pieces += 1
            assert pieces < 50
    assert pieces > 1
    assert torch.equal(method.W, whole.W)

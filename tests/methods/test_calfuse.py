"""CalFuse: calibration, fusion and distillation against naive twins, and what each of them holds in place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from teaching import rows, taught
from torch.nn.functional import cross_entropy, kl_div

from cairn.config import with_settings
from cairn.data.images import Subset
from cairn.maths.fusion import fused
from cairn.maths.losses import distillation
from cairn.maths.similarity import unit
from cairn.methods import calfuse
from cairn.methods.calfuse import calibrated_cosines
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def build(towers, *assignments):
    entry = METHODS["calfuse"]
    kinds = [a for a in assignments if a.split("=")[0] in ("fusion", "calibration")]
    config = with_settings(entry.default_config(towers), [*kinds, "schedule.epochs=2", "schedule.batch=16"])
    return entry.build(towers, with_settings(config, [a for a in assignments if a not in kinds]), seed=1)


def learned(towers, tasks, *assignments):
    return taught(build(towers, *assignments), tasks)


def weights(d=5, seed=3, size=0.1):
    """Old weights away from the identity, and new ones whose change is correlated and of unequal size."""
    rng = torch.Generator().manual_seed(seed)
    old, noise, mixing = (torch.randn(d, d, generator=rng, dtype=torch.float64) for _ in range(3))
    return old, old + size * noise @ mixing * torch.logspace(0, -1, d, dtype=torch.float64)


# --- calibration ------------------------------------------------------------------------------------------------------


def naive_cosines(x, W, T, shares):
    found = np.empty((len(x), len(T)))
    for i in range(len(x)):
        for c in range(len(T)):
            w = W @ x[i]
            w = w / np.sqrt((w * w).sum())
            z = shares[c] * x[i] + (1 - shares[c]) * w
            found[i, c] = z @ T[c] / np.sqrt((z * z).sum())
    return found


def test_calibrated_cosines_are_the_written_ones_each_class_with_its_share():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * np.geomspace(1, 0.1, 6)
    x, T = (unit(torch.tensor(rng.normal(size=(n, 6)) @ mixing)) for n in (9, 4))
    W = torch.tensor(np.eye(6) + 0.5 * rng.normal(size=(6, 6)))
    shares = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    found = calibrated_cosines(x, W, T, shares)
    expected = naive_cosines(x.numpy(), W.numpy(), T.numpy(), shares.numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:, 3], x @ T[3])  # the original feature alone
    assert torch.autograd.gradcheck(
        lambda W, a: calibrated_cosines(x, W, T, a), (W.requires_grad_(), shares[1:3].repeat(2).requires_grad_())
    )


# --- fusion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "constant"), [("clipped", 0.0), ("clipped", 0.6), ("ratio", 1.0)])
def test_fusion_by_qr_is_the_written_mixture(mask, constant):
    old, new = weights()
    Q, R = scipy.linalg.qr(old.numpy())
    largest, mean = (f(np.abs(Q.T @ (new - old).numpy())) for f in (np.max, np.mean))
    mixed = np.empty_like(R)
    for i in range(5):
        for j in range(5):
            D = sum(Q[m, i] * float(new[m, j]) for m in range(5)) - R[i, j]
            M = min(1, abs(D) / largest + constant) if mask == "clipped" else abs(D) / (abs(D) + constant * mean)
            mixed[i, j] = R[i, j] + M * D
    found = fused(old, new, constant, mask, "qr")
    torch.testing.assert_close(found, torch.from_numpy(Q @ mixed), rtol=0, atol=1e-10)
    # Signs of Q's columns and R's rows are a choice of the library, and make no difference
    flips = np.diag([1.0, -1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(found, torch.from_numpy(Q @ flips @ (flips @ mixed)), rtol=0, atol=1e-10)


def test_fusion_ends_at_the_new_weights_and_at_the_old_ones():
    old, new = weights()
    for basis in ("qr", "svd", "plain"):
        torch.testing.assert_close(fused(old, new, 1.0, "clipped", basis), new)
        torch.testing.assert_close(fused(old, new, 1e12, "ratio", basis), old)
        torch.testing.assert_close(fused(old, old, 0.0, "clipped", basis), old)


def test_from_the_identity_the_mask_is_entry_by_entry():
    _, change = weights()
    new = torch.eye(5, dtype=torch.float64) + 0.1 * change
    torch.testing.assert_close(
        fused(torch.eye(5).double(), new, 0.0, basis="qr"), fused(torch.eye(5).double(), new, 0.0, basis="plain")
    )


def test_near_the_identity_qr_is_stable_and_svd_is_arbitrary():
    """Another rotation of nearly equal singular vectors is as right: a change in the 13th decimal decides."""
    eye, (_, change) = torch.eye(5, dtype=torch.float64), weights()
    new = eye + 0.1 * change
    moved = {}
    for basis in ("qr", "svd"):
        found = [fused(eye + 1e-13 * weights(seed=seed)[0], new, 0.0, basis=basis) for seed in (1, 2)]
        moved[basis] = (found[0] - found[1]).abs().max().item()
    assert moved["qr"] < 1e-10
    assert moved["svd"] > 1e-3


def test_the_order_of_coordinates_matters_to_qr():
    old, new = weights()
    order = torch.tensor([3, 1, 4, 0, 2])
    swapped = fused(old[:, order], new[:, order], 0.0, basis="qr")
    assert (swapped - fused(old, new, 0.0, basis="qr")[:, order]).abs().max() > 1e-3


# --- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_is_from_what_was_answered_to_what_is():
    rng = torch.Generator().manual_seed(0)
    logits, former = (3 * torch.randn(7, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    p, q = (np.exp(rows.numpy() / 2) for rows in (former, logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    naive = 4 * np.mean([sum(a * np.log(a / b) for a, b in zip(*both, strict=True)) for both in zip(p, q, strict=True)])
    found = distillation(logits, former, 2.0)
    assert found.item() == pytest.approx(naive, rel=1e-12)
    theirs = [
        4 * kl_div((a / 2).log_softmax(1), (b / 2).softmax(1), reduction="batchmean")
        for a, b in ((logits, former), (former, logits))
    ]
    assert found.item() == pytest.approx(theirs[0].item())
    assert found.item() != pytest.approx(theirs[1].item(), rel=1e-2)
    assert distillation(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-15)


# --- the method -------------------------------------------------------------------------------------------------------


def test_untrained_it_is_zero_shot(flat, stream):
    method = learned(flat, stream.tasks, "schedule.epochs=0")
    x = unit(rows(stream.tests[0]))
    assert torch.equal(method.W, torch.eye(16))
    torch.testing.assert_close(method.scores(rows(stream.tests[0])), flat.logit_scale * x @ method.anchors.T)


def spied(method, task, monkeypatch):
    """The loss of a task and a batch of it, with nothing trained."""
    seen = {}

    def spy(loss, parameters, batches, *_):
        x, y = next(batches.epoch(torch.Generator().manual_seed(0)))
        seen.update(loss=loss, x=x, y=y, trained=parameters, batches=batches)

    monkeypatch.setattr(calfuse, "fit", spy)
    method.learn(task, Context(Seeds(1)))
    return seen


@pytest.mark.parametrize("classes", ["current", "seen"])
def test_the_loss_is_the_written_one(classes, flat, stream, monkeypatch):
    method = learned(flat, stream.tasks[:1], "distillation=0.7", f"classes={classes}", "calibration.share=0.3")
    former = method.W.clone()
    seen = spied(method, stream.tasks[1], monkeypatch)
    (W,), x, y, s = seen["trained"], seen["x"], seen["y"], flat.logit_scale
    assert torch.equal(W, former)
    W.data += 0.05 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    found = seen["loss"](x, y)
    now, then = (
        s * torch.from_numpy(naive_cosines(x.numpy(), V.detach().numpy(), method.anchors.numpy(), [0.3] * 4)).float()
        for V in (W, former)
    )
    own = cross_entropy(now[:, 2:], y - 2) if classes == "current" else cross_entropy(now, y)
    kept = 4 * kl_div((now[:, :2] / 2).log_softmax(1), (then[:, :2] / 2).softmax(1), reduction="batchmean")
    assert kept > 1e-3
    torch.testing.assert_close(found, own + 0.7 * kept, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen["batches"].features, unit(rows(stream.tasks[1].train)))  # of no other task


def test_the_adapter_is_fused_after_every_task_but_the_first(flat, stream, monkeypatch):
    plain = learned(flat, stream.tasks[:1], "fusion=none", "schedule.lr=0.01")
    method = learned(flat, stream.tasks[:1], "schedule.lr=0.01")
    assert torch.equal(method.W, plain.W)
    assert (method.W - torch.eye(16)).abs().max() > 1e-2
    before = method.W.clone()
    for learner in (method, plain):
        learner.learn(stream.tasks[1], Context(Seeds(1)))
    torch.testing.assert_close(method.W, fused(before, plain.W, 0.0, "clipped", "qr"))
    assert (method.W - before).norm() < (plain.W - before).norm()


def test_a_learned_share_is_of_the_task_and_stands_still_afterwards(flat, stream):
    method = learned(flat, stream.tasks[:1], "calibration=learned", "calibration.start=0.4", "schedule.lr=0.01")
    first = method.shares.clone()
    assert first[0] == first[1]
    assert 0 < first[0] < 1
    assert abs(first[0] - 0.4) > 1e-3
    method.learn(stream.tasks[1], Context(Seeds(1)))
    assert torch.equal(method.shares[:2], first)
    assert method.shares[2] == method.shares[3] != first[0]
    x = rows(stream.tests[1])
    expected = naive_cosines(unit(x).numpy(), method.W.numpy(), method.anchors.numpy(), method.shares.numpy())
    torch.testing.assert_close(
        method.scores(x), flat.logit_scale * torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4
    )


def test_calibration_and_fusion_hold_old_classes_in_place(flat, stream):
    """The loss on the first task's test images after the last one, of four combinations."""
    x, truth, found = rows(stream.tests[0]), torch.as_tensor(stream.tests[0].labels), {}
    for share in (0.0, 0.5):
        for fusion in ("qr", "none"):
            named = (f"calibration.share={share}", f"fusion={fusion}", "schedule.lr=0.02", "schedule.epochs=10")
            found[share, fusion] = cross_entropy(learned(flat, stream.tasks, *named).scores(x), truth).item()
    assert found[0.5, "qr"] < 0.9 * found[0.0, "none"]
    assert found[0.0, "qr"] < found[0.0, "none"]
    assert found[0.5, "none"] < found[0.0, "none"]


def test_a_single_class_stands_against_all_that_are_seen(flat, stream):
    """A softmax over one class has no gradient; where no other class is known, nothing is trained."""
    first, second = stream.tasks[:2]

    def alone(task, index):
        own = np.flatnonzero(task.train.labels == task.classes.start)
        images = Subset(task.train, own, np.full(len(own), index))
        return replace(task, index=index, classes=range(index, index + 1), names=task.names[:1], train=images)

    method = learned(flat, [alone(first, 0)])
    assert torch.equal(method.W, torch.eye(16))
    method.learn(alone(second, 1), Context(Seeds(1)))
    assert not torch.equal(method.W, torch.eye(16))

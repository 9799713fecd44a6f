"""What must come out where classes are replayed, forgotten, or come back, in a world of unequal classes."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import rows, taught

from cairn.config import settings, with_settings
from cairn.data.images import Subset
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods import dmc_ot
from cairn.methods.catalogue import METHODS
from cairn.methods.parts import stages
from cairn.training.context import Context
from cairn.training.seeds import Seeds

QUICK = {
    "stage1.schedule.epochs": "2", "stage1.schedule.lr": "1e-2", "stage1.schedule.batch": "8",
    "stage2.schedule.epochs": "2", "stage2.schedule.batch": "16", "stage2.text": "residual", "stage2.per_class": "12",
    "schedule.epochs": "2", "schedule.batch": "16", "schedule.lr": "1e-2", "generator.steps": "10", "width": "64",
}  # fmt: skip


@pytest.fixture
def towers(flat):
    return flat


def build(name, towers, *assignments):
    entry = METHODS[name]
    config = entry.default_config(towers)
    kinds = [a for a in assignments if a.split("=")[0] in ("stage2.text", "stage1.tuning", "drift")]
    config = with_settings(config, kinds)
    known = {path for path, _, _ in settings(config)}
    quick = [f"{key}={value}" for key, value in QUICK.items() if key in known]
    return entry.build(towers, with_settings(config, [*quick, *assignments]), seed=1)


def learned(name, towers, tasks, *assignments):
    return taught(build(name, towers, *assignments), tasks)


def without_row(tensor, c, dim=0):
    return tensor.index_select(dim, torch.tensor([i for i in range(tensor.shape[dim]) if i != c]))


# what is replayed


@pytest.mark.parametrize("name", ["dmc", "dmc-ot", "spa", "slca", "cgil", "rapf"])
def test_every_old_class_is_replayed_as_often_as_any_other(name, towers, stream, monkeypatch):
    module = sys.modules[METHODS[name].build.__module__]
    user = module if hasattr(module, "fit") else stages
    seen, plain = [], user.fit

    def fit(loss, parameters, batches, *rest, **named):
        seen.append(batches)
        return plain(loss, parameters, batches, *rest, **named)

    monkeypatch.setattr(user, "fit", fit)
    method = build(name, towers)
    for task in stream.tasks:
        seen.clear()
        method.learn(task, Context(Seeds(1)))
    epoch = next(seen[-1].epochs([torch.Generator().manual_seed(0)]))
    labels = torch.cat([y for _, y in epoch])
    if labels.ndim > 1:  # behind the rows of the batch come draws of pairs, each with its rival
        labels = labels[labels[:, 1] < 0, 0]
    counts = labels.bincount(minlength=6)
    if name in ("dmc", "dmc-ot", "spa", "rapf"):  # of new classes the images alone, each once
        assert counts[4:].tolist() == [22, 24]
    drawn = counts[:4]
    assert drawn.min() > 0
    assert drawn.max() - drawn.min() <= 2


@pytest.mark.parametrize("drift", ["local", "paired", "mean"])
def test_stage_2_of_dmc_ot_draws_from_the_calibrated_gaussians(drift, towers, stream, monkeypatch):
    drawn_from, plain = [], dmc_ot.align_text
    monkeypatch.setattr(
        dmc_ot, "align_text", lambda *given, **named: drawn_from.append(given[4]) or plain(*given, **named)
    )
    method = learned("dmc-ot", towers, stream.tasks[:1], f"drift={drift}")
    before = method.memory
    method.learn(stream.tasks[1], Context(Seeds(1)))
    assert torch.equal(drawn_from[-1].means, method.memory.means[:2])
    assert torch.equal(drawn_from[-1].covariance(1), method.memory.covariance(1))
    assert (drawn_from[-1].means - before.means).abs().max() > 1e-3
    assert (drawn_from[-1].covariance(1) - before.covariance(1)).abs().max() > 1e-6 or drift == "mean"


# class texts


@pytest.mark.parametrize("name", ["dmc", "dmc-ot"])
def test_template_weight_is_the_share_of_the_template(name, towers, stream):
    found = {}
    for w in (0, 0.25, 1):
        method = learned(name, towers, stream.tasks[:2], f"template_weight={w}")
        t, template = method.texts().detach(), towers.class_texts(stream.class_names[:4], ("a photo of a {}.",))
        assert (t - template).abs().max() > 1e-2  # the texts have moved
        torch.testing.assert_close(method.class_matrix, unit((1 - w) * t + w * template), atol=1e-6, rtol=1e-6)
        z = unit(method.embed(rows(stream.tests[0]))).detach()
        torch.testing.assert_close(method.scores(z), 20 * z @ method.class_matrix.T)
        found[w] = method.class_matrix
    torch.testing.assert_close(found[1], template)


@pytest.mark.parametrize(("freeze", "moves"), [("true", False), ("false", True)])
def test_freeze_old_says_whether_residuals_of_finished_tasks_train(freeze, moves, towers, stream):
    method = learned("dmc", towers, stream.tasks[:1], f"stage2.text.freeze_old={freeze}")
    before = method.texts.residuals[0].detach().clone()
    method.learn(stream.tasks[1], Context(Seeds(1)))
    assert (not torch.equal(method.texts.residuals[0], before)) == moves
    assert method.texts.residuals[1].abs().max() > 0


# forgetting

APART = {"products", "tokens", "sizes", "sentences", "guides", "rows", "exemplars.rows", "out", "memory.factors"} | {
    *(f"buffer.{part}" for part in ("items", "labels", "seen")),
    *(f"ridge-{i}.{part}" for i in (0, 1) for part in ("Z", "labels", "A")),
    *(f"{blend}.memory.factors" for blend in ("blend", "without-held-out")),
}
"""What does not have one row per class: sentences, rows of images, and principal axes."""


@pytest.mark.parametrize("c", [0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_forgetting_takes_the_rows_of_that_class_and_no_other(name, c, towers, stream):
    """Whatever has one row, or one column, per class loses that of class c; the rest stays as it is."""
    method = learned(name, towers, stream.tasks[:2])
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.forget(c)
    after, lost = method.state_dict(), []
    for key, was in before.items():
        if key in APART or key not in after:
            continue
        now = after[key]
        if now.shape == was.shape:
            assert torch.equal(now, was), key
            continue
        (dim,) = [i for i, (a, b) in enumerate(zip(now.shape, was.shape, strict=True)) if a != b]
        assert was.shape[dim] - now.shape[dim] == 1, key
        row = c if was.shape[dim] == 4 else c % 2  # of all classes, or of the two of a task
        assert torch.equal(now, without_row(was, row, dim)), key
        lost.append(key)
    assert lost
    if METHODS[name].card.keeps == "gaussians":
        assert {"counts", "means"} <= {key.rpartition(".")[2] for key in lost}
        sizes = [int((task.train.labels == k).sum()) for task in stream.tasks[:2] for k in task.classes]
        kept = method.head if name == "engine" else method.memory
        assert kept.counts.tolist() == sizes[:c] + sizes[c + 1 :]


# a class that comes back


def split(task, share):
    """The first images of each class, and the others, as two tasks."""
    labels = task.train.labels
    first = np.concatenate([np.flatnonzero(labels == c)[: int(share * (labels == c).sum())] for c in task.classes])
    others = np.setdiff1d(np.arange(len(labels)), first)
    parts = [Subset(task.train, some, labels[some]) for some in (first, others)]
    end = task.classes.stop
    return replace(task, train=parts[0]), replace(task, index=1, classes=range(end, end), names=(), train=parts[1])


@pytest.mark.parametrize("name", ["simplecil", "lda", "acil", "dmc", "dmc-ot", "slca"])
def test_in_two_parts_a_class_is_what_it_is_at_once(name, towers, stream):
    """Statistics merged by counts: of unequal parts, the mean of two means would be another."""
    known = {path for path, _, _ in settings(METHODS[name].default_config(towers))}
    still = [
        f"{key}={value}" for key, value in (("stage1.tuning", "none"), ("stage2.schedule.epochs", 0)) if key in known
    ]
    if name == "slca":
        still += ["stage1.schedule.epochs=0"]
    task = stream.tasks[0]
    at_once, in_two = (learned(name, towers, tasks, *still) for tasks in ([task], split(task, 0.2)))
    x = rows(stream.tests[0])
    with torch.no_grad():
        torch.testing.assert_close(
            in_two.scores(in_two.embed(x)), at_once.scores(at_once.embed(x)), atol=1e-3, rtol=1e-4
        )
    if name == "simplecil":
        z, y = rows(task.train), torch.as_tensor(task.train.labels)
        naive = torch.stack([z[y == c].double().mean(0) for c in (0, 1)])
        torch.testing.assert_close(in_two.means.means.double(), naive, atol=1e-5, rtol=1e-5)
        assert in_two.means.counts.tolist() == [(y == c).sum() for c in (0, 1)]
    if isinstance(getattr(in_two, "memory", None), GaussianMemory):
        torch.testing.assert_close(in_two.memory.means, at_once.memory.means, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_two.memory.covariance(1), at_once.memory.covariance(1), atol=1e-5, rtol=1e-4)
        assert torch.equal(in_two.memory.counts, at_once.memory.counts)

"""CLIPood: which loss is followed, and that the weights end as their average."""

from __future__ import annotations

import math

import pytest
import torch
from teaching import rows

from cairn.config import with_settings
from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.clipood import margin_metric_softmax
from cairn.towers.tuning import Full
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

STEP = (
    "stage1.schedule.epochs=1", "stage1.schedule.batch=1000", "stage1.schedule.optimizer=sgd", "stage1.schedule.lr=0.1",
    "stage1.schedule.weight_decay=0", "stage1.schedule.clip=1e9", "stage1.average=null",
)  # fmt: skip
"""One plain step down the gradient over the whole task."""


def build(towers, *assignments, name="clipood"):
    entry = METHODS[name]
    config = with_settings(entry.default_config(towers), assignments)
    return entry.build(towers, config, seed=1)


def test_the_defaults_are_the_paper_s(towers, flat):
    stage = build(towers).config.stage1
    assert (stage.margin, stage.tuning, stage.schedule.batch) == (0.3, Full(lr=5e-6, average=0.5), 36)
    stage = build(flat).config.stage1
    assert (stage.margin, stage.average, stage.tuning.kind) == (0.3, 0.5, "adapter")


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_a_step_goes_down_the_written_loss(flat, stream, margin):
    method, task = build(flat, *STEP, f"stage1.margin={margin}"), stream.tasks[0]
    method.learn(task, Context(Seeds(1)))
    x, y, T, s = rows(task.train), task.train.labels, flat.class_texts(task.names, task.templates), flat.logit_scale
    D = torch.zeros(flat.dim, flat.dim, requires_grad=True)
    total = 0.0
    for i in range(len(x)):
        z = x[i] + D @ x[i]
        z = z / z.norm()
        logits = [s * (z @ t + margin * (1 - T[y[i]] @ t)) for t in T]
        total = total - logits[y[i]] + torch.stack(logits).logsumexp(0)
    (total / len(x)).backward()
    torch.testing.assert_close(method.image.module.map.weight.detach(), -0.1 * D.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["images", "embeddings"])
def test_the_weights_end_as_the_beta_average_of_a_task_s_trajectory(flat, stream, towers, small_stream, form):
    some, tasks = (flat, stream.tasks) if form == "embeddings" else (towers, small_stream.tasks)
    seen = []
    log = Log(show=lambda event: seen.append([p.detach().clone() for p in method.image.parameters()]))
    method = build(some, "stage1.schedule.epochs=2", "stage1.schedule.batch=8")
    for task in tasks[:2]:
        seen[:] = [[p.detach().clone() for p in method.image.parameters()]]
        method.learn(task, Context(Seeds(1), log))
        T = len(seen) - 1
        assert 2 * -(-len(task.train) // 8) == T
        beta = torch.distributions.Beta(0.5, 0.5)
        a = [math.exp(beta.log_prob(torch.tensor((t + 0.5) / (T + 1)))) for t in range(T + 1)]
        for i, parameter in enumerate(method.image.parameters()):
            expected = sum(weight * values[i] for weight, values in zip(a, seen, strict=True)) / sum(a)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
        assert any(not torch.equal(now, last) for now, last in zip(method.image.parameters(), seen[-1], strict=True))


def test_every_weight_of_the_tower_is_trained(towers, small_stream):
    method = build(towers, "stage1.schedule.epochs=1")
    before = method.image.state_dict()
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    after = method.image.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert sum(p.numel() for p in method.image.parameters()) == sum(p.numel() for p in towers.vision().parameters())
    assert len(moved) > 0.9 * len(before)


@pytest.mark.parametrize(("classes", "matter"), [("current", False), ("seen", True)])
def test_old_texts_matter_to_a_new_task_where_all_classes_stand_in_the_softmax(flat, stream, classes, matter):
    ends = []
    for turned in (False, True):
        method = build(flat, f"stage1.classes={classes}")
        method.learn(stream.tasks[0], Context(Seeds(1)))
        if turned:
            method.anchors = unit(method.anchors.flip(1))
        method.learn(stream.tasks[1], Context(Seeds(1)))
        ends.append(method.image.module.map.weight.detach().clone())
    assert torch.equal(*ends) != matter


def test_without_margin_and_average_it_is_fine_tuning(flat, stream):
    plain = build(flat, "stage1.margin=0", "stage1.average=null", "stage1.classes=seen"), build(flat, name="finetune")
    for method in plain:
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
    x = rows(stream.tests[0])
    a, b = (method.scores(method.embed(x)) for method in plain)
    assert torch.equal(a, b)


# the loss


def clustered(n=12, k=3, d=8, seed=0):
    """Unit rows in correlated clusters, unit texts near them, labels."""
    rng = torch.Generator().manual_seed(seed)
    T = unit(torch.randn(k, d, generator=rng, dtype=torch.float64))
    y = torch.arange(n) % k
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    z = unit(T[y] + 0.5 * torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing.T)
    return z, T, y


def test_margin_metric_softmax_is_the_written_sum():
    """A wrong class is given lambda (1 - t_y . t_c) ahead: nothing for the right one, little for one like it."""
    z, T, y = clustered()
    s, margin, total = 7.0, 0.3, 0.0
    for i in range(len(z)):
        right = T[y[i]]
        logits = [s * (float(z[i] @ t) + margin * (1 - float(right @ t))) for t in T]
        total -= logits[y[i]] - math.log(sum(math.exp(value) for value in logits))
    assert math.isclose(margin_metric_softmax(z, T, y, s, margin).item(), total / len(z), rel_tol=1e-12)
    assert margin_metric_softmax(z, T, y, s, 0.6) > margin_metric_softmax(z, T, y, s, 0.3)


def test_without_a_margin_it_is_cross_entropy_to_the_bit():
    values, gradients = [], []
    for loss in (class_cross_entropy, lambda *given: margin_metric_softmax(*given, 0.0)):
        z, T, y = clustered()
        z = z.float().requires_grad_()
        value = loss(z, T.float(), y, 7.0)
        value.backward()
        values.append(value)
        gradients.append(z.grad)
    assert torch.equal(*values)
    assert torch.equal(*gradients)


def test_the_gradient_of_the_margin_loss_is_exact():
    z, T, y = clustered(n=6)
    loss = lambda z, T: margin_metric_softmax(z, T, y, 3.0, 0.3)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), T.requires_grad_()))

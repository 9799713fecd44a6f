"""SLCA: how fast what moves, what is kept as it was, and what the classifier is aligned by."""

from __future__ import annotations

import pytest
import torch
from teaching import rows

from cairn.config import with_settings
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.slca import _Draws
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def step(stage, lr=0.01):
    """One plain step down the gradient over all that the stage has."""
    schedule = f"stage{stage}.schedule"
    return (
        f"{schedule}.epochs=1",
        f"{schedule}.batch=10000",
        f"{schedule}.optimizer=sgd",
        f"{schedule}.lr={lr}",
        f"{schedule}.weight_decay=0",
        f"{schedule}.clip=1e9",
    )


def build(towers, *assignments):
    entry = METHODS["slca"]
    config = with_settings(entry.default_config(towers), assignments)
    return entry.build(towers, config, seed=1)


def logits(f, head):
    """sqrt(d) W z + b of one embedding, class by class."""
    z = f / f.norm()
    return torch.stack([len(f) ** 0.5 * (row[:-1] @ z) + row[-1] for row in head])


def test_scores_are_the_linear_classifier_s(flat, stream):
    method = build(flat)
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    with torch.no_grad():
        f = method.embed(rows(stream.tests[1])[:6])
        expected = torch.stack([logits(row, method.head) for row in f])
    torch.testing.assert_close(method.scores(f), expected)
    torch.testing.assert_close(method.scores(3 * f), expected)


def test_a_slow_step_goes_down_the_written_loss_each_part_at_its_own_rate(flat, stream):
    """In the second task: rows start where they are, its classes compete among themselves, old rows stand still."""
    method = build(flat, *step(1), "stage1.slow=0.02", "stage2.schedule.epochs=0")
    task = stream.tasks[1]
    method.learn(stream.tasks[0], Context(Seeds(1)))
    method.head = torch.cat([method.head, torch.randn(2, 17, generator=torch.Generator().manual_seed(0))])
    method.tasks = torch.tensor([0, 0, 1, 1])
    D0, c0 = (p.detach().clone() for p in (method.image.module.map.weight, method.image.module.map.bias))
    before = method.head.clone()
    method.learn(type(task)(1, range(4, 4), (), task.templates, task.train), Context(Seeds(1)))

    D, c = D0.clone().requires_grad_(), c0.clone().requires_grad_()
    head = before[2:].clone().requires_grad_()
    x, y, total = rows(task.train), torch.as_tensor(task.train.labels) - 2, 0.0
    for i in range(len(x)):
        H = logits(x[i] + D @ x[i] + c, head)
        total = total - H[y[i]] + H.logsumexp(0)
    (total / len(x)).backward()
    assert torch.equal(method.head[:2], before[:2])
    torch.testing.assert_close(method.head[2:], before[2:] - 0.01 * head.grad, rtol=1e-4, atol=1e-6)
    moved = method.image.module.map.weight.detach() - D0, method.image.module.map.bias.detach() - c0
    torch.testing.assert_close(moved[0], -0.02 * 0.01 * D.grad, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(moved[1], -0.02 * 0.01 * c.grad, rtol=1e-3, atol=1e-8)
    assert moved[0].abs().max() > 1e-5


def test_full_tuning_has_its_own_rate_and_average(towers, small_stream):
    """Two epochs of one step each: rows start at zero, so the tower stands in the first and has a gradient in the second."""
    found = []
    for lr, average in ((1e-4, "null"), (2e-4, "null"), (1e-4, 0.5)):
        settings = (f"stage1.tuning.lr={lr}", f"stage1.tuning.average={average}", "stage1.schedule.epochs=2")
        method = build(towers, *step(1), *settings, "stage2.schedule.epochs=0")
        start = method.image.state_dict()
        method.learn(small_stream.tasks[0], Context(Seeds(1)))
        end = method.image.state_dict()
        name = max((n for n in start if n != "version"), key=lambda n: (end[n] - start[n]).double().norm())
        found.append((method.head, (end[name].double() - start[name].double()).norm().item()))
    (head, once), (same, twice), (_, averaged) = found
    assert torch.equal(head, same)
    assert twice == pytest.approx(2 * once, rel=0.01)
    # Densities of Beta(.5, .5) at 1/6 and 5/6, and at 1/2
    ends, middle = (1 / 6 * 5 / 6) ** -0.5, 2.0
    assert averaged == pytest.approx(once * ends / (2 * ends + middle), rel=0.01)


def test_gaussians_are_those_of_the_encoder_at_their_task_and_stay(flat, stream):
    method = build(flat, "stage1.slow=10")
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
        with torch.no_grad():
            z = unit(method.embed(rows(task.train))).double()
        for c in task.classes:
            own = z[torch.as_tensor(task.train.labels) == c]
            torch.testing.assert_close(method.memory.mean(c), own.mean(0), atol=1e-6, rtol=0)
        if task.index == 0:
            first, kept = z, method.memory
    with torch.no_grad():
        assert (unit(method.embed(rows(stream.tasks[0].train))).double() - first).norm() > 1e-3 * first.norm()
    for c in stream.tasks[0].classes:
        assert torch.equal(method.memory.mean(c), kept.mean(c))
        assert torch.equal(method.memory.covariance(c), kept.covariance(c))


@pytest.mark.parametrize(
    ("temperature", "normalise", "shrink"), [(0.1, "tasks", 0.1), (0.5, "tasks", 0.4), (0.5, "all", 0)]
)
def test_an_alignment_step_goes_down_the_written_loss_on_draws_of_all_classes(
    flat, stream, temperature, normalise, shrink
):
    settings = (
        "stage2.per_class=5",
        f"stage2.temperature={temperature}",
        f"stage2.normalise={normalise}",
        f"stage2.shrink={shrink}",
    )
    aligned = build(flat, "stage1.schedule.epochs=1", *step(2, lr=0.03), *settings)
    plain = build(flat, "stage1.schedule.epochs=1", "stage2.schedule.epochs=0")
    aligned.learn(stream.tasks[0], Context(Seeds(1)))
    plain.load_state_dict({key: value.clone() for key, value in aligned.state_dict().items()})
    for method in (aligned, plain):
        method.learn(stream.tasks[1], Context(Seeds(1)))
    assert all(torch.equal(a, b) for a, b in zip(aligned.image.parameters(), plain.image.parameters(), strict=True))
    assert aligned.memory == plain.memory

    rng = Seeds(1).at(task=1).at(stage=2).at(epoch=0).generator("batches")
    drawn, names = aligned.memory.draw(5, rng)
    assert torch.bincount(names).tolist() == [5, 5, 5, 5]
    head, total = plain.head.clone().requires_grad_(), 0.0
    for z, c in zip(drawn, names.tolist(), strict=True):
        if c < 2:  # of the first task of two: its mean is drawn as 1 - shrink / 2 of itself
            z = z - shrink / 2 * aligned.memory.mean(c).float()
        H = logits(z, head)
        own = [H] if normalise == "all" else [H[:2], H[2:]]
        H = H / (temperature * sum((part**2).sum().sqrt() for part in own) / len(own))
        total = total - H[c] + H.logsumexp(0)
    (total / len(drawn)).backward()
    torch.testing.assert_close(aligned.head, plain.head - 0.03 * head.grad, rtol=1e-3, atol=1e-5)
    assert (aligned.head - plain.head).abs().max() > 1e-4


def test_alignment_settles_what_tasks_that_never_met_left_open(flat, stream):
    accuracy = {}
    for epochs in (0, 5):
        method = build(flat, f"stage2.schedule.epochs={epochs}")
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
        x, y = rows(stream.tests[-1]), torch.as_tensor(stream.tests[-1].labels)
        for test in stream.tests[:-1]:
            x, y = torch.cat([x, rows(test)]), torch.cat([y, torch.as_tensor(test.labels)])
        accuracy[epochs] = (method.scores(method.embed(x)).argmax(1) == y).double().mean()
    assert accuracy[5] > accuracy[0] + 0.02


def test_an_epoch_of_draws_is_balanced_mixed_and_can_be_taken_up(flat, stream):
    method = build(flat, "stage2.schedule.epochs=0")
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
    draws = _Draws(method.memory, torch.zeros(6, 16), per_class=7, batch=10, device=torch.device("cpu"))

    def epochs(skip):
        rngs = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return [list(epoch) for epoch in draws.epochs(rngs, skip)]

    first, second = epochs(0)
    assert len(first) == len(second) == len(draws) == 5
    labels = torch.cat([y for _, y in first])
    assert torch.bincount(labels).tolist() == [7] * 6
    assert len(first[0][1].unique()) > 3
    torch.testing.assert_close(torch.cat([z for z, _ in first]).norm(dim=1), torch.ones(42))
    late, other = epochs(3)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first[3:], late, strict=True))
    assert torch.equal(other[0][0], second[0][0])
    assert not torch.equal(first[0][0], second[0][0])


def test_a_classifier_of_zeros_can_be_aligned(flat, stream):
    """Without a slow learner all logits are 0, and so is their length."""
    method = build(flat, "stage1.schedule.epochs=0")
    method.learn(stream.tasks[0], Context(Seeds(1)))
    x, y = rows(stream.tests[0]), torch.as_tensor(stream.tests[0].labels)
    scores = method.scores(method.embed(x))
    assert torch.isfinite(scores).all()
    assert (scores.argmax(1) == y).double().mean() > 0.8


def test_tasks_of_classes_are_kept_through_forgetting_and_a_state_that_has_none_is_read_as_one_task(flat, stream):
    method = build(flat, "stage2.schedule.epochs=0")
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
    assert method.tasks.tolist() == [0, 0, 1, 1, 2, 2]
    method.forget(2)
    method.forget(2)
    assert method.tasks.tolist() == [0, 0, 2, 2]
    means = method.memory.means.float()
    expected = torch.stack([0.05 * means[0], 0.05 * means[1], 0 * means[2], 0 * means[3]])  # of two tasks
    torch.testing.assert_close(method._shrunk(0.1), expected)
    state = method.state_dict()
    state.pop("tasks")
    fresh = build(flat)
    fresh.load_state_dict(state)
    assert fresh.tasks.tolist() == [0, 0, 0, 0]
    entry = METHODS["slca"]
    before = entry.config.model_validate(entry.completed({"stage2": {"per_class": 9}})).stage2
    assert (before.per_class, before.normalise, before.shrink) == (9, "all", 0)

"""The prior that keeps texts, encoder and projectors near the towers as they came: what it adds, when, and how it is weighed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from cairn.config import with_settings
from cairn.errors import ResultError
from cairn.maths.losses import mean_squared_distance
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.parts import prior, stages
from cairn.methods.parts.prior import UNTRIED, WEIGHTS, PriorWeight, are_few, half_left_out
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

NAMES = ("dmc", "dmc-ot", "spa")
SHORT = {"dmc": ("stage1.schedule.epochs=2", "stage2.schedule.epochs=2"), "spa": ("schedule.epochs=2",)}


NOTHING = torch.zeros(0, dtype=torch.int64)
"""The counts of an empty memory."""


def learned(name, towers, tasks, *assignments, log=None) -> Any:
    """The learner, of a class that its name tells."""
    entry = METHODS[name]
    config = with_settings(entry.default_config(towers), [*SHORT[name.removesuffix("-ot")], *assignments])
    method = entry.build(towers, config, seed=1)
    for task in tasks:
        method.learn(task, Context(Seeds(1), log=log or Log()))
    return method


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_mean_squared_distance_row_by_row():
    a, b = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(5, 3)
    twin = sum((a[i, j].item() - 1) ** 2 for i in range(5) for j in range(3)) / 5
    assert mean_squared_distance(a, b).item() == pytest.approx(twin, rel=1e-6)


def test_images_are_few_by_their_average_over_all_classes_seen():
    assert are_few(torch.arange(3).repeat_interleave(7), NOTHING)
    assert not are_few(torch.arange(3).repeat_interleave(8), NOTHING)
    assert are_few(torch.tensor([2] * 3), torch.tensor([10, 10]))
    assert not are_few(torch.tensor([2] * 4), torch.tensor([10, 10]))
    assert not are_few(torch.tensor([0] * 2), torch.tensor([7, 7]))  # a class that came back


def test_half_of_every_class_is_left_out():
    labels = torch.tensor([0] * 4 + [3] * 5 + [1] + [2] * 2)[
        torch.randperm(12, generator=torch.Generator().manual_seed(1))
    ]
    out = half_left_out(labels, torch.Generator().manual_seed(0))
    assert labels[out].bincount(minlength=4).tolist() == [2, 0, 1, 2]
    others = [half_left_out(labels, torch.Generator().manual_seed(seed)) for seed in range(1, 6)]
    assert any(not torch.equal(out, other) for other in others)


def quadratic(best):
    """A parameter that training puts to its weight, and a loss of rows left out that is least at `best`."""
    theta, trained = torch.nn.Parameter(torch.tensor(-1.0)), []

    def train(rows, weight, ctx):
        assert torch.is_grad_enabled()
        ctx.log("epoch", loss=0.0)
        ctx.checkpoint.finish("fit", lambda: {"theta": theta.detach()})
        trained.append((rows, weight, theta.item()))
        theta.data.fill_(weight)

    def loss(rows):
        assert not torch.is_grad_enabled()
        trained[-1] += (rows,)
        return (theta - best) ** 2

    return theta, trained, train, loss


@pytest.mark.parametrize("best", WEIGHTS)
def test_the_weight_is_the_one_under_which_rows_left_out_are_likeliest(best):
    events, labels = [], torch.tensor([0, 1, 0, 1, 0, 1])
    theta, trained, train, loss = quadratic(best)
    checkpoint = Checkpoint()
    checkpoint.kept_by(lambda work: None)
    ctx = Context(Seeds(1), Log(keep=events.append), checkpoint)
    weight = PriorWeight(None)
    assert weight.so_far(labels, NOTHING) == UNTRIED
    assert weight.chosen(labels, NOTHING, [theta], train, loss, ctx) == weight.so_far(labels, NOTHING) == best
    assert theta.item() == -1
    twin = [2 * (w - best) ** 2 for w in WEIGHTS]  # two rows are left out
    assert events == [{"event": "prior", "weight": best, "losses": twin}]
    assert weight.losses.tolist() == twin
    assert checkpoint.work("fit") is None
    assert [weight for _, weight, _, _ in trained] == list(WEIGHTS)
    for kept, _, start, out in trained:
        assert start == -1
        assert sorted([*kept.tolist(), *out.tolist()]) == list(range(6))
        assert labels[out].bincount().tolist() == [1, 1]


def test_where_no_class_has_two_images_nothing_is_tried():
    theta, trained, train, loss = quadratic(4.0)
    assert PriorWeight(None).chosen(torch.arange(3), NOTHING, [theta], train, loss, Context(Seeds(1))) == UNTRIED
    assert not trained


def test_images_left_out_in_all_tasks_are_summed():
    """A task of few images does not outweigh one of many, and a loaded learner goes on from its sums."""
    weight = PriorWeight(None)
    theta, _, train, loss = quadratic(64.0)
    labels = torch.arange(4).repeat_interleave(6)
    assert weight.chosen(labels, NOTHING, [theta], train, loss, Context(Seeds(1))) == 64.0
    again = PriorWeight(None)
    again.load_state_dict(weight.state_dict())
    theta, _, train, loss = quadratic(0.0)
    one = torch.full((2,), 4)
    assert again.chosen(one, torch.full((4,), 6), [theta], train, loss, Context(Seeds(1))) == 64.0
    assert again.losses.tolist() == [12 * (w - 64.0) ** 2 + w**2 for w in WEIGHTS]
    alone = PriorWeight(None)
    assert alone.chosen(one, torch.full((4,), 6), [theta], train, loss, Context(Seeds(1))) == 0.0


def test_nothing_is_tried_for_a_weight_that_is_given_or_where_images_are_many():
    theta, trained, train, loss = quadratic(4.0)
    few, many = torch.arange(2).repeat_interleave(4), torch.arange(2).repeat_interleave(16)
    assert PriorWeight(0.5).chosen(few, NOTHING, [theta], train, loss, Context(Seeds(1))) == 0.5
    assert PriorWeight(None).chosen(many, NOTHING, [theta], train, loss, Context(Seeds(1))) == 0.0
    assert PriorWeight(None).chosen(few, torch.tensor([40, 40]), [theta], train, loss, Context(Seeds(1))) == 0.0
    assert not trained


@pytest.mark.parametrize("name", NAMES)
def test_with_many_images_there_is_no_prior_to_the_bit(name, flat, stream, monkeypatch):
    without = learned(name, flat, stream.tasks[:2], "prior=0")
    monkeypatch.setattr(prior, "FEW", 1)
    assert same(learned(name, flat, stream.tasks[:2]), without)
    monkeypatch.setattr(prior, "FEW", 1000)
    assert not same(learned(name, flat, stream.tasks[:2]), without)


@pytest.mark.parametrize("name", NAMES)
def test_a_strong_prior_leaves_everything_where_it_was(name, flat, stream):
    moved = {}
    for weight in (0, 1e4):
        method = learned(name, flat, stream.tasks, f"prior={weight}")
        x = torch.stack([torch.as_tensor(stream.tests[0][i]) for i in range(len(stream.tests[0]))])
        with torch.no_grad():
            image = unit(method.embed(x)) if name != "spa" else method.projectors["visual"](unit(x))
        moved[weight] = torch.stack([
            mean_squared_distance(method.class_matrix, method.anchors), mean_squared_distance(image, unit(x))
        ])  # fmt: skip
    assert (moved[1e4] < 0.2 * moved[0]).all()


def losses(module, monkeypatch):
    """The functions that are minimised, in order."""
    found, plain = [], module.fit

    def fit(loss, *rest, **named):
        found.append(loss)
        return plain(loss, *rest, **named)

    monkeypatch.setattr(module, "fit", fit)
    return found


@pytest.mark.parametrize("name", ["dmc", "dmc-ot"])
def test_both_stages_of_dmc_have_the_penalty(name, flat, stream, monkeypatch):
    found = losses(stages, monkeypatch)
    method = learned(name, flat, stream.tasks[:1], "prior=3")
    x = torch.stack([torch.as_tensor(stream.tasks[0].train[i]) for i in range(6)])
    y, s = torch.as_tensor(stream.tasks[0].train.labels[:6]), flat.logit_scale
    T, A = method.texts(), method.anchors
    with torch.no_grad():
        z, z0 = unit(method.image(x)), unit(x)
        vision = cross_entropy(s * z @ A.T, y) + 3 * sum((z[i] - z0[i]).square().sum() for i in range(6)) / 6
        text = cross_entropy(s * z @ T.T, y) + 3 * sum((T[c] - A[c]).square().sum() for c in range(len(T))) / len(T)
        torch.testing.assert_close(found[0](x, y), vision)
        torch.testing.assert_close(found[1](z, y), text)
    assert (vision - cross_entropy(s * z @ A.T, y)).abs() > 1e-6


def test_spa_has_the_penalty_on_images_and_texts_apart_and_on_both_branches(towers, small_stream, monkeypatch):
    found = losses(sys.modules["cairn.methods.spa"], monkeypatch)
    method = learned("spa", towers, small_stream.tasks[:1], "prior=3")
    d, y = towers.dim, torch.tensor([0, 1, 1])
    for i, current in enumerate(method.projectors.current):
        current.data.copy_(0.1 * torch.randn(current.shape, generator=torch.Generator().manual_seed(i)))
    x = unit(torch.randn(6, d, generator=torch.Generator().manual_seed(0))).view(3, 2 * d)
    said = torch.stack(
        [unit(unit(towers.text(list(sentences))).mean(0, keepdim=True))[0] for sentences in method.sentences]
    )
    pairs = {"visual": x[:, :d], "local_visual": x[:, d:], "textual": method.anchors, "local_textual": said}
    with torch.no_grad():
        penalty = sum((method.projectors[key](rows) - rows).square().sum() / len(rows) for key, rows in pairs.items())
        plain = cross_entropy(method.row_scores(x), y)
        torch.testing.assert_close(found[0]((x, torch.zeros(3, 2)), y), plain + 3 * penalty, atol=1e-5, rtol=1e-5)
    assert penalty > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_logged_and_no_trial_is(name, flat, stream, monkeypatch):
    monkeypatch.setattr(prior, "FEW", 1000)
    events = []
    learned(name, flat, stream.tasks[:1], log=Log(keep=events.append))
    chosen = [event for event in events if event["event"] == "prior"]
    assert len(chosen) == 1
    assert chosen[0]["weight"] == WEIGHTS[chosen[0]["losses"].index(min(chosen[0]["losses"]))]
    assert sum(event["event"] == "epoch" for event in events) == (2 if name == "spa" else 4)


def test_learners_from_before_have_none():
    for name in NAMES:
        assert METHODS[name].completed({})["prior"] == 0
    weight = PriorWeight(None)
    weight.load_state_dict({})
    assert weight.losses.tolist() == [0.0] * len(WEIGHTS)


@pytest.mark.parametrize("losses", [torch.zeros(len(WEIGHTS) + 1, dtype=torch.float64), torch.zeros(len(WEIGHTS))])
def test_sums_of_another_form_are_refused(losses):
    with pytest.raises(ResultError, match="prior state 'losses'"):
        PriorWeight(None).load_state_dict({"losses": losses})


@pytest.mark.parametrize("name", NAMES)
def test_a_learner_keeps_its_sums(name, flat, stream, monkeypatch):
    monkeypatch.setattr(prior, "FEW", 1000)
    method = learned(name, flat, stream.tasks[:2])
    again: Any = METHODS[name].build(flat, method.config, seed=1)
    again.load_state_dict(method.state_dict())
    assert again.prior_weight.losses.tolist() == method.prior_weight.losses.tolist() != [0.0] * len(WEIGHTS)
    if name != "spa":  # stage 1 takes the weight of the tasks before
        expected = WEIGHTS[int(method.prior_weight.losses.argmin())]
        assert again.vision_prior(torch.tensor([4])).weight == expected

"""The loop, the schedule, the seeds and the average."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cairn.errors import NotFinite, OutOfMemory
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.fit import BetaAverage, Schedule, fit
from cairn.training.log import Log
from cairn.training.seeds import Seeds


class Rows:
    def __init__(self, x, y, batch):
        self.x, self.y, self.batch = x, y, batch

    def __len__(self):
        return -(-len(self.x) // self.batch)

    def epochs(self, rngs, skip=0):
        return (islice(self._epoch(rng), 0 if i else skip, None) for i, rng in enumerate(rngs))

    def _epoch(self, rng):
        for rows in torch.randperm(len(self.x), generator=rng).split(self.batch):
            yield self.x[rows], self.y[rows]


@pytest.fixture
def regression():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=rng) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.3], [0, 0, 0.2]])
    w = torch.tensor([1.0, -2.0, 0.5])
    return Rows(x, x @ w, 32), w


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_fit_finds_the_least_squares_solution(regression, optimizer):
    batches, w = regression
    theta = nn.Parameter(torch.zeros(3))
    lr = 0.3 if optimizer == "sgd" else 0.1
    schedule = Schedule(epochs=80, lr=lr, optimizer=optimizer, weight_decay=0.0, clip=100.0)
    fit(lambda x, y: ((x @ theta - y) ** 2).mean(), [theta], batches, schedule, Context(Seeds(0)))
    torch.testing.assert_close(theta.detach(), w, atol=2e-2, rtol=0)


def test_the_seed_alone_decides(regression):
    batches, _ = regression
    ends = []
    theta = nn.Parameter(torch.zeros(3))

    def loss(x, y):
        return ((x @ theta - y) ** 2).mean()

    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(noise)
        theta.data.zero_()
        fit(loss, [theta], batches, Schedule(epochs=2, lr=0.05), Context(Seeds(seed)))
        ends.append(theta.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_step_that_the_device_has_no_memory_for_is_told_with_its_size(regression):
    batches, _ = regression
    theta, steps = nn.Parameter(torch.zeros(3)), []

    def loss(x, y):
        steps.append(len(x))
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return ((x @ theta - y) ** 2).mean()

    with pytest.raises(OutOfMemory) as told:
        fit(loss, [theta], batches, Schedule(epochs=2), Context(Seeds(0)).at(task=2).at(stage=1))
    assert str(told.value) == (
        "task 2, stage 1: the device's memory does not hold a step with 32 rows; give a smaller schedule.batch, or "
        "--precision bfloat16"
    )


def three(batches, schedule, rates, checkpoint=None):
    """Least squares with a parameter for each column."""
    theta = [nn.Parameter(torch.zeros(1)) for _ in range(3)]

    def loss(x, y):
        return sum((x[:, i] * theta[i] - y) ** 2 for i in range(3)).mean()

    fit(loss, theta, batches, schedule, Context(Seeds(0), checkpoint=checkpoint or Checkpoint()), rates=rates)
    return torch.cat(theta).detach()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_rates_are_multiples_of_the_learning_rate(regression, optimizer):
    """The loss is a sum over parameters, so each must go where a run at its own learning rate takes it."""
    batches, _ = regression
    schedule = Schedule(epochs=2, lr=0.05, optimizer=optimizer, clip=1e9)
    found = three(batches, schedule, [0.1, 1.0, 0.1])
    slow = three(batches, schedule.model_copy(update={"lr": 0.1 * schedule.lr}), None)
    fast = three(batches, schedule, None)
    torch.testing.assert_close(found, torch.stack([slow[0], fast[1], slow[2]]))
    assert not torch.allclose(slow, fast, rtol=0.1)


def test_rates_of_one_change_nothing_and_there_must_be_one_for_each_parameter(regression):
    batches, _ = regression
    schedule = Schedule(epochs=2, lr=0.05)
    assert torch.equal(three(batches, schedule, None), three(batches, schedule, [1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="zip"):
        three(batches, schedule, [1.0, 1.0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_stage_with_rates_that_was_cut_off_goes_on_to_the_bit(regression, optimizer):
    batches, _ = regression
    schedule, rates = Schedule(epochs=2, lr=0.05, optimizer=optimizer), [0.1, 1.0, 0.1]
    kept, checkpoint = [], Checkpoint(steps=1)
    checkpoint.kept_by(lambda work: kept.append(copy.deepcopy(work)))
    whole = three(batches, schedule, rates, checkpoint)
    assert len(kept) == 2 * len(batches)
    for work in (kept[2], kept[len(batches) - 1], kept[-2]):
        again = Checkpoint()
        again.begin(work)
        assert torch.equal(three(batches, schedule, rates, again), whole)


class Drawing:
    """A model that keeps the first number that each step could draw."""

    device = torch.device("cpu")

    def __init__(self):
        self.drawn = []

    @contextmanager
    def training(self, generator):
        self.drawn.append(torch.rand(1, generator=generator).item())
        yield


def test_every_step_draws_its_own_numbers_and_every_epoch_its_own_order(regression):
    batches, _ = regression
    theta, model, firsts = nn.Parameter(torch.zeros(3)), Drawing(), []

    def loss(x, y):
        firsts.append(y[0].item())
        return ((x @ theta - y) ** 2).mean()

    fit(loss, [theta], batches, Schedule(epochs=3, lr=0.05), Context(Seeds(0)), model=model)
    steps = 3 * len(batches)
    assert len(model.drawn) == len(set(model.drawn)) == steps
    assert len(set(firsts[:: len(batches)])) == 3


PLAIN = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=1e-4),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=1e-4),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4),
}


@pytest.mark.parametrize("optimizer", PLAIN)
def test_an_optimiser_is_fused_on_an_accelerator_and_elsewhere_as_torch_has_it(optimizer):
    schedule = Schedule(optimizer=optimizer, lr=0.1)
    with FakeTensorMode():
        assert schedule.optimiser([nn.Parameter(torch.empty(3, device="cuda"))]).defaults["fused"]
    own, plain = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    steps = schedule.optimiser([own]), PLAIN[optimizer]([plain])
    assert steps[0].defaults == steps[1].defaults
    for i in range(3):
        for parameter, step in zip((own, plain), steps, strict=True):
            parameter.grad = parameter.detach() ** 2 + i
            step.step()
    assert torch.equal(own, plain)


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_a_gradient_is_never_longer_than_the_clip(clip):
    """One step of SGD goes lr * clip along a steep gradient, and lr times the gradient along a gentle one."""
    batches = Rows(torch.ones(4, 1), torch.zeros(4), 4)
    for slope, length in ((torch.tensor([30.0, 40.0]), clip), (torch.tensor([0.03, 0.04]), 0.05)):
        theta = nn.Parameter(torch.zeros(2))
        schedule = Schedule(epochs=1, lr=0.1, optimizer="sgd", weight_decay=0.0, warmup=0, cosine=False, clip=clip)
        fit(lambda x, y, theta=theta, slope=slope: slope @ theta, [theta], batches, schedule, Context(Seeds(0)))
        torch.testing.assert_close(theta.detach(), -0.1 * length * slope / slope.norm(), rtol=1e-4, atol=0)


def test_a_loss_that_is_no_number_stops_before_the_step(regression):
    batches, _ = regression
    theta = nn.Parameter(torch.ones(3))
    calls = []

    def loss(x, y):
        calls.append(1)
        return (theta * (math.inf if len(calls) == 3 else 1.0)).sum() * 0 + theta.sum()

    log = Log().at(task=4, stage=1)
    with pytest.raises(NotFinite, match=r"task 4, stage 1, epoch 0, step 2: the loss is nan"):
        fit(loss, [theta], batches, Schedule(epochs=1, lr=0.1), Context(Seeds(0), log))
    assert torch.isfinite(theta).all()


def test_nothing_to_train_or_no_epoch_is_no_step(regression):
    batches, _ = regression
    theta = nn.Parameter(torch.ones(3))

    def loss(x, y):
        raise AssertionError("called")

    fit(loss, [], batches, Schedule(epochs=3), Context(Seeds(0)))
    fit(loss, [theta], batches, Schedule(epochs=0), Context(Seeds(0)))
    assert torch.equal(theta, torch.ones(3))


def test_events_and_progress_say_where_they_are(regression):
    batches, _ = regression
    theta, kept, shown = nn.Parameter(torch.zeros(3)), [], []
    log = Log(keep=kept.append, show=shown.append).at(task=2, stage=1)
    fit(
        lambda x, y: ((x @ theta - y) ** 2).mean(),
        [theta],
        batches,
        Schedule(epochs=2, lr=0.05),
        Context(Seeds(0), log),
    )
    assert [(e["event"], e["task"], e["stage"], e["epoch"], e["rows"]) for e in kept] == [
        ("epoch", 2, 1, 0, 200),
        ("epoch", 2, 1, 1, 200),
    ]
    assert kept[1]["loss"] < kept[0]["loss"]
    assert [s["step"] for s in shown] == list(range(1, 15))
    assert shown[-1]["remaining"] == 0


def test_the_rate_rises_then_falls_by_a_half_cosine():
    schedule = Schedule(warmup=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    assert Schedule(warmup=0, cosine=False).factor(73, 100) == 1.0
    stepped = Schedule(epochs=15, warmup=0, milestones=(4, 10))
    rates = [stepped.factor(step, 45) for step in range(45)]  # three steps an epoch
    assert rates == pytest.approx([1.0] * 12 + [0.1] * 18 + [0.01] * 15)


def test_seeds_are_a_tree():
    root = Seeds(3)

    def draw(node, purpose="x"):
        return torch.rand(4, generator=node.generator(purpose))

    assert torch.equal(draw(root.at(task=1, stage=2)), draw(root.at(stage=2, task=1)))
    drawn = [draw(root), draw(root, "y"), draw(root.at(task=1)), draw(root.at(task=11)), draw(Seeds(4))]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_beta_average_is_the_weighted_mean_of_the_trajectory():
    theta = nn.Parameter(torch.tensor([0.0]))
    average = BetaAverage([theta], 0.5)
    trajectory, T = [0.0], 4
    for step in range(T):
        with torch.no_grad():
            theta += (step + 1.0) ** 2  # uneven, so that weights show
        trajectory.append(theta.item())
        average.update(step, T)
    average.apply()
    beta = torch.distributions.Beta(0.5, 0.5)
    weights = [math.exp(beta.log_prob(torch.tensor((t + 0.5) / (T + 1))).item()) for t in range(T + 1)]
    expected = sum(w * v for w, v in zip(weights, trajectory, strict=True)) / sum(weights)
    assert theta.item() == pytest.approx(expected, rel=1e-5)

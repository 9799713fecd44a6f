"""A loss as CUDA graphs. A processor has none, so what stands in for them here does what they do: the operations of one pass are
done again, on whatever lies in the memory that they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.parts.prior import PriorWeight
from cairn.methods.parts.stages import TextPrior, TextStage, align_text
from cairn.towers.catalogue import load_towers
from cairn.towers.prompts import Prompts, Residual
from cairn.training import capture
from cairn.training.capture import TOLERANCE, Captured, difference
from cairn.training.context import Context, Log
from cairn.training.fit import Schedule
from cairn.training.seeds import Seeds

aten = torch.ops.aten
READ_BY_THE_HOST = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.lift_fresh.default,  # a tensor made of the host's numbers: on a device it would be copied there
}
"""What a capture does not allow."""


class Operations(TorchDispatchMode):
    """Those of one pass, which `again` does on the same memory."""

    def __init__(self):
        super().__init__()
        self.done: list[tuple[Callable, tuple, dict, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READ_BY_THE_HOST, func
        if func is aten.index.Tensor:  # numbers of rows are no matter, truth values are counted first
            assert all(rows is None or rows.dtype != torch.bool for rows in args[1]), func
        result = func(*args, **(kwargs or {}))
        given = {part.untyped_storage().data_ptr() for part in _dense((args, kwargs))}
        own = [part for part in _dense(result) if part.untyped_storage().data_ptr() not in given]
        if own or func._schema.is_mutable:  # all others are views
            self.done.append((func, args, kwargs or {}, own))
        return result

    def again(self) -> None:
        for func, args, kwargs, own in self.done:
            result = _dense(func(*args, **kwargs))
            if own:
                for place, value in zip(own, result, strict=True):
                    place.copy_(value)


def _dense(tree) -> list[torch.Tensor]:
    parts = tree_flatten(tree)[0]
    return [part for part in parts if isinstance(part, torch.Tensor) and part.layout == torch.strided]


def graphed(call: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
    """As `torch.cuda.make_graphed_callables`, of operations instead of kernels."""
    call(*given)
    parameters = [part for part in given if part.requires_grad]
    forward, backward = Operations(), Operations()
    with forward:
        output = call(*given)
    sent = torch.empty_like(output)
    with backward:
        gradients = torch.autograd.grad(output, parameters, sent)

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *asked):
            with torch.no_grad():
                for place, value in zip(given, asked, strict=True):
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)
                forward.again()
            return output.detach()

        @staticmethod
        def backward(ctx, gradient):
            with torch.no_grad():
                sent.copy_(gradient)
                backward.again()
            left = iter(gradients)
            return tuple(next(left).detach() if part.requires_grad else None for part in given)

    return Replayed.apply


@pytest.fixture
def on_a_card(monkeypatch):
    """Captures here as there; gives the notices and how often a loss was captured."""
    told: list[str] = []
    number = [0]

    def counted(call, given):
        number[0] += 1
        return graphed(call, given)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", counted)
    monkeypatch.setattr(capture, "has_graphs", lambda device: True)
    return told, number


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


NAMES = ("striped red star", "plain_blue_circle", "ring", "dotted square", "a long green line", "cross")
TEXTS = {
    "per class": Prompts(),
    "tree": Prompts(shared=2, task=2, per_class=2, init="a photo of a"),
    "frozen, with residuals": Prompts(task=2, per_class=2, freeze_old=True, residual=2.0),
    "residual": Residual(),
}


def learned(towers, choice, cuda_graph: bool, log: Log, weight: float | None = None) -> dict[str, torch.Tensor]:
    """The state of class texts after two tasks of stage 2."""
    texts, memory = choice.build(towers), GaussianMemory(towers.dim)
    anchors = unit(torch.randn(len(NAMES), towers.dim, generator=rng(5)))
    there = anchors.to(towers.device)
    stage = TextStage(text=choice, schedule=Schedule(epochs=3, batch=7, lr=0.05), cuda_graph=cuda_graph)
    for task, rows in enumerate((slice(0, 4), slice(4, 6))):
        texts.grow(NAMES[rows], there[rows], rng(task))
        labels = torch.arange(rows.start, rows.stop).repeat(8)
        features = unit(anchors[labels] + 0.3 * torch.randn(len(labels), towers.dim, generator=rng(10 + task)))
        prior = None if weight is None else TextPrior(PriorWeight(weight), anchors[: rows.stop])
        ctx = Context(Seeds(3), log=log).at(task=task, stage=2)
        align_text(stage, texts, features, labels, memory, towers.logit_scale, class_cross_entropy, ctx, prior)
        memory = memory.add(features, labels)
    return texts.state()


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("choice", TEXTS.values(), ids=list(TEXTS))
def test_a_stage_whose_steps_are_replayed_ends_as_the_plain_one_to_the_bit(towers, choice, weight, on_a_card):
    told, number = on_a_card
    log = Log(keep=lambda event: told.append(event["text"]) if event["event"] == "notice" else None)
    expected = learned(towers, choice, False, log, weight)
    assert number == [0]
    found = learned(towers, choice, True, log, weight)
    assert number == [2]  # once per task
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not told


def a_loss():
    """CE(10 z unit(x + y)^T, labels), its parameters x and y, and batches of 5 and of 3."""
    x, y = (torch.nn.Parameter(torch.randn(4, 3, generator=rng(i))) for i in range(2))
    batches = [(torch.randn(n, 3, generator=rng(n)), torch.arange(n) % 4) for n in (5, 3)]
    return (lambda z, labels: class_cross_entropy(z, unit(x + y), labels, 10.0)), (x, y), batches


def notices(told: list[str]) -> Log:
    return Log(keep=lambda event: told.append(event["text"]) if event["event"] == "notice" else None)


def value_and_gradients(loss, parameters, batch):
    value = loss(*batch)
    return [value.detach().clone(), *torch.autograd.grad(value, parameters)]


def test_a_replayed_loss_follows_parameters_and_batch_and_has_their_gradient(on_a_card):
    told, number = on_a_card
    loss, parameters, (batch, smaller) = a_loss()
    graphs = Captured(loss, parameters, notices(told))
    for step in range(3):
        torch.nn.init.normal_(parameters[0], generator=rng(step))
        fresh = torch.randn(5, 3, generator=rng(20 + step)), (batch[1] + step) % 4
        for own in (batch, fresh, smaller):
            found, expected = (value_and_gradients(one, parameters, own) for one in (graphs, loss))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert number == [1]
    assert graphs.graphs is not None
    assert not told


def test_the_first_batch_stays_what_it_was(on_a_card):
    loss, parameters, (batch, _) = a_loss()
    before = [part.clone() for part in batch]
    graphs = Captured(loss, parameters, notices([]))
    graphs(*batch)
    graphs(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))


def test_parameters_are_what_they_were_after_the_comparison():
    loss, parameters, (batch, _) = a_loss()
    before = [parameter.detach().clone() for parameter in parameters]
    assert difference(lambda: loss(*batch), lambda: loss(*batch), parameters) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    with pytest.raises(ZeroDivisionError):
        difference(lambda: loss(*batch), lambda: 1 / 0, parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def stale(call, given):
    """A value that stays what it was."""
    value = call(*given).detach()
    return lambda *asked: value + 0 * sum(part.sum() for part in asked)


def halved(call, given):
    """The right value, half of the gradient."""

    def replayed(*asked):
        value = call(*asked)
        return value.detach() + (value - value.detach()) / 2

    return replayed


def not_a_number(call, given):
    return lambda *asked: call(*asked) * torch.nan


@pytest.mark.parametrize("made", [stale, halved, not_a_number])
def test_graphs_that_differ_from_the_plain_loss_are_left_and_told(on_a_card, monkeypatch, made):
    told, _ = on_a_card
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", made)
    loss, parameters, (batch, _) = a_loss()
    graphs = Captured(loss, parameters, notices(told))
    for _ in range(2):
        found, expected = (value_and_gradients(one, parameters, batch) for one in (graphs, loss))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (text,) = told
    assert text.startswith("stage2.cuda_graph: a captured step is ")
    assert text.endswith("every kernel is launched by itself")


def test_rounding_is_no_difference(on_a_card, monkeypatch):
    def rounded(call, given):
        return lambda *asked: call(*asked[:2]) * (1 + TOLERANCE / 3)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", rounded)
    loss, parameters, (batch, _) = a_loss()
    graphs = Captured(loss, parameters, notices(on_a_card[0]))
    graphs(*batch)
    assert graphs.graphs is not None


@pytest.mark.parametrize(
    "error",
    [RuntimeError("operation not permitted\nwhen stream is capturing"), RuntimeError(), torch.OutOfMemoryError("full")],
)
def test_a_capture_that_fails_is_one_line_and_the_plain_loss(on_a_card, monkeypatch, error):
    def fails(call, given):
        raise error

    told, _ = on_a_card
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    loss, parameters, (batch, _) = a_loss()
    graphs = Captured(loss, parameters, notices(told))
    assert torch.equal(graphs(*batch), loss(*batch))
    assert torch.equal(graphs(*batch), loss(*batch))
    assert [text.count("\n") for text in told] == [0]
    assert "cannot be captured" in told[0]


def test_a_processor_has_no_graphs_and_says_so():
    told: list[str] = []
    loss, parameters, (batch, _) = a_loss()
    assert torch.equal(Captured(loss, parameters, notices(told))(*batch), loss(*batch))
    assert told == ["stage2.cuda_graph: device 'cpu' has none; every kernel is launched by itself"]


def test_the_stand_in_finds_what_a_capture_does_not_allow():
    x = torch.nn.Parameter(torch.randn(4, 3, generator=rng()))
    for call in (
        lambda _: x * x.sum().item(),
        lambda _: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda _: x[x.detach() > 0],
    ):
        with pytest.raises(AssertionError):
            graphed(call, (x,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("choice", TEXTS.values(), ids=list(TEXTS))
def test_on_a_card_a_stage_ends_where_the_plain_one_does(choice):
    there = load_towers("tiny", device="cuda")
    told: list[str] = []
    plain, found = (learned(there, choice, graph, notices(told)) for graph in (False, True))
    assert not told
    for key, expected in plain.items():
        torch.testing.assert_close(found[key], expected, atol=1e-4, rtol=1e-4)

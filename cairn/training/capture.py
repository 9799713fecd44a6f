"""One pass and its gradient as CUDA graphs: a launch each, where the processor would hand the device every kernel by itself.

A pass of soft prompts is some five hundred small kernels, forward and backward (docs/speed.md, launches), each of which a device may
have done before it is given the next. A graph has them all, with the addresses they read and write; what a step changes are the
numbers that lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cairn.errors import one_line
from cairn.training.context import Log

Pass = Callable[..., Tensor]

TOLERANCE = 0.02
"""Largest difference between a graph and what it was captured from, as a share of the largest number: in bfloat16 rounding reaches
.01; a graph that does not follow its parameters is wrong by what they moved."""

MOVED = 0.05
"""How far parameters are moved for that comparison, in turn to either side."""


def captured(call: Pass, parameters: Sequence[nn.Parameter], log: Log) -> Pass:
    """`call` as CUDA graphs, differentiable in `parameters`, all of which it depends on; `call` itself, with a notice, where that
    cannot be.

    Everything else that `call` reads, and every shape, must stay what it is as long as the graphs are used, and the host must read
    nothing of it. The value is the same memory in every call.
    """
    if not has_graphs(device := parameters[0].device):
        return _plain(call, log, f"device '{device.type}' has none")
    try:
        graphed = cast(Pass, torch.cuda.make_graphed_callables(lambda *_: call(), tuple(parameters)))
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        return _plain(call, log, f"the pass cannot be captured ({one_line(first)})")

    def replayed() -> Tensor:
        return graphed(*parameters)

    if (apart := difference(call, replayed, parameters)) > TOLERANCE:
        return _plain(call, log, f"the captured pass is {apart:.2g} of the plain one's largest number away from it")
    return replayed


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def difference(one: Pass, other: Pass, parameters: Sequence[nn.Parameter]) -> float:
    """Between two passes, at parameters other than they are now, which are put back: the largest of values and of each gradient, as
    a share of the largest number there is."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(MOVED * _signs(parameter))
        pairs = zip(_value_and_gradients(one, parameters), _value_and_gradients(other, parameters), strict=True)
        shares = [(a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny) for a, b in pairs]
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)
    return torch.stack(shares).nan_to_num(torch.inf).max().item()


def _value_and_gradients(call: Pass, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of sum_i w_i value_i, w_i = cos i: a plain sum of unit rows has next to no gradient."""
    value = call()
    weights = torch.arange(value.numel(), device=value.device, dtype=value.dtype).cos().view_as(value)
    gradients = torch.autograd.grad((weights * value).sum(), parameters)
    return [part.detach().clone() for part in (value, *gradients)]


def _signs(parameter: Tensor) -> Tensor:
    """1, -1, 1, ... in the parameter's shape."""
    places = torch.arange(parameter.numel(), device=parameter.device) % 2
    return (1 - 2 * places).to(parameter.dtype).view_as(parameter)


def _plain(call: Pass, log: Log, why: str) -> Pass:
    log("notice", text=f"stage2.cuda_graph: {why}; every kernel is launched by itself")
    return call

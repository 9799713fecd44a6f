"""A loss and its gradient as CUDA graphs: a launch each, where the processor would hand the device every kernel by itself.

A step with soft prompts is some five hundred small kernels, forward and backward (docs/speed.md, launches), each of which a device may
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

Loss = Callable[..., Tensor]
"""Of the tensors of a batch."""

TOLERANCE = 0.02
"""Largest difference between a graph and what it was captured from, as a share of the largest number: in bfloat16 rounding reaches
.01; a graph that does not follow its parameters is wrong by what they moved."""

MOVED = 0.05
"""How far parameters are moved for that comparison, in turn to either side."""


class Captured:
    """`loss(*batch)` as CUDA graphs from the first batch on, differentiable in `parameters`, all of which it depends on.

    A batch of another shape than the first has the loss itself, and so have all where nothing can be captured or the graphs differ
    from it, with a notice. Whatever else the loss reads must stay what it is, and the host must read nothing of it. The value is the
    same memory in every call.
    """

    def __init__(self, loss: Loss, parameters: Sequence[nn.Parameter], log: Log):
        self.loss, self.parameters, self.log = loss, tuple(parameters), log
        self.graphs: Loss | None = None
        """Of the batch and the parameters; None before the first batch, and where the loss is not captured."""
        self._shapes: list[torch.Size] | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        shapes = [part.shape for part in batch]
        if self._shapes is None:
            self._shapes = shapes
            self.graphs = self._captured([part.clone() for part in batch])
        if self.graphs is None or shapes != self._shapes:
            return self.loss(*batch)
        return self.graphs(*batch, *self.parameters)

    def _captured(self, batch: Sequence[Tensor]) -> Loss | None:
        n = len(batch)
        if not has_graphs(device := self.parameters[0].device):
            return self._refused(f"device '{device.type}' has none")
        try:
            made = torch.cuda.make_graphed_callables(lambda *given: self.loss(*given[:n]), (*batch, *self.parameters))
        except RuntimeError as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            return self._refused(f"a step cannot be captured ({one_line(first)})")
        graphs = cast(Loss, made)
        again = [part.clone() for part in batch]
        apart = difference(lambda: self.loss(*again), lambda: graphs(*again, *self.parameters), self.parameters)
        if apart > TOLERANCE:
            return self._refused(f"a captured step is {apart:.2g} of the plain one's largest number away from it")
        return graphs

    def _refused(self, why: str) -> None:
        self.log("notice", text=f"stage2.cuda_graph: {why}; every kernel is launched by itself")


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def difference(one: Loss, other: Loss, parameters: Sequence[nn.Parameter]) -> float:
    """Between two losses of no batch, at parameters other than they are now, which are put back: the largest of values and of each
    gradient, as a share of the largest number there is."""
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


def _value_and_gradients(loss: Loss, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    value = loss()
    return [part.detach().clone() for part in (value, *torch.autograd.grad(value, parameters))]


def _signs(parameter: Tensor) -> Tensor:
    """1, -1, 1, ... in the parameter's shape."""
    places = torch.arange(parameter.numel(), device=parameter.device) % 2
    return (1 - 2 * places).to(parameter.dtype).view_as(parameter)

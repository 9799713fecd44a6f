"""What follows a frozen tower: one linear map per task, those of finished tasks added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cairn.maths.similarity import unit


class UnitLength(nn.Module):
    """x -> x / |x|."""

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return unit(x)


class Projector(nn.Module):
    """x -> unit(x + sum_b G_b x), G_b trained on task b from zero; those of finished tasks are one matrix [P]."""

    finished: Tensor

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("finished", torch.zeros(d, d))
        self.current = nn.Parameter(torch.zeros(d, d))

    def grow(self) -> None:
        """The current task's map joins the finished ones; a new one starts at zero."""
        self.finished += self.current.detach()
        self.current = nn.Parameter(torch.zeros_like(self.finished))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return unit(x + x @ (self.finished + self.current).T)


class Projectors(nn.ModuleDict):
    """A projector for each name."""

    def __init__(self, d: int, names: Iterable[str]):
        super().__init__({name: Projector(d) for name in names})

    def __getitem__(self, key: str) -> Projector:
        return cast(Projector, super().__getitem__(key))

    def grow(self) -> None:
        """Those of the next task."""
        for name in self:
            self[name].grow()

    @property
    def current(self) -> list[nn.Parameter]:
        """What is trained in this task."""
        return [self[name].current for name in self]

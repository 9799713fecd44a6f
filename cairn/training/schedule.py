"""How a stage is optimised: settings, optimiser, learning rate, and the average of the weights along the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class Schedule(BaseModel):
    """A stage's optimisation. The learning rate rises linearly, then falls by a half cosine, or in steps, or stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=1, ge=0, description="passes over the task's images")
    batch: int = Field(default=128, ge=1, description="rows per step")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="adamw, adam or sgd (momentum 0.9)")
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    cosine: bool = Field(default=True, description="half-cosine decay to zero")
    milestones: tuple[int, ...] = Field(
        default=(), description="epochs after which the learning rate falls to a tenth, in place of the cosine"
    )
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")

    def optimiser(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        match self.optimizer:
            case "adamw":
                return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
            case "adam":
                return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
            case "sgd":
                return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`, as a share of the peak, in (0, 1]."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        if self.milestones:
            return 0.1 ** sum(step * self.epochs >= steps * epoch for epoch in self.milestones)
        if not self.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class BetaAverage:
    """theta_bar = sum_t a_t theta_t / sum_t a_t with a_t = Beta(beta, beta) at (t + .5) / (T + 1), t = 0 the start.

    With beta < 1 the first and the last weights count most: the pretrained model and the tuned one.
    Source: Shu et al., CLIPood (2023), section 3.3.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], beta: float):
        self.parameters, self.beta = list(parameters), beta
        self.sum = [torch.zeros_like(p) for p in self.parameters]
        self.start = [p.detach().clone() for p in self.parameters]
        self.weight = 0.0

    def update(self, step: int, steps: int) -> None:
        """After the step with index `step` of `steps`."""
        if step == 0:
            self._add(self.start, 0, steps)
        self._add(self.parameters, step + 1, steps)

    def _add(self, values: Sequence[torch.Tensor], t: int, steps: int) -> None:
        x = (t + 0.5) / (steps + 1)
        density = (x * (1 - x)) ** (self.beta - 1)
        self.weight += density
        for total, value in zip(self.sum, values, strict=True):
            total.add_(value.detach(), alpha=density)

    def apply(self) -> None:
        """Put the average into the parameters. There must have been a step."""
        for parameter, total in zip(self.parameters, self.sum, strict=True):
            parameter.data.copy_(total / self.weight)

    def state(self) -> dict[str, torch.Tensor]:
        sums = {f"sum-{i}": total.cpu() for i, total in enumerate(self.sum)}
        return {"weight": torch.tensor(self.weight, dtype=torch.float64)} | sums

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.weight = float(state["weight"])
        for i, total in enumerate(self.sum):
            total.copy_(state[f"sum-{i}"])

"""How a stage is optimised: settings, optimiser and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field


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

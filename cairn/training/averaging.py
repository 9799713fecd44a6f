"""Averages of weights along a trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


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

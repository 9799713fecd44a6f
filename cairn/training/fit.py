"""The one training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cairn.errors import NotFinite
from cairn.training.log import Log
from cairn.training.schedule import Schedule
from cairn.training.seeds import Seeds


class Batches(Protocol):
    """A source of batches: `(inputs, labels)` pairs."""

    def __len__(self) -> int:
        """Steps per epoch."""
        ...

    def epochs(self, rngs: Sequence[torch.Generator]) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """One pass for each generator, which alone decides its order and draws."""
        ...


def fit(
    loss: Callable[[Tensor, Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    batches: Batches,
    schedule: Schedule,
    seeds: Seeds,
    log: Log,
    *,
    after_step: Callable[[int, int], Any] | None = None,
) -> None:
    """Minimise the mean of `loss(inputs, labels)` over the batches.

    Epoch e draws its order from `seeds.at(epoch=e)`. `after_step(step, steps)` runs after each update.
    Raises NotFinite, naming the step, if a loss is not a number; the parameters then are those of the step before.
    """
    parameters = list(parameters)
    steps = schedule.epochs * len(batches)
    if not parameters or not steps:
        return
    optimiser = schedule.optimiser(parameters)
    step, waited, start = 0, 0.0, time.perf_counter()
    rngs = [seeds.at(epoch=epoch).generator("batches") for epoch in range(schedule.epochs)]
    for epoch, source in enumerate(batches.epochs(rngs)):
        seen, total, began = 0, 0.0, time.perf_counter()
        mark = began
        for inputs, labels in source:
            waited += time.perf_counter() - mark
            for group in optimiser.param_groups:
                group["lr"] = schedule.lr * schedule.factor(step, steps)
            value = loss(inputs, labels)
            if not torch.isfinite(value):
                raise NotFinite(
                    f"{log.place}, epoch {epoch}, step {step}: the loss is {value.item()}; lower the learning rate"
                )
            optimiser.zero_grad()
            value.backward()
            clip_grad_norm_(parameters, schedule.clip)
            optimiser.step()
            if after_step is not None:
                after_step(step, steps)
            step, seen, total = step + 1, seen + len(labels), total + value.item() * len(labels)
            mark = time.perf_counter()
            log.progress(
                epoch=epoch, epochs=schedule.epochs, step=step, steps=steps, loss=total / seen,
                rate=seen / (mark - began), remaining=(mark - start) / step * (steps - step),
            )  # fmt: skip
        log(
            "epoch", epoch=epoch, loss=total / max(1, seen), rows=seen,
            seconds=time.perf_counter() - began, waited=waited,
        )  # fmt: skip
        waited = 0.0

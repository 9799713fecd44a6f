"""Batches that mix the features of a task with draws from what is kept of old classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cairn.maths.similarity import unit
from cairn.memory.protocol import ClassMemory

AHEAD_VALUES = 2**25
"""Numbers in the draws that are made for several epochs at once, 128 MiB: a class's factor then serves all of them."""


class ReplayBatches:
    """Real rows of the current task and pseudo-features of old classes; with `sphere` these are brought to length 1.

    An epoch shows each real row once. Of every batch, `real_share` is real; None gives each class the same share. A batch
    that has both kinds has at least one row of each, so one of `batch` = 1 has two. The drawn part has its labels balanced
    over the classes of `memory` and is drawn anew each epoch. With no memory or a share of 1, all is real; with a share of 0,
    all is drawn and an epoch is as long as the real rows would make it.

    With a `device` batches lie there: real rows are copied once, and once per epoch the random numbers that draws are made of there.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        memory: ClassMemory,
        *,
        batch: int,
        real_share: float | None,
        sphere: bool = True,
        device: torch.device | None = None,
    ):
        self.device = device or features.device
        self.features, self.labels = features.to(self.device), labels.to(device or labels.device)
        self.memory, self.sphere = memory, sphere
        old = memory.classes
        if real_share is None:
            present = len(torch.unique(labels))
            real_share = present / (present + old)
        share = 1.0 if old == 0 else real_share
        if share in (0.0, 1.0):
            self.real = round(share * batch)
            self.drawn = batch - self.real
        else:
            self.real = min(max(1, round(share * batch)), max(1, batch - 1))
            self.drawn = max(1, batch - self.real)

    def __len__(self) -> int:
        return -(-len(self.features) // (self.real or self.drawn))

    def epoch(self, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return next(self.epochs([rng]))

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """One epoch for each generator, which alone decides what it holds. Of the first one, `skip` batches are left out."""
        per_class = -(-len(self) * self.drawn // max(1, self.memory.classes))
        rows = per_class * self.memory.classes
        ahead = max(1, AHEAD_VALUES // max(1, rows * self.features.shape[1]))
        for start in range(0, len(rngs), ahead):
            some = rngs[start : start + ahead]
            orders = [torch.randperm(len(self.features), generator=rng).to(self.device) for rng in some]
            if not rows:
                yield from (self._batches(order, 0 if start + i else skip) for i, order in enumerate(orders))
                continue
            drawn, names = self.memory.draws(per_class, some, device=self.device)
            for i, (rng, order) in enumerate(zip(some, orders, strict=True)):
                mixed = torch.randperm(rows, generator=rng).to(self.device)
                pseudo = drawn.pop(0)
                pseudo = unit(pseudo) if self.sphere else pseudo
                there = pseudo[mixed], names[mixed].to(self.labels.device)
                yield self._batches(order, 0 if start + i else skip, there)

    def _batches(
        self, order: Tensor, skip: int, replayed: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(skip, len(self)):
            picked = order[step * self.real : (step + 1) * self.real]
            x, y = self.features[picked], self.labels[picked]
            if replayed is not None:
                rows = slice(step * self.drawn, (step + 1) * self.drawn)
                x, y = (torch.cat([own, old[rows]]) for own, old in zip((x, y), replayed, strict=True))
            yield x, y

"""Batches that mix the features of a task with draws from what is kept of old classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cairn.maths.similarity import unit
from cairn.memory.protocol import ClassMemory


class ReplayBatches:
    """Real rows of the current task and pseudo-features of old classes, on the unit sphere.

    An epoch shows each real row once. Of every batch, `real_share` is real; None gives each class the same share. The
    drawn part has its labels balanced over the classes of `memory` and is drawn anew each epoch. With no memory, all is
    real; with a share of 0, all is drawn and an epoch is as long as the real rows would make it.
    """

    def __init__(self, features: Tensor, labels: Tensor, memory: ClassMemory, *, batch: int, real_share: float | None):
        self.features, self.labels, self.memory = features, labels, memory
        old = memory.classes
        if real_share is None:
            present = len(torch.unique(labels))
            real_share = present / (present + old)
        share = 1.0 if old == 0 else real_share
        self.real = min(batch, round(share * batch)) if share == 0 else max(1, round(share * batch))
        self.drawn = batch - self.real if old else 0

    def __len__(self) -> int:
        return -(-len(self.features) // (self.real or self.drawn))

    def epoch(self, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.features), generator=rng)
        steps = len(self)
        if self.drawn:
            per_class = -(-steps * self.drawn // self.memory.classes)
            pseudo, names = self.memory.draw(per_class, rng)
            mixed = torch.randperm(len(names), generator=rng)
            pseudo, names = unit(pseudo)[mixed], names[mixed]
        for step in range(steps):
            picked = order[step * self.real : (step + 1) * self.real]
            x, y = self.features[picked], self.labels[picked]
            if self.drawn:
                rows = slice(step * self.drawn, (step + 1) * self.drawn)
                x, y = torch.cat([x, pseudo[rows]]), torch.cat([y, names[rows]])
            yield x, y

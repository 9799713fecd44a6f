"""SimpleCIL: a frozen image tower, class means, cosine.

Source: Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models (2023), section 4.1.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.similarity import unit
from cairn.methods.protocol import FROZEN
from cairn.towers.protocol import Towers
from cairn.towers.state import State
from cairn.training.checkpoint import Checkpoint
from cairn.training.encode import encoded
from cairn.training.log import Log
from cairn.types import Features, Pixels, Scores


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SimpleCIL:
    """argmax_c s cos(f(x), p_c), p_c the mean embedding of the class's training images."""

    encoder = FROZEN

    def __init__(self, towers: Towers, config: Config, *, seed: int, log: Log):
        self.towers, self.log = towers, log
        self.prototypes = torch.zeros(0, towers.dim)
        self.counts = torch.zeros(0, dtype=torch.int64)

    @property
    def memory_bytes(self) -> int:
        return self.prototypes.nbytes + self.counts.nbytes

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
        z, y = encoded(loader, lambda pixels, _: self.towers.image(pixels), checkpoint, "Z")
        new = task.classes.stop - len(self.counts)
        p = torch.cat([self.prototypes, torch.zeros(new, self.towers.dim)])
        n = torch.cat([self.counts, torch.zeros(new, dtype=torch.int64)])
        for c in y.unique().tolist():
            own = z[y == c]
            # p_c + (mean of the new - p_c) times their share: for a new class the mean itself
            n[c] += len(own)
            p[c] += (own.mean(0) - p[c]) * (len(own) / n[c])
        self.prototypes, self.counts = p, n

    def forget(self, c: int) -> None:
        p, n = self.prototypes, self.counts
        self.prototypes, self.counts = torch.cat([p[:c], p[c + 1 :]]), torch.cat([n[:c], n[c + 1 :]])

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def scores(self, features: Features) -> Scores:
        return self.towers.logit_scale * unit(features) @ unit(self.prototypes.to(features.device)).T

    def state_dict(self) -> State:
        return {"prototypes": self.prototypes, "counts": self.counts}

    def load_state_dict(self, state: State) -> None:
        self.prototypes, self.counts = state["prototypes"], state["counts"]

"""SimpleCIL: a frozen image tower, class means, cosine.

Source: Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models (2023), section 4.1.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from cairn.data.loading import Loader, encoded
from cairn.data.stream import Task
from cairn.maths.similarity import unit
from cairn.towers.protocol import Towers
from cairn.towers.state import State
from cairn.training.log import Log
from cairn.types import Features, Pixels, Scores


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SimpleCIL:
    """argmax_c cos(f(x), p_c), p_c the mean embedding of the class's training images."""

    encoder = "frozen"

    def __init__(self, towers: Towers, config: Config, *, seed: int, log: Log):
        self.towers, self.log = towers, log
        self.prototypes = torch.zeros(0, towers.dim)

    @property
    def memory_bytes(self) -> int:
        return self.prototypes.numel() * self.prototypes.element_size()

    def learn(self, task: Task) -> None:
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
        z, y = encoded(loader, self.towers.image)
        means = torch.stack([z[y == c].mean(0) for c in task.classes])
        self.prototypes = torch.cat([self.prototypes, means])

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def scores(self, features: Features) -> Scores:
        return unit(features) @ unit(self.prototypes.to(features.device)).T

    def state_dict(self) -> State:
        return {"prototypes": self.prototypes}

    def load_state_dict(self, state: State) -> None:
        self.prototypes = state["prototypes"]

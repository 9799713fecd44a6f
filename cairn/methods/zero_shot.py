"""Zero-shot CLIP: the class texts, and nothing learned. The floor of every table.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.1.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from cairn.data.stream import Task
from cairn.maths.similarity import unit
from cairn.methods.protocol import FROZEN, CosineForm
from cairn.towers.protocol import Towers
from cairn.towers.state import State
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
from cairn.types import Features, Pixels, Scores


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ZeroShot:
    """argmax_c s cos(f(x), t_c), t_c the mean of the templates' texts."""

    encoder = FROZEN
    memory_bytes = 0

    def __init__(self, towers: Towers, config: Config, *, seed: int, log: Log):
        self.towers, self.config = towers, config
        self.texts = torch.zeros(0, towers.dim)

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        if task.names:
            self.texts = torch.cat([self.texts, self.towers.class_texts(task.names, task.templates).cpu()])

    def forget(self, c: int) -> None:
        self.texts = torch.cat([self.texts[:c], self.texts[c + 1 :]])

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    @property
    def class_matrix(self) -> Features:
        """t_c, one unit row per class."""
        return self.texts

    def cosine_form(self) -> CosineForm:
        return CosineForm(self.towers.vision(), self.class_matrix)

    def scores(self, features: Features) -> Scores:
        return self.towers.logit_scale * unit(features) @ self.class_matrix.to(features.device).T

    def state_dict(self) -> State:
        return {"texts": self.texts}

    def load_state_dict(self, state: State) -> None:
        self.texts = state["texts"]

"""Zero-shot CLIP: the class texts, and nothing learned. The floor of every table.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.1.
"""

from __future__ import annotations

import torch

from cairn.data.task import Task
from cairn.maths.rows import replaced, without
from cairn.methods.protocol import FROZEN, Card, CosineScoring, KeepsSums, LearnsOnline, NamesClasses
from cairn.settings import NoSettings
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.types import Features, Labels, Pixels, State


class ZeroShot(CosineScoring, KeepsSums, LearnsOnline, NamesClasses):
    """argmax_c s cos(f(x), t_c), t_c the mean of the templates' texts."""

    card = Card(
        title="Zero-shot CLIP",
        source="Radford et al. 2021",
        citation="Radford et al. Learning Transferable Visual Models From Natural Language Supervision. ICML 2021. "
        "arXiv 2103.00020.",
        stages=("class texts from templates",),
        trains="nothing",
        keeps="nothing",
        needs="class names that the towers know",
        passes="none",
        text=True,
    )

    encoder = FROZEN
    memory_bytes = 0

    def __init__(self, towers: Towers, config: NoSettings, *, seed: int):
        self.towers, self.config = towers, config
        self.texts = torch.zeros(0, towers.dim)

    def learn(self, task: Task, ctx: Context) -> None:
        if task.names:
            self.texts = torch.cat([self.texts, self.towers.class_texts(task.names, task.templates).cpu()])

    def forget(self, c: int) -> None:
        self.texts = without(self.texts, c)

    def unlearn(self, features: Features, labels: Labels) -> None:
        """Nothing was learned of them."""

    def merge(self, c: int, other: int) -> None:
        self.texts = without(self.texts, other)

    def rename(self, c: int, named: Task, log: Log) -> None:
        self.texts = replaced(self.texts, c, self.towers.class_texts(named.names, named.templates))

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    @property
    def class_matrix(self) -> Features:
        return self.texts

    def state_dict(self) -> State:
        return {"texts": self.texts}

    def load_state_dict(self, state: State) -> None:
        self.texts = state["texts"]

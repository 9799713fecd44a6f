"""What the methods with two decoupled stages hold between tasks: an image encoder, class texts, class Gaussians."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.parts.stages import class_anchors
from cairn.methods.protocol import CosineScoring, GaussianScoring
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context
from cairn.training.encode import Ordered, encode
from cairn.training.seeds import Seeds
from cairn.types import Features, Labels, Pixels


class TwoStageState(CosineScoring, GaussianScoring[GaussianMemory]):
    """State, scores and their storage; what `learn` does is the method's own.

    Scores are s cos(f(x), t_c), t_c the learned class text with `config.template_weight` of the template text in it.
    """

    def __init__(self, towers: Towers, config: Any, *, seed: int):
        self.towers, self.config = towers, config
        self.image = ImageEncoder(towers, config.stage1.tuning, Seeds(seed).generator("encoder"))
        self.texts = config.stage2.text.build(towers).to(towers.device)
        self.anchors = torch.zeros(0, towers.dim)
        self.memory = config.memory(towers.dim)
        self._class_texts = self.anchors

    @property
    def encoder(self) -> str:
        return f"vision-{self.image.version}"

    def add_texts(self, task: Task, loader: Loader, ctx: Context) -> None:
        """The template texts of new classes, and the learned ones, which start from them."""
        new = class_anchors(self.towers, task, loader, ctx.log)
        self.anchors = torch.cat([self.anchors, new.cpu()])
        if task.names:
            self.texts.grow(task.names, new, ctx.seeds.generator("texts"))

    def features(self, batches: Ordered, ctx: Context | None = None, name: str = "") -> tuple[Features, Labels]:
        """Unit features and labels of a collection under the encoder as it stands; one pass, called `name`."""
        with self.image.inference():
            z, y = encode(batches, lambda z, _: z, ctx, name, embed=self.embed)
        return unit(z), y

    @torch.no_grad()
    def cache_texts(self) -> None:
        """Keep the class texts as they stand; scoring uses these."""
        w = self.config.template_weight
        self._class_texts = unit((1 - w) * self.texts().cpu() + w * self.anchors)

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.memory = self.memory.without(c)
        self.texts.forget(c)
        self._class_texts = without(self._class_texts, c)

    def embed(self, pixels: Pixels) -> Features:
        return self.image(pixels)

    @property
    def class_matrix(self) -> Features:
        return self._class_texts

    def vision(self) -> nn.Module:
        return copy.deepcopy(self.image.module)

    def state_dict(self) -> State:
        parts = {"image": self.image.state_dict(), "texts": self.texts.state(), "memory": self.memory.state_dict()}
        return {"anchors": self.anchors} | flattened(parts)

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.image.load_state_dict(part(state, "image"))
        self.texts.restore(part(state, "texts"))
        self.memory = self.memory.restored(part(state, "memory"))
        if len(self.anchors):
            self.cache_texts()

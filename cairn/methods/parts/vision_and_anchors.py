"""What the methods that train vision hold between tasks: an image encoder, and the template text of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.rows import without
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import CosineScoring, NamesClasses
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds
from cairn.types import Features, Pixels


class VisionAndAnchors(CosineScoring, NamesClasses):
    """f(x), trained, and t_c, the unit template texts; what is learned, and the class matrix, are the method's own."""

    def __init__(self, towers: Towers, config: Any, *, seed: int):
        self.towers, self.config = towers, config
        self.image = ImageEncoder(towers, config.stage1.tuning, Seeds(seed).generator("encoder"))
        self.anchors = torch.zeros(0, towers.dim)

    @property
    def encoder(self) -> str:
        return f"vision-{self.image.version}"

    def add_anchors(self, task: Task, loader: Loader, ctx: Context) -> Features:
        """The template texts of the task's new classes, which are kept."""
        new = class_anchors(self.towers, task, loader, ctx.log)
        self.anchors = torch.cat([self.anchors, new.cpu()])
        return new

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text. What vision was trained to, with the old one for its anchor, stays."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)

    def embed(self, pixels: Pixels) -> Features:
        return self.image(pixels)

    def vision(self) -> nn.Module:
        return self.image.copied()

    def state_dict(self) -> State:
        return {"anchors": self.anchors} | flattened({"image": self.image.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.image.load_state_dict(part(state, "image"))

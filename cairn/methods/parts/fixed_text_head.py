"""What the methods that only train vision against fixed class texts hold between tasks: an image encoder and those texts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.losses import class_cross_entropy
from cairn.maths.rows import without
from cairn.methods.parts.stages import align_vision, class_anchors
from cairn.methods.protocol import CosineScoring
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context
from cairn.training.seeds import Seeds
from cairn.types import Features, Labels, Pixels


class FixedTextHead(CosineScoring):
    """argmax_c s cos(f_b(x), t_c), f_b trained by `config.stage1` on one task after the other, t_c never."""

    memory_bytes = 0

    def __init__(self, towers: Towers, config: Any, *, seed: int):
        self.towers, self.config = towers, config
        self.image = ImageEncoder(towers, config.stage1.tuning, Seeds(seed).generator("encoder"))
        self.anchors = torch.zeros(0, towers.dim)

    @property
    def encoder(self) -> str:
        return f"vision-{self.image.version}"

    def learn(self, task: Task, ctx: Context) -> None:
        stage = self.config.stage1
        ctx = ctx.at(task=task.index).at(stage=1)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=stage.schedule.batch)
        new = class_anchors(self.towers, task, loader, ctx.log).cpu()
        self.anchors = torch.cat([self.anchors, new])
        s = self.towers.logit_scale
        align_vision(stage, self.image, self.anchors, loader, s, self.loss, ctx)

    def loss(self, z: Features, T: Features, y: Labels, s: float) -> Tensor:
        """CE(s z T^T, y), unless a method has its own."""
        return class_cross_entropy(z, T, y, s)

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)

    def embed(self, pixels: Pixels) -> Features:
        return self.image(pixels)

    @property
    def class_matrix(self) -> Features:
        return self.anchors

    def vision(self) -> nn.Module:
        return copy.deepcopy(self.image.module)

    def state_dict(self) -> State:
        return {"anchors": self.anchors} | flattened({"image": self.image.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.image.load_state_dict(part(state, "image"))

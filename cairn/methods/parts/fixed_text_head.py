"""The methods that train vision alone, against fixed class texts."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.losses import class_cross_entropy
from cairn.methods.parts.stages import align_vision, behind_trunk
from cairn.methods.parts.two_stage import VisionAndAnchors
from cairn.training.context import Context
from cairn.types import Features, Labels


class FixedTextHead(VisionAndAnchors):
    """argmax_c s cos(f_b(x), t_c), f_b trained by `config.stage1` on one task after the other, t_c never."""

    memory_bytes = 0

    def learn(self, task: Task, ctx: Context) -> None:
        stage = self.config.stage1
        ctx = ctx.at(task=task.index).at(stage=1)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=stage.schedule.batch)
        self.add_anchors(task, loader, ctx)
        s = self.towers.logit_scale
        align_vision(stage, self.image, self.anchors, behind_trunk(loader, self.image, ctx), s, self.loss, ctx)

    def loss(self, z: Features, T: Float[Tensor, "k d"], y: Labels, s: float) -> Tensor:
        """CE(s z T^T, y), unless a method has its own."""
        return class_cross_entropy(z, T, y, s)

"""What the methods with two decoupled stages hold between tasks: an image encoder, class texts, class Gaussians."""

from __future__ import annotations

from typing import Any

import torch

from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.parts.prior import PriorWeight
from cairn.methods.parts.stages import TextPrior, VisionPrior, rename_text
from cairn.methods.parts.vision_and_anchors import VisionAndAnchors
from cairn.methods.protocol import GaussianScoring
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.training.context import Context
from cairn.training.encode import Ordered, encode
from cairn.training.log import Log
from cairn.types import Features, Labels


class TwoStageState(VisionAndAnchors, GaussianScoring[GaussianMemory]):
    """State, scores and their storage; what `learn` does is the method's own.

    Scores are s cos(f(x), t_c), t_c the learned class text with `config.template_weight` of the template text in it.
    """

    def __init__(self, towers: Towers, config: Any, *, seed: int):
        super().__init__(towers, config, seed=seed)
        self.texts = config.stage2.text.build(towers).to(towers.device)
        self.memory = config.memory(towers.dim)
        self.prior_weight = PriorWeight(config.prior)
        self._class_texts = self.anchors

    def add_texts(self, task: Task, loader: Loader, ctx: Context) -> None:
        """The template texts of new classes, and the learned ones, which start from them."""
        new = self.add_anchors(task, loader, ctx)
        if task.names:
            self.texts.grow(task.names, new, ctx.seeds.generator("texts"))

    def vision_prior(self, labels: Labels) -> VisionPrior:
        """Of stage 1 of a task with these labels, before its Gaussians are in the memory."""
        return VisionPrior(self.prior_weight.so_far(labels, self.memory.counts), self.towers.image)

    def text_prior(self) -> TextPrior:
        """Of stage 2."""
        return TextPrior(self.prior_weight, self.anchors)

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
        super().forget(c)
        self.memory = self.memory.without(c)
        self.texts.forget(c)
        self._class_texts = without(self._class_texts, c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        super().rename(c, named, log)
        rename_text(self.texts, c, named, self.anchors[c], log)
        self.cache_texts()

    @property
    def class_matrix(self) -> Features:
        return self._class_texts

    def state_dict(self) -> State:
        parts = {
            "texts": self.texts.state(),
            "memory": self.memory.state_dict(),
            "prior": self.prior_weight.state_dict(),
        }
        return super().state_dict() | flattened(parts)

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.texts.restore(part(state, "texts"))
        self.memory = self.memory.restored(part(state, "memory"))
        self.prior_weight.load_state_dict(part(state, "prior"))
        if len(self.anchors):
            self.cache_texts()

"""What methods hold between tasks that train vision: an image encoder, and the template text of each class; those with two
decoupled stages also class texts that are learned, and class Gaussians."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.parts.prior import PriorWeight
from cairn.methods.parts.stages import TextPrior, VisionPrior, class_anchors, rename_text, renamed_anchors
from cairn.methods.protocol import CosineScoring, GaussianScoring, NamesClasses, TunesImageTower
from cairn.towers.protocol import Towers
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context, Log, Seeds
from cairn.training.encode import Ordered, encode
from cairn.types import Features, Labels, Pixels, State, flattened, part


@runtime_checkable
class TrainedImageSide(Protocol):
    """An image side f that is trained."""

    def __call__(self, pixels: Pixels) -> Features: ...

    def copied(self) -> nn.Module:
        """A copy that shares nothing with it."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


Image = TypeVar("Image", bound=TrainedImageSide)


class TrainedVision(CosineScoring, NamesClasses, Generic[Image]):
    """f(x), the method's own, and t_c, the unit template texts, which are the class matrix unless a method has another."""

    def __init__(self, towers: Towers, config: Any, image: Image):
        self.towers, self.config, self.image = towers, config, image
        self.anchors = torch.zeros(0, towers.dim)

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

    @property
    def class_matrix(self) -> Features:
        return self.anchors

    def state_dict(self) -> State:
        return {"anchors": self.anchors} | flattened({"image": self.image.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.image.load_state_dict(part(state, "image"))


class VisionAndAnchors(TrainedVision[ImageEncoder], TunesImageTower):
    """The same with an `ImageEncoder`, tuned as stage 1 of the settings says."""

    def __init__(self, towers: Towers, config: Any, *, seed: int):
        tuned = ImageEncoder(towers, config.stage1.tuning, Seeds(seed).generator("encoder"))
        super().__init__(towers, config, tuned)

    @property
    def encoder(self) -> str:
        return f"vision-{self.image.version}"


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

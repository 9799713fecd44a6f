"""The two stages that the methods of this family are made of, each modality trained against the other as it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.losses import class_cross_entropy, mean_squared_distance, text_anchor_contrast
from cairn.maths.rows import replaced
from cairn.maths.similarity import unit
from cairn.memory.protocol import ClassMemory
from cairn.memory.replay import ReplayBatches
from cairn.methods.parts.prior import PriorWeight
from cairn.settings import Settings, kind_by_name
from cairn.towers.prompts import ClassText, FixedTexts, Prompts, Residual, SoftPrompts
from cairn.towers.protocol import Towers, TrunkOutput
from cairn.towers.tuning import Adapter, Full, ImageEncoder, Lora, Tuning
from cairn.training.context import Context, Log
from cairn.training.encode import encode
from cairn.training.fit import BetaAverage, Schedule, fit
from cairn.types import Features, Pixels

TRUNK_BYTES = 2 << 30
"""What the frozen blocks of a tower made of a task's images, held while the task is learned."""

Loss = Callable[[Float[Tensor, "n d"], Float[Tensor, "k d"], Int[Tensor, " n"], float], Float[Tensor, ""]]
"""Of unit images z, unit class texts T, labels y and the scale s."""


class VisionStage(Settings):
    """Stage 1: the vision side moves, the class texts are its anchor."""

    tuning: Tuning = Field(
        default=Lora(), description="what is trained: lora, full, projection, adapter or none [I; K: MG-CLIP]"
    )
    classes: Literal["current", "seen"] = Field(
        default="current",
        description="classes in the softmax: the task's, or all seen [I; K: MG-CLIP, SLCA for the first]",
    )
    text_anchor_contrast: float = Field(
        default=0.0, ge=0, description="weight of texts against the batch's images [K: TPPT-V]"
    )
    average: float | None = Field(
        default=None,
        gt=0,
        description="beta of the Beta(beta, beta) average over the stage; null: `full` has its own, others none",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=2, batch=128, lr=2e-4),
        description="optimisation [K: 1-2 epochs, at 1e-3; ours is gentler]",
    )

    _kinds = field_validator("tuning", mode="before")(kind_by_name)

    @classmethod
    def embedding(cls) -> VisionStage:
        """The form that needs no image tower."""
        return cls(tuning=Adapter(), schedule=Schedule(epochs=10, batch=128, lr=1e-4))


BOUND = VisionStage(
    tuning=Lora(rank=16, alpha=16.0, targets=r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
    classes="seen",
    schedule=Schedule(epochs=2, batch=64, lr=2e-3),
)
"""How both bounds, `finetune` and `joint`, train the vision encoder: every linear layer, every class seen."""


class TextStage(Settings):
    """Stage 2: the text side moves, the vision side stands; old classes are replayed from their Gaussians."""

    text: ClassText = Field(default=Residual(), description="what is trained: prompts, residual or templates (nothing)")
    real_share: float | None = Field(
        default=None, ge=0, le=1, description="share of real rows in a batch; null: each class the same share [I]"
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=128, lr=0.2), description="optimisation; lr in units of 1/s [I]"
    )
    cuda_graph: bool = Field(
        default=False,
        description="on a CUDA device, the loss of a step and its gradient are one launch each; the same numbers, sooner",
    )

    _kinds = field_validator("text", mode="before")(kind_by_name)


def class_anchors(towers: Towers, task: Task, loader: Loader, log: Log) -> Float[Tensor, "k d"]:
    """Unit texts of the task's classes; where the towers have none, the unit means of their training embeddings [I]."""
    if not task.names:
        return torch.zeros(0, towers.dim)
    if towers.has_text:
        return towers.class_texts(task.names, task.templates)
    if task.index == 0:
        log("notice", text="no text_features in the file: class means of the frozen embeddings stand in as anchors")
    z, y = encode(loader, lambda pixels, _: towers.image(pixels))
    return unit(torch.stack([unit(z[y == c]).mean(0) for c in task.classes]))


def renamed_anchors(anchors: Float[Tensor, "k d"], c: int, towers: Towers, named: Task) -> Float[Tensor, "k d"]:
    """With the unit text of the class of `named` for class c. A mean that stands in for a text has nothing of the name."""
    return replaced(anchors, c, towers.class_texts(named.names, named.templates)) if towers.has_text else anchors


def rename_text(texts: FixedTexts | SoftPrompts, c: int, named: Task, anchor: Float[Tensor, " d"], log: Log) -> None:
    """The learned text of class c starts from the name of `named`, whose unit text is `anchor`; what was learned of it stays. A
    notice where all of it was."""
    (name,) = named.names
    if not texts.rename(c, name, anchor):
        log(
            "notice",
            text="the text of that class is one of a finished task: it stays what it was trained to, whatever the name",
        )


def competing(present: Int[Tensor, " j"], seen: int, log: Log) -> Int[Tensor, " i"]:
    """Numbers of the classes in a softmax over the `present` ones of a task, `seen` being known in all.

    A softmax over one class is 1 and has no gradient. Where a task has a single class, all classes seen stand in it [I]; where
    that is one class too, there is nothing to train. Both are said.
    """
    if len(present) > 1:
        return present
    if seen > 1:
        log("notice", text=f"one class in this task: all {seen} classes seen stand in the softmax of this stage")
    else:
        log("notice", text="one class, and no other to tell it from: the image encoder is not trained")
    return torch.arange(seen)


def as_tuned(
    encoder: ImageEncoder, schedule: Schedule, beta: float | None = None
) -> tuple[Schedule, BetaAverage | None]:
    """The schedule and the average over a stage in which the encoder is trained: `full` has some of its own."""
    if isinstance(encoder.tuning, Full):
        schedule = schedule.model_copy(update={"lr": encoder.tuning.lr})
        beta = encoder.tuning.average if beta is None else beta
    return schedule, None if beta is None else BetaAverage(encoder.parameters(), beta)


class BehindTrunk(Loader):
    """The batches of a loader, of what the trunk of an encoder made of its images in one pass, when the first batch is asked for.

    Every later pass and every epoch then begins behind the trunk. Rows are those of batches in order: in epochs they differ from those
    of whole passes by rounding. Where all of them would take more than `limit` bytes, batches are the loader's own.
    """

    def __init__(self, source: Loader, encoder: ImageEncoder, poll: Callable[[], object], limit: int):
        super().__init__(source.images, source._prepare, source._pixels, batch=source.batch, workers=source.workers)
        self.encoder, self.poll, self.limit, self.asked = encoder, poll, limit, False

    def _batches(self, batches: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for first in batches:
            if not self.asked:
                self.asked = True
                self._fill()
            yield from super()._batches(chain([first], batches))

    def _fill(self) -> None:
        kept, done, found = np.empty(0), 0, None
        for pixels, _ in self.ordered():
            found = self.encoder.trunk(pixels)
            if found.dtype != torch.float32 or len(self.labels) * found[0].nbytes > self.limit:
                return
            if not done:
                kept = np.empty((len(self.labels), *found.shape[1:]), dtype=np.float32)
            kept[done : done + len(found)] = found.rows.cpu().numpy()
            done += len(found)
            self.poll()
        if found is not None:
            self._kept, self._filled[:], self._pixels = kept, True, _placed(found.parts, found.device)


def _placed(parts: int, device: torch.device) -> Callable[[Tensor], TrunkOutput]:
    return lambda stack: TrunkOutput.of(stack.to(device, non_blocking=True), parts)


def behind_trunk(loader: Loader, encoder: ImageEncoder, ctx: Context) -> Loader:
    """The loader itself where nothing of the encoder stands still, or processes share batches out."""
    if not encoder.has_trunk or ctx.world.world_size > 1:
        return loader
    return BehindTrunk(loader, encoder, ctx.checkpoint.poll, TRUNK_BYTES)


class VisionPrior(NamedTuple):
    """That embeddings stay near those of `image`, the towers as they came (see `parts.prior`)."""

    weight: float
    image: Callable[[Pixels], Features]


def align_vision(
    stage: VisionStage,
    encoder: ImageEncoder,
    anchors: Float[Tensor, "k d"],
    batches: Loader,
    s: float,
    loss: Loss,
    ctx: Context,
    prior: VisionPrior | None = None,
) -> None:
    """Stage 1. Minimise loss(z, T, y, s) + w mean_i |z_i - z0_i|^2 over what is trainable of f, z = f(x) / |f(x)|, T fixed.

    T are the rows of `anchors` (all classes seen) that are in the softmax (see `competing`); w is the weight of `prior`, and
    z0 what the towers as they came make of the same images.
    Source: [P] for the stage; what it is made of is in docs/methods.md.
    """
    if not encoder.parameters() or not stage.schedule.epochs:
        return
    seen = torch.arange(len(anchors))
    classes = competing(batches.labels.unique() if stage.classes == "current" else seen, len(anchors), ctx.log)
    if len(classes) < 2:
        return
    T = anchors[classes].to(encoder.device)

    def vision_loss(pixels: Tensor, y: Tensor) -> Tensor:
        z, y = unit(encoder(pixels)), torch.searchsorted(classes, y).to(T.device)
        value = loss(z, T, y, s)
        if stage.text_anchor_contrast:
            value = value + stage.text_anchor_contrast * text_anchor_contrast(z, T, y, s)
        if prior and prior.weight:
            with torch.no_grad():
                z0 = unit(prior.image(pixels))
            value = value + prior.weight * mean_squared_distance(z, z0)
        return value

    schedule, average = as_tuned(encoder, stage.schedule, stage.average)
    fit(vision_loss, encoder.parameters(), batches, schedule, ctx, average=average, model=encoder)
    encoder.version += 1


class TextPrior(NamedTuple):
    """That class texts stay near `anchors`, the unit template texts of all classes seen (see `parts.prior`)."""

    weight: PriorWeight
    anchors: Float[Tensor, "k d"]


def align_text(
    stage: TextStage,
    texts: FixedTexts | SoftPrompts,
    features: Float[Tensor, "n d"],
    labels: Tensor,
    old: ClassMemory,
    s: float,
    loss: Loss,
    ctx: Context,
    prior: TextPrior | None = None,
) -> None:
    """Stage 2. Minimise loss(z, T, y, s) + w mean_c |t_c - a_c|^2 over what is trainable of T, all classes seen.

    z are the cached unit features of the task and unit draws from the Gaussians in `old`; w and a_c are those of `prior`.
    Source: [P]; the prior [K: KgCoOp].
    """
    schedule = stage.schedule
    if isinstance(stage.text, Prompts):
        schedule = schedule.model_copy(update={"lr": stage.text.lr})

    def train(rows: Tensor, weight: float, ctx: Context) -> None:
        if not (trained := texts.trainable()):
            return
        share, device = stage.real_share, trained[0].device
        T0 = prior.anchors.to(device) if prior and weight else None

        def text_loss(z: Tensor, y: Tensor) -> Tensor:
            T = texts()
            value = loss(z, T, y, s)
            return value if T0 is None else value + weight * mean_squared_distance(T, T0)

        real = features[rows], labels[rows]
        batches = ReplayBatches(*real, old, batch=schedule.batch, real_share=share, device=device)
        if stage.cuda_graph:
            from cairn.training.capture import Captured

            return fit(Captured(text_loss, trained, ctx.log), trained, batches, schedule, ctx)
        fit(text_loss, trained, batches, schedule, ctx)

    def left_out_loss(rows: Tensor) -> Tensor:
        T = texts()
        return class_cross_entropy(features[rows].to(T.device), T, labels[rows].to(T.device), s)

    weight = prior.weight.chosen(labels, old.counts, texts.trainable(), train, left_out_loss, ctx) if prior else 0.0
    train(torch.arange(len(labels)), weight, ctx)
    old.tell_repairs(ctx.log)

"""How sure a method may be of its classes: a temperature fitted on images that were left out of learning.

Scores of different methods are cosines times CLIP's scale, log densities or outputs of a regression; a softmax over them is
larger or smaller than the share of images that are classified correctly. After each task a second learner, the *rehearsal*,
learns the same task without a fifth of its images, and scores them among all classes seen. Their loss as a function of the
temperature (see `cairn.maths.calibration`) is added to that of the tasks before, and the temperature of the smallest sum
divides the scores wherever probabilities are made. Which class is the likeliest never changes, nor does anything learned.

The rehearsal takes over what the method already did with those images, as a learner that was cut off would: passes of a
tower, and what a tower was trained to (see `Checkpoint.handed_on`). Only what is fitted on embeddings is fitted anew. So an
encoder that is trained has seen the images that are left out, and a method that overfits there is surer than it should be.
A method that holds images out itself (`HoldsOut`) needs no rehearsal.

What is kept are sums over all images that were left out, a few hundred numbers however many tasks there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.calibration import INVERSE_TEMPERATURES, best_temperature, loss_curves
from cairn.methods.protocol import Method
from cairn.schema import Count, Record
from cairn.training.checkpoint import Checkpoint
from cairn.training.encode import encoded
from cairn.training.seeds import Seeds
from cairn.types import Labels, Scores

SHARE = 0.2
"""Of each class's images in a task, the share that is left out; of two or more always one."""

MOST = 512
"""Images of a task that are left out, at most."""

BATCH = 64


@runtime_checkable
class HoldsOut(Protocol):
    """A method that scores images of each task before it learns from them."""

    held_out: tuple[Scores, Labels] | None
    """Scores and labels of those of the task that was learned last."""


class Calibration(Record):
    """Losses of all images left out so far, on the grid of inverse temperatures. Immutable: `with_rows` returns another.

    Images scored among k classes weigh k / K where now there are K: how sure one may be among few classes tells less of many.
    """

    rows: Count = Field(0, description="images that were left out")
    classes: Count = Field(0, description="K, classes that the last of them were scored among")
    weight: float = Field(0.0, ge=0, description="weights of the images, summed")
    loss: list[float] = Field([], description="L: weighted losses of their labels, summed")
    runner_up: list[float] = Field([], description="R: those of the second likeliest classes")

    @model_validator(mode="after")
    def _one_loss_for_each_temperature(self) -> Calibration:
        length = len(INVERSE_TEMPERATURES) if self.rows else 0
        for name, losses in (("loss", self.loss), ("runner_up", self.runner_up)):
            if len(losses) != length:
                raise ValueError(f"{name}: {len(losses)} values of {self.rows} images, where there must be {length}")
        if (self.weight > 0) != (self.rows > 0):
            raise ValueError(f"weight: {self.weight} of {self.rows} images")
        return self

    @property
    def temperature(self) -> float:
        """What scores are divided by; 1 before any image was left out."""
        if not self.rows:
            return 1.0
        L, R = (torch.tensor(losses, dtype=torch.float64) for losses in (self.loss, self.runner_up))
        return best_temperature(L, R, self.weight)

    def with_rows(self, scores: Scores, labels: Labels) -> Calibration:
        """With these images, which were not learned from, scored among all classes seen."""
        if not len(labels):
            return self
        k, curves = scores.shape[1], loss_curves(scores.cpu(), labels.cpu())
        share = min(1.0, self.classes / k)
        held = (self.loss, self.runner_up) if self.rows else (0.0, 0.0)
        loss, runner_up = (
            (new + share * torch.as_tensor(old, dtype=torch.float64)).tolist()
            for new, old in zip(curves, held, strict=True)
        )
        return Calibration(
            rows=self.rows + len(labels), classes=k, weight=share * self.weight + len(labels), loss=loss,
            runner_up=runner_up,
        )  # fmt: skip


def recalibrated(
    calibration: Calibration,
    method: Method,
    before: Callable[[], Method],
    task: Task,
    seed: int,
    checkpoint: Checkpoint,
) -> Calibration:
    """With images of `task`, which `method` just learned. `before()` makes a method as it was before that."""
    if isinstance(method, HoldsOut):
        return calibration if method.held_out is None else calibration.with_rows(*method.held_out)
    out = left_out(task.train.labels, Seeds(seed).at(task=task.index).generator("calibration"))
    if not len(out):
        return calibration
    kept = np.setdiff1d(np.arange(len(task.train)), out)
    labels = np.asarray(task.train.labels)
    rehearsal = before()
    # Without a tower nothing is costly, and all of it is done anew
    with_tower = rehearsal.towers.has_images
    handed_on = checkpoint.handed_on(torch.from_numpy(kept), len(task.train)) if with_tower else None
    rehearsal.learn(replace(task, train=Subset(task.train, kept, labels[kept])), handed_on)
    towers, images = rehearsal.towers, Subset(task.train, out, labels[out])
    loader = Loader(images, towers.prepare, towers.pixels, batch=BATCH, cache_bytes=0)
    return calibration.with_rows(*encoded(loader, lambda pixels, _: rehearsal.scores(rehearsal.embed(pixels))))


def left_out(labels: np.ndarray, rng: torch.Generator) -> np.ndarray:
    """Rows of a SHARE of each class, MOST in all; classes of one image are passed over. In order."""
    chosen: list[Tensor] = []
    for c in np.unique(labels):
        rows = torch.from_numpy(np.flatnonzero(labels == c))
        number = max(1, round(SHARE * len(rows))) if len(rows) > 1 else 0
        chosen.append(rows[torch.randperm(len(rows), generator=rng)[:number]])
    rows = torch.cat(chosen)
    if len(rows) > MOST:
        rows = rows[torch.randperm(len(rows), generator=rng)[:MOST]]
    return rows.sort().values.numpy()

"""How sure a method may be of its classes: a temperature fitted on images that were left out of learning.

Scores of different methods are cosines times CLIP's scale, log densities or outputs of a regression; a softmax over them is
larger or smaller than the share of images that are classified correctly. After each task a second learner, the *rehearsal*,
learns the same task without a fifth of its images, and scores them among all classes seen. Their loss as a function of the
temperature (see `cairn.maths.calibration`) is added to that of the tasks before, and the temperature of the smallest sum
makes probabilities of scores wherever they are asked for. Which class is the likeliest never changes, nor does anything
learned.

The rehearsal takes over what the method already did with those images, as a learner that was cut off would: passes of a
tower, and what a tower was trained to (see `Checkpoint.handed_on`). Only what is fitted on embeddings is fitted anew. So an
encoder that is trained has seen the images that are left out, and a method that overfits there is surer than it should be.
A method that scores images as if it had not learned them by itself (`HoldsOut`, `LeavesOut`) needs no rehearsal.

What is kept are sums over all images that were left out, a few hundred numbers however many tasks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.calibration import INVERSE_TEMPERATURES, best_temperature, least_loss, log_probabilities, loss_curve
from cairn.maths.similarity import unit
from cairn.methods.protocol import GaussianScoring, HoldsOut, LeavesOut, Method
from cairn.storage.schema import Amount, Count, Record, Share
from cairn.training.context import Checkpoint, Context
from cairn.training.encode import encode
from cairn.types import Features, Labels, Scores

SHARE = 0.2
"""Of each class's images in a task, the share that is left out; of two or more always one."""

MOST = 512
"""Images of a task that are left out, at most."""

FOLDS = 5

DUPLICATE = 0.4
"""Frames of one video are closer to one another than later images of their class will be. See docs/calibration.md."""

BATCH = 64

POWER = 0.5
"""q of `cairn.maths.calibration`, chosen on training images kept apart; see docs/calibration.md."""

AGEING = 2
"""Images scored among k of today's K classes weigh (k / K)^AGEING: how sure one may be among few classes tells less of many.
Chosen as `POWER` was."""


class Calibration(Record):
    """Losses of all images left out so far, on the grid of inverse temperatures. Immutable: `with_images` returns another."""

    rows: Count = Field(default=0, description="images that were left out")
    classes: Count = Field(default=0, description="K, classes that the last of them were scored among")
    loss: list[float] = Field(default=[], description="L: weighted losses of their labels, summed")
    power: Share = Field(
        default=0.0, description="q of `cairn.maths.calibration`; 0: one temperature for all images, as it once was"
    )
    ageing: Amount = Field(default=1.0, description="exponent of the weights, see `AGEING`; once 1")

    @model_validator(mode="after")
    def _one_loss_for_each_temperature(self) -> Calibration:
        length = len(INVERSE_TEMPERATURES) if self.rows else 0
        if len(self.loss) != length:
            raise ValueError(f"loss: {len(self.loss)} values of {self.rows} images, where there must be {length}")
        return self

    @property
    def temperature(self) -> float:
        """T; 1 before any image was left out."""
        if not self.rows:
            return 1.0
        return best_temperature(torch.tensor(self.loss, dtype=torch.float64), least_loss(self.rows))

    def with_images(self, left_out: LeftOut | None) -> Calibration:
        """With these, scored among all classes seen."""
        if left_out is None or not len(left_out.labels):
            return self
        k, rows = left_out.scores.shape[1], self.rows + len(left_out.labels)
        power, ageing = (self.power, self.ageing) if self.rows else (POWER, AGEING)
        loss = loss_curve(left_out.scores.cpu(), left_out.labels.cpu(), power)
        if self.rows:
            loss += min(1.0, self.classes / k) ** ageing * torch.tensor(self.loss, dtype=torch.float64)
        return Calibration(rows=rows, classes=k, loss=loss.tolist(), power=power, ageing=ageing)

    def log_probabilities(self, scores: Scores) -> Scores:
        """Of every class, in float64; before any image was left out those of the softmax of the scores as they are."""
        return log_probabilities(scores.cpu(), self.temperature, self.power)


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class LeftOut:
    """Images of a task, scored by a method that learned the task without them."""

    scores: Scores
    labels: Labels
    method: Method | None = None
    rows: Features | None = None
    """What `method` remembers of them, where it keeps statistics (`GaussianScoring`)."""


def unlearned(method: Method, before: Callable[[], Method], task: Task, ctx: Context) -> LeftOut | None:
    """Images of `task`, which `method` just learned, scored without having been learned: by the method itself where it did
    so, else by a rehearsal. `before()` makes a method as it was before the task.

    None where there are too few images.
    """
    own = own_left_out(method)
    if own is not None or (isinstance(method, HoldsOut) and not task.unlabelled):
        return own
    return rehearsed(before, task, ctx)


def foreseen(method: Method, task: Task) -> LeftOut | None:
    """Images of a chunk of an online stream, scored before `method` learns it; those of classes that it does not know yet are
    passed over. None where there are none, and of a method that scores them by itself (`HoldsOut`, `LeavesOut`)."""
    labels = np.asarray(task.train.labels)
    rows = np.flatnonzero(labels < task.classes.start)
    if isinstance(method, (HoldsOut, LeavesOut)) or not len(rows):
        return None
    loader = Loader(
        Subset(task.train, rows, labels[rows]), method.towers.prepare, method.towers.pixels, batch=BATCH, cache_bytes=0
    )
    scores, y = encode(loader, lambda features, _: method.scores(features), embed=method.embed)
    return LeftOut(scores, y)


def own_left_out(method: Method) -> LeftOut | None:
    """Those that the method itself scored without having learned them, when it learned."""
    own = (
        method.held_out if isinstance(method, HoldsOut) else method.left_out if isinstance(method, LeavesOut) else None
    )
    return None if own is None else LeftOut(*own)


def rehearsed(before: Callable[[], Method], task: Task, ctx: Context) -> LeftOut | None:
    """Images left out of `task`; None where there are too few images to leave one out."""
    out = left_out_of(task, ctx)
    return _rehearsed_without(out, before, task, ctx) if len(out) else None


def _rehearsed_without(out: np.ndarray, before: Callable[[], Method], task: Task, ctx: Context) -> LeftOut:
    kept = np.setdiff1d(np.arange(len(task.train)), out)
    labels = np.asarray(task.train.labels)
    other = before()
    # Without a tower nothing is costly, and all of it is done anew
    with_tower = other.towers.has_images
    checkpoint = ctx.checkpoint.handed_on(torch.from_numpy(kept), len(task.train)) if with_tower else Checkpoint()
    other.learn(replace(task, train=Subset(task.train, kept, labels[kept])), Context(ctx.seeds, checkpoint=checkpoint))
    towers, images = other.towers, Subset(task.train, out, labels[out])

    def seen(features: Features, _: Labels) -> tuple[Tensor, ...]:
        rows = (other.memory_rows(features),) if isinstance(other, GaussianScoring) else ()
        return other.scores(features), *rows

    features = ctx.checkpoint.features_of(torch.from_numpy(out)) if with_tower else None
    if features is not None:
        y, features = torch.as_tensor(labels[out]), features.to(torch.device(towers.device))
        with torch.no_grad():
            found = [seen(rows, y) for rows in features.split(BATCH)]
        scores, *rows = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    else:
        loader = Loader(images, towers.prepare, towers.pixels, batch=BATCH, cache_bytes=0)
        scores, *rows, y = encode(loader, seen, embed=other.embed)
    return LeftOut(scores, y, other, *rows)


def rehearsed_in_folds(before: Callable[[], Method], task: Task, ctx: Context) -> Iterator[LeftOut]:
    """Every image of a task left out once, by FOLDS rehearsals, near-duplicates always together. The images are embeddings, or
    the checkpoint has kept the features of all of them."""
    z = ctx.checkpoint.features_of(torch.arange(len(task.train)))
    if z is None:
        z = torch.stack([torch.as_tensor(task.train[i]) for i in range(len(task.train))])
    chosen = folds(z, np.asarray(task.train.labels), ctx.seeds.at(task=task.index).generator("folds"))
    for fold in np.unique(chosen[chosen >= 0]):
        yield _rehearsed_without(np.flatnonzero(chosen == fold), before, task, ctx)


def folds(z: Features, labels: np.ndarray, rng: torch.Generator, largest: float = 1.0) -> np.ndarray:
    """Which of FOLDS each row belongs to, whole groups of `near_duplicates` of a class; -1 where a class has one group alone. A group
    of more than the `largest` share of its class is none: a chain of images that are alike."""
    chosen = np.full(len(labels), -1)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        group = near_duplicates(z[rows])
        chained = np.isin(group, np.flatnonzero(np.bincount(group) > max(1, largest * len(rows))))
        group = np.where(chained, np.arange(len(rows)), group)
        groups, sizes = np.unique(group, return_counts=True)
        if len(groups) < 2:
            continue
        drawn = torch.randperm(len(groups), generator=rng).numpy()
        filled, order = np.zeros(FOLDS, dtype=int), torch.randperm(FOLDS, generator=rng).numpy()
        for i in drawn[np.argsort(-sizes[drawn], kind="stable")]:  # the largest first, each into the emptiest fold
            fold = order[filled[order].argmin()]
            chosen[rows[group == groups[i]]] = fold
            filled[fold] += sizes[i]
    return chosen


def near_duplicates(z: Features) -> np.ndarray:
    """The group of each row, by the number of its first: single linkage of pairs that are closer than DUPLICATE times the
    median pair, as 1 - cosine."""
    x = unit(z.double()).numpy()
    distance = 1 - x @ x.T
    median = np.median(distance[np.triu_indices(len(x), 1)]) if len(x) > 1 else 0.0
    near = distance <= max(DUPLICATE * median, 1e-6)  # copies are near whatever the median
    group = np.arange(len(x))
    while True:  # every row takes over the smallest number among its neighbours
        smaller = np.where(near, group, len(x)).min(axis=1)
        if (smaller == group).all():
            return group
        group = smaller


def keep_left_out(task: Task, ctx: Context, every: bool = False, others: Sequence[int] | np.ndarray = ()) -> None:
    """Before a task is learned: have the passes over it keep the features of images that `rehearsed` will leave out and of those
    `others`, or of every image, for `rehearsed_in_folds`."""
    rows = np.arange(len(task.train)) if every else np.union1d(left_out_of(task, ctx), others).astype(np.int64)
    ctx.checkpoint.keep_features(torch.from_numpy(rows), len(task.train))


def left_out_of(task: Task, ctx: Context) -> np.ndarray:
    """Rows of the task's images that are left out."""
    return left_out(np.asarray(task.train.labels), ctx.seeds.at(task=task.index).generator("calibration"))


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

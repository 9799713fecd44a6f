"""What the images of a task that were left out of learning tell of a learner: how sure it may be, when an image is of no known
class, and how many it classifies correctly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cairn.classifier.calibration import Calibration, LeftOut, rehearsed, rehearsed_in_folds, unlearned
from cairn.classifier.choice import untold
from cairn.classifier.estimate import AccuracyEstimate, Source, confusion_counts
from cairn.classifier.novelty import Novelty, gaussians_of
from cairn.classifier.retention import drawn_shares
from cairn.data.task import Task
from cairn.methods.protocol import LeavesOut, Method
from cairn.training.context import Context
from cairn.types import Labels, Scores

REFERENCES = 256
"""Numbers of a task that the known score is read against, at most."""

MOST_IN_FOLDS = 4096
"""Images of a task; of more, a fifth is enough to count."""

SMALL = 100
"""A task of fewer images leaves out fewer than 20, a fifth: of the images of known classes more than one in 20 would lie below all of
them. Where learning costs little, all are left out in turn."""


@dataclass(frozen=True)
class Assessment:
    """After a task."""

    calibration: Calibration
    references: list[float]
    """At most REFERENCES values, see `cairn.classifier.novelty`."""
    estimate: AccuracyEstimate


def needs_every_image(method: Method, task: Task) -> bool:
    """Whether `assessed` leaves out every image of the task in turn: where learning once more costs little, and the method
    does not do it by itself, or the known score wants more of them."""
    by_itself = isinstance(method, LeavesOut) and task.unlabelled is None
    most = SMALL - 1 if by_itself else MOST_IN_FOLDS
    return method.card.closed_form and len(task.train) <= most


def assessed(
    calibration: Calibration,
    estimate: AccuracyEstimate,
    method: Method,
    previous: Method | None,
    before: Callable[[], Method],
    task: Task,
    ctx: Context,
) -> Assessment:
    """Of `method`, which just learned `task`; `previous` is what it was before, if anything, and `before()` makes a copy of
    that. `calibration` and `estimate` are those before the task.

    Where fewer embeddings than REFERENCES were left out, or a task of pictures is SMALL, all of the task are in turn: a few say
    little of a threshold.
    """
    left_out = rehearsal = unlearned(method, before, task, ctx)
    has_gaussians, at_hand = gaussians_of(method) is not None, _can_be_learned_again(method, task, ctx)
    small = has_gaussians and at_hand and method.card.closed_form and len(task.train) < SMALL
    by_itself = isinstance(method, LeavesOut) and method.left_out is not None
    if by_itself and has_gaussians and not small:  # the known score wants the statistics too
        rehearsal = rehearsed(before, task, ctx)
    fits = [] if rehearsal is None else _fits(rehearsal, ctx)
    few = small or (bool(fits) and len(fits[0]) < REFERENCES and not method.towers.has_images)
    counted = [] if left_out is None else [_counted(left_out.scores, left_out.labels)]
    source: Source = "a fifth left out"
    if few or (needs_every_image(method, task) and at_hand):
        fits, counted, source = [] if few else fits, [], "left out in five parts"
        for part in rehearsed_in_folds(before, task, ctx):
            counted.append(_counted(part.scores, part.labels))
            if few:
                fits += _fits(part, ctx)
    if by_itself and left_out is not None:
        counted, source = [_counted(left_out.scores, left_out.labels)], "left out one by one"
    K, seed = len(estimate.doubt) + len(task.classes), ctx.seeds.seed
    if not estimate.drawn:
        estimate = estimate.with_draws(drawn_shares(previous, seed))
    return Assessment(
        calibration.with_images(left_out if left_out is None else _told(left_out, task)),
        _thinned(fits),
        estimate.with_task(sum(counted, np.zeros((K, K))), source, drawn_shares(method, seed)),
    )


def _told(left_out: LeftOut, task: Task) -> LeftOut:
    """Without images that are the only ones of their class and known no better than chance: left out, their class has none, and how
    sure one may be of classes that have some does not follow from them."""
    rows = torch.nonzero(~untold(left_out, task)).flatten()
    return LeftOut(left_out.scores[rows.to(left_out.scores.device)], left_out.labels[rows.to(left_out.labels.device)])


def _can_be_learned_again(method: Method, task: Task, ctx: Context) -> bool:
    """Whether the features of all images are at hand."""
    return not method.towers.has_images or ctx.checkpoint.features_of(torch.arange(len(task.train))) is not None


def _counted(scores: Scores, labels: Labels) -> np.ndarray:
    return confusion_counts(scores.argmax(1).cpu().numpy(), labels.cpu().numpy(), scores.shape[1])


def _fits(left_out: LeftOut, ctx: Context) -> list[Tensor]:
    """a(z) of the images, where the method keeps Gaussians; see `cairn.classifier.novelty`."""
    if left_out.rows is None or gaussians_of(left_out.method) is None:
        return []
    return [Novelty(left_out.method, ctx.seeds.seed).fit(left_out.rows)]


def _thinned(fits: Sequence[Tensor]) -> list[float]:
    """All of them, or REFERENCES quantiles."""
    a = torch.cat([*fits]) if fits else torch.empty(0, dtype=torch.float64)
    if len(a) > REFERENCES:
        a = torch.quantile(a, torch.linspace(0, 1, REFERENCES, dtype=a.dtype))
    return a.tolist()

"""New images compared with those that were learned, of which only statistics are there: what `cairn.classifier.drift` tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cairn.classifier.drift import BELOW, ClassShift, Drift
from cairn.classifier.novelty import Novelty, gaussians_of, within_factor
from cairn.classifier.scoring import BATCH
from cairn.data.images import reduced
from cairn.data.in_memory import InMemoryImages
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError, InvalidInput
from cairn.maths.mean_shift import directions, mean_shift
from cairn.maths.tails import beta_binomial_tail
from cairn.memory.protocol import WithScatter
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import FROZEN, GaussianScoring, Method
from cairn.towers.preprocessing import decoded_side
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.types import Features

FEWEST = 5
"""Images of a class; of fewer nothing is told."""

MOST = 4096
"""Images of known classes that are compared when they are learned."""


def drift_of(
    memory: WithScatter, novelty: Novelty, z: Features, labels: Tensor, known: np.ndarray, names: Sequence[str]
) -> Drift:
    """Of rows `z` as the memory holds them, the class numbers that they have, and their known scores."""
    m = novelty.references
    r = max(1.0, float(math.ceil(BELOW * m)))
    below = int((known < BELOW).sum())
    L, rows = within_factor(memory), z.detach().double().cpu()
    h = directions(memory.scatter, max(1, int((memory.counts - 1).clamp_min(0).sum())), L)
    shifts = []
    for c in map(int, torch.unique(labels)):
        own = rows[labels == c]
        if len(own) >= FEWEST:
            found = mean_shift(own, memory.means[c], int(memory.counts[c]), L, h)
            shifts.append(ClassShift(name=names[c], images=len(own), **found._asdict()))
    p_below = beta_binomial_tail(below, len(rows), r, m + 1 - r)
    return Drift(images=len(rows), below=below, p_below=p_below, shifts=shifts)


def drift_of_images(method: Method, novelty: Novelty, images: InMemoryImages, names: Sequence[str]) -> Drift:
    """Of pictures without labels. Raises ConfigError for a method that keeps no Gaussians, InvalidInput for no picture."""
    memory = gaussians_of(method)
    if memory is None or not memory.classes:
        able = [entry.name for entry in METHODS.values() if GaussianScoring in entry.capabilities]
        raise ConfigError(
            f"drift: this method keeps no means and covariances of its classes; those that do: {', '.join(able)}"
        )
    if not len(images):
        raise InvalidInput("no image given")
    towers = method.towers
    seen = reduced(images, decoded_side(towers))
    loader = Loader(seen, towers.prepare, towers.pixels, batch=BATCH, cache_bytes=0)
    features, _ = encode(loader, lambda features, _: features, embed=method.embed)
    scores = method.scores(features)
    z = method.memory_rows(features) if isinstance(method, GaussianScoring) else features
    return drift_of(memory, novelty, z, scores.argmax(1).cpu(), novelty.known(features, scores), names)


def drift_in_task(
    before: Method | None, novelty: Callable[[], Novelty], task: Task, ctx: Context, names: Sequence[str]
) -> Drift | None:
    """How the images of classes known before, in a task that was just learned, differ from those learned before it; by the method
    as it was. None where there is nothing to compare, and where the image tower is trained: its features move by themselves."""
    memory, rows = None if before is None else gaussians_of(before), compared_rows(task)
    if before is None or memory is None or not isinstance(before, GaussianScoring) or before.encoder != FROZEN:
        return None
    features = ctx.checkpoint.features_of(torch.from_numpy(rows)) if len(rows) else None
    if features is None:
        return None
    features, labels = features.to(torch.device(before.towers.device)), torch.as_tensor(task.train.labels)[rows]
    known = novelty().known(features, before.scores(features))
    return drift_of(memory, novelty(), before.memory_rows(features), labels, known, names)


def compared_rows(task: Task) -> np.ndarray:
    """Rows of a task's images that are of classes known before, MOST of them evenly."""
    rows = np.flatnonzero(np.asarray(task.train.labels) < task.classes.start)
    return rows[np.linspace(0, len(rows) - 1, MOST).astype(int)] if len(rows) > MOST else rows

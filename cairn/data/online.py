"""Streams that are seen once: images in random order, tasks in chunks, borders that are sharp or blurry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cairn.data.task import Subset

CHUNK = 100
"""Images that are learned at once in an online stream, where nobody says how many."""


def chunks(labels: np.ndarray, classes: range, size: int) -> list[np.ndarray]:
    """Rows of each chunk of a task, in their order: `size` of them, the first time as many as it takes to have one of each of
    `classes`."""
    found, first = np.unique(labels, return_index=True)
    needed = 1 + int(first[np.isin(found, classes)].max(initial=-1))
    return np.split(np.arange(len(labels)), range(max(size, needed), len(labels), size))


def shuffled(trains: Sequence[Subset], classes: Sequence[range]) -> list[Subset]:
    """Images of each task as a stream brings them (seed 0): one of each new class, since a task tells its classes when it
    begins, then all others, whatever their class."""
    rng, found = np.random.default_rng(0), []
    for images, new in zip(trains, classes, strict=True):
        order = rng.permutation(len(images))
        labels, first = np.unique(images.labels[order], return_index=True)
        ahead = np.sort(first[np.isin(labels, new)])
        found.append(_rows(images, np.concatenate([order[ahead], np.delete(order, ahead)])))
    return found


def blurred(trains: Sequence[Subset], share: float) -> list[Subset]:
    """Blurry borders (seed 0): of each class, that share of the images comes not with the class's task but with a later one,
    each in a task drawn evenly. One at least comes with its own, where a class has its name; of the last task none moves.

    Source: Bang et al. 2021, Rainbow Memory; Koh et al. 2022, Online Continual Learning on Class Incremental Blurry Task
    Configuration, where images may also come in earlier tasks.
    """
    rng, number = np.random.default_rng(0), len(trains)
    comes = [np.full(len(images), i) for i, images in enumerate(trains)]
    for i, images in enumerate(trains[:-1]):
        for c in np.unique(images.labels):
            members = rng.permutation(np.flatnonzero(images.labels == c))
            moved = members[: min(round(share * len(members)), len(members) - 1)]
            comes[i][moved] = rng.integers(i + 1, number, len(moved))
    found = []
    for j in range(number):
        own = [_rows(trains[i], np.flatnonzero(comes[i] == j)) for i in range(j, -1, -1)]
        indices, labels = np.concatenate([part.indices for part in own]), np.concatenate([part.labels for part in own])
        found.append(Subset(trains[j].source, indices, labels))
    return found


def _rows(images: Subset, rows: np.ndarray) -> Subset:
    return Subset(images.source, images.indices[rows], images.labels[rows])

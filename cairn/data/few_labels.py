"""Streams of which only some training images are labelled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cairn.data.images import Concatenation, Images, Unlabelled, taken


def few_labels(trains: Sequence[Images], share: float) -> tuple[list[Images], list[Unlabelled | None]]:
    """Of each task, the images that keep their labels, and the others (None where there are none): of each class
    in a task max(1, round(share n)) of n keep theirs, drawn evenly (seed 0)."""
    rng = np.random.default_rng(0)
    told: list[Images] = []
    rest: list[Unlabelled | None] = []
    for images in trains:
        kept = []
        for c in np.unique(images.labels):
            members = rng.permutation(np.flatnonzero(images.labels == c))
            kept.append(members[: max(1, round(share * len(members)))])
        rows = np.sort(np.concatenate(kept))
        others = np.setdiff1d(np.arange(len(images)), rows)
        told.append(taken(images, rows))
        rest.append(Unlabelled(images, others) if len(others) else None)
    return told, rest


def together(*parts: Images | None) -> Images | None:
    """Those that there are, one after the other."""
    there = [images for images in parts if images is not None and len(images)]
    return Concatenation(there) if len(there) > 1 else there[0] if there else None

"""Streams of which only some training images are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from cairn.data.identity import content_hash
from cairn.data.images import Concatenation, Images, Unlabelled, taken
from cairn.errors import DataError


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


def shared_rows(images: Images, others: Sequence[Images]) -> np.ndarray:
    """Which of the images are, pixel for pixel, among the others too. What cannot be read is among none."""

    def hashes(collection: Images) -> list[bytes | None]:
        return list(pool.map(lambda index: _content(collection, index), range(len(collection))))

    with ThreadPoolExecutor(max_workers=8) as pool:
        own = hashes(images)
        there = {value for other in others for value in hashes(other)} - {None}
    return np.flatnonzero([value in there for value in own])


def _content(images: Images, index: int) -> bytes | None:
    try:
        item = images[index]
    except DataError:
        return None  # which is said when all images are looked through
    return content_hash(item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item)))


def together(*parts: Images | None) -> Images | None:
    """Those that there are, one after the other."""
    there = [images for images in parts if images is not None and len(images)]
    return Concatenation(there) if len(there) > 1 else there[0] if there else None

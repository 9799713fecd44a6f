"""How images that show several classes are cut into tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cairn.data.images import Composed, Dataset
from cairn.data.task import Images, LabelSets
from cairn.errors import ConfigError, DataError


def tasks_of_sets(
    dataset: Dataset,
    classes: Sequence[range],
    arrival: np.ndarray,
    limit_train: int | None,
    limit_test: int | None,
    validation: float,
) -> tuple[list[Images], list[Images]]:
    """Training and test images of each task, as `LabelSets`, for the `classes` of each task in order of arrival.

    In training a task has the images that show one of its classes, and is told what they show of these alone: an image may be
    in several tasks. A test image belongs to the first task of which it shows a class, with all that it shows: those of the
    tasks so far are the images that show a class seen. Images that show none are in neither.
    Source: Dong et al., Knowledge Restore and Transfer for Multi-Label Class-Incremental Learning (2023), section 3.1.
    """
    train, test = _split(dataset, validation, arrival)
    return _told(_limited(train, limit_train), classes), _tested(_limited(test, limit_test), classes)


def long_tailed(dataset: Dataset, imbalance: float) -> Dataset:
    """The data set with training images in which some classes are rare, where these can be composed so: to leave images out would
    take frequent classes away with rare ones, and the other way round."""
    assert isinstance(dataset.train, LabelSets)
    source = dataset.train.source
    if not isinstance(source, Composed):
        raise ConfigError(
            f"imbalance {imbalance:g}: data '{dataset.name}' has several classes in an image; leave it out"
        )
    return replace(dataset, train=source.long_tailed(imbalance))


def _split(dataset: Dataset, share: float, arrival: np.ndarray) -> tuple[LabelSets, LabelSets]:
    """Training and test images with their columns in order of arrival; with a `share` of the former in place of the latter."""
    train, test = dataset.train, dataset.test
    assert isinstance(train, LabelSets)
    assert isinstance(test, LabelSets)
    train, test = train.taken(np.arange(len(train)), arrival), test.taken(np.arange(len(test)), arrival)
    if not share:
        return train, test
    kept, out = held_out_sets(train, share, [dataset.classes[i] for i in arrival])
    return train.taken(kept), train.taken(out)


def held_out_sets(images: LabelSets, share: float, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), about a `share` of the images of each class, at least one of each on either side.

    The share is taken class by class, the rarest first, of those of its images on which nothing was decided yet.
    Source: Sechidis et al., On the Stratification of Multi-Label Data (2011), for two parts and in one round.
    """
    rng, counts = np.random.default_rng(0), images.targets.sum(0)
    out, decided = np.zeros(len(images), dtype=bool), np.logical_not(images.targets.any(1))
    for c in np.argsort(counts, kind="stable").tolist():
        if counts[c] < 2:
            raise DataError(f"class '{names[c]}': has {counts[c]} training images, a split needs two; add some")
        free = rng.permutation(np.flatnonzero(images.targets[:, c] & ~decided))
        wanted = min(max(1, round(share * counts[c])), counts[c] - 1) - int(out[images.targets[:, c]].sum())
        out[free[: max(0, wanted)]] = True
        decided[free] = True
    for side, chosen in (("kept", ~out), ("held out", out)):
        for c in np.flatnonzero(images.targets[chosen].sum(0) == 0).tolist():
            raise DataError(f"class '{names[c]}': none of its images would be {side} of a split of {share:g}; add some")
    return np.flatnonzero(~out), np.flatnonzero(out)


def _limited(images: LabelSets, limit: int | None) -> LabelSets:
    """The images, in their order, that show a class of which fewer than `limit` came before."""
    if limit is None:
        return images
    came, kept = np.zeros(images.targets.shape[1], dtype=int), []
    for row, shows in enumerate(images.targets):
        if (came[shows] < limit).any():
            came += shows
            kept.append(row)
    return images.taken(np.array(kept, dtype=int))


def _told(train: LabelSets, classes: Sequence[range]) -> list[Images]:
    """For each task the images that show one of its classes, and what they show of these alone."""
    tasks: list[Images] = []
    for ids in classes:
        told = train.targets[:, : ids.stop].copy()
        told[:, : ids.start] = False
        tasks.append(LabelSets.of(train.source, told, train.indices).taken(np.flatnonzero(told.any(1))))
    return tasks


def _tested(test: LabelSets, classes: Sequence[range]) -> list[Images]:
    """For each task the images whose first class in order of arrival is one of its own, with all that they show."""
    return [test.taken(np.flatnonzero((test.labels >= ids.start) & (test.labels < ids.stop))) for ids in classes]

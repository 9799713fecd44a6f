"""What a user hands over to a classifier: images or rows with a class name for each, as items and texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from cairn.data.descriptions import Descriptions, read_descriptions, written_by
from cairn.data.folders import named_unreadable, unreadable
from cairn.data.in_memory import InMemoryImages, Item, items_of
from cairn.data.labelled_datasets import labelled_items
from cairn.errors import ConfigError, InvalidInput, UnreadableImages, counted
from cairn.training.context import Log

SKIP = "replace them, or leave them out: on_bad_image='skip', on the command line --on-bad-image skip"

Sentences: TypeAlias = Mapping[str, Sequence[str] | str] | str | os.PathLike[str] | None
"""Descriptions of classes: by name, or where a file of them is."""


Labelled: TypeAlias = Any
"""Images, `Item | Iterable[Item]`, whose labels are beside them; or a data set that has labels of its own."""

NameSet: TypeAlias = list[str] | tuple[str, ...] | set[str] | frozenset[str]
"""The classes of one image."""


Labels: TypeAlias = str | Iterable[str] | Iterable[NameSet] | None
"""A class name for each image, or where it may show several a list of them."""


def unlabelled(images: Item | Iterable[Item], width: int | None) -> InMemoryImages:
    items = items_of(images, width)
    return InMemoryImages(items, np.zeros(len(items), dtype=np.int64), width)


def labelled(images: Labelled, labels: Labels, width: int | None) -> tuple[list[Item], list[str]]:
    """Images and a label for each, at least one. A single image and a single label may stand without a list; without labels the
    images are a data set that has them (see `cairn.data.labelled_datasets`). Raises InvalidInput."""
    if labels is None:
        if width is not None:
            raise InvalidInput("labels: none given; this learner takes embeddings, with one class name for each")
        items, labels = labelled_items(images)
    else:
        items = items_of(images, width)
    if not isinstance(labels, Iterable):
        raise InvalidInput(f"labels: {labels!r}; give one class name for each image")
    names = [labels] if isinstance(labels, str) else list(labels)
    if len(items) != len(names):
        raise InvalidInput(
            f"{counted(len(items), 'image')} with {counted(len(names), 'label')}: give one label for each image"
        )
    if not items:
        raise InvalidInput("no image given")
    texts: list[str] = []
    for name in names:
        if isinstance(name, (list, tuple, set, frozenset)):
            raise InvalidInput(
                f"labels {name!r}: images of this learner show one class each; give one class name, or begin another learner with "
                "targets='sets'"
            )
        if not isinstance(name, str):
            raise InvalidInput(f"label {name!r}: a class is called by a text, such as 'oak'")
        texts.append(name)
    return items, texts


def list_of(labels: Any) -> Any:
    """Labels that can be gone over more than once."""
    return list(labels) if isinstance(labels, Iterator) else labels


def are_sets(labels: Any) -> bool:
    """Whether labels are sets of class names: the first of them is a list, a tuple or a set."""
    return isinstance(labels, Sequence) and len(labels) > 0 and isinstance(labels[0], (list, tuple, set, frozenset))


def labelled_sets(images: Labelled, labels: Labels, width: int | None) -> tuple[list[Item], list[list[str]]]:
    """Images and the class names of each, at least one image. A single image and its names may stand without a list. Raises
    InvalidInput."""
    if labels is None or isinstance(labels, str) or not isinstance(labels, Iterable):
        raise InvalidInput(f"labels: {labels!r}; this learner takes a list of class names for each image")
    items, given = items_of(images, width), list(labels)
    if len(items) == 1 and given and all(isinstance(own, str) for own in given):
        given = [given]
    if len(items) != len(given):
        raise InvalidInput(
            f"{counted(len(items), 'image')} with {counted(len(given), 'list')} of labels: give one list for each image"
        )
    if not items:
        raise InvalidInput("no image given")
    sets = []
    for own in given:
        if isinstance(own, str):
            raise InvalidInput(
                f"label '{own}': images of this learner may show several classes; give a list of class names for each image, in a CSV "
                "a column 'labels'"
            )
        own = sorted(own, key=str) if isinstance(own, (set, frozenset)) else own
        if not isinstance(own, (list, tuple)) or not all(isinstance(name, str) for name in own):
            raise InvalidInput(f"labels {own!r}; give a list of class names, texts such as 'oak', for each image")
        sets.append(list(own))
    return items, sets


def skips(on_bad_image: str) -> bool:
    """Whether images that cannot be read are left out. Raises ConfigError for another word than stop and skip."""
    if on_bad_image not in ("stop", "skip"):
        raise ConfigError(f"on_bad_image '{on_bad_image}': must be stop or skip")
    return on_bad_image == "skip"


def readable(
    given: InMemoryImages, classes: dict[str, int], on_bad_image: Literal["stop", "skip"], log: Log
) -> InMemoryImages:
    """Without the items that cannot be read, if they are to be skipped; a notice names them. Raises UnreadableImages for them
    otherwise, and where none is left of one of `classes`."""
    skip, bad = skips(on_bad_image), unreadable(given)
    if not bad:
        return given
    named = named_unreadable(given, bad)
    if not skip:
        raise UnreadableImages(f"{named}; {SKIP}", bad)
    rows = np.delete(np.arange(len(given)), list(bad))
    for name, number in classes.items():
        if number not in given.labels[rows]:
            raise UnreadableImages(f"class '{name}': {named}, among them all of this class", bad)
    log("notice", text=f"left out: {named}")
    return given.taken(rows)


def pictures(
    images: Item | Iterable[Item],
    labels: str | Iterable[str] | None,
    width: int | None,
    on_bad_image: Literal["stop", "skip"],
    log: Log,
) -> tuple[InMemoryImages, list[str] | None]:
    """Images that were learned, less those that cannot be read, and a label for each if any was given; one label stands for all.
    Raises InvalidInput and UnreadableImages."""
    items = items_of(images, width)
    if not items:
        raise InvalidInput("no image given")
    rows = readable(InMemoryImages(items, np.arange(len(items)), width), {}, on_bad_image, log).labels
    names = None
    if labels is not None:
        _, names = labelled(items, [labels] * len(items) if isinstance(labels, str) else labels, width)
        names = [names[row] for row in rows]
    return unlabelled(items, width).taken(rows), names


def columns(images: Item | Iterable[Item]) -> int:
    """Numbers in a row, where nothing else tells it. Raises InvalidInput for what are no rows."""
    try:
        shape = [*(images.shape if isinstance(images, torch.Tensor) else np.asarray(images, dtype=np.float32).shape)]
    except (TypeError, ValueError):
        shape = []
    if len(shape) not in (1, 2) or not shape[-1]:
        raise InvalidInput(
            f"rows: {shape[-1] if shape else 0} feature(s) (shape={tuple(shape)}) while a minimum of 1 is required; give rows of "
            "numbers, (n, width), dense, not sparse"
        )
    return shape[-1]


def descriptions_of(given: Sentences) -> Descriptions | None:
    if given is None:
        return None
    return read_descriptions(given) if isinstance(given, (str, os.PathLike)) else written_by("given", given)

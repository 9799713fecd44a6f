"""Data sets, and what is made of their lazy collections of labelled images (see `cairn.data.task`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from cairn.data.descriptions import Descriptions
from cairn.data.names import class_name
from cairn.data.task import Images, LabelSets, Subset
from cairn.data.templates import prompt_templates
from cairn.errors import DataError

SubsetOf = TypeVar("SubsetOf", bound=Subset)


@runtime_checkable
class Checked(Protocol):
    """Images that are encoded files."""

    def check(self, index: int) -> None:
        """Raises what opening the image would raise, at less cost."""
        ...


@runtime_checkable
class Reducible(Protocol):
    """Images that are encoded files, which may be decoded at a fraction of their size."""

    def reduced(self, side: int) -> Images:
        """The same images, each JPEG decoded at the smallest of its fractions that has so many pixels along either side."""
        ...


@runtime_checkable
class Masked(Protocol):
    """Images of which it is known where their object lies."""

    def mask(self, index: int) -> np.ndarray | None:
        """Bool (h, w): the object of the image's label; None where it is not known."""
        ...


@runtime_checkable
class Composed(Protocol):
    """Images that are put together from others, each of which shows one class."""

    def long_tailed(self, imbalance: float) -> LabelSets:
        """Images of fewer of those, the most frequent class having that many times as many as the rarest."""
        ...


class Unlabelled:
    """Some items of another collection, of which nobody is told what they show: all labels are -1, and of targets and masks there
    are none. What `describe` says is for messages."""

    def __init__(self, images: Images, rows: np.ndarray | None = None):
        self.__rows = np.arange(len(images)) if rows is None else rows
        self.__images = images
        self.labels = np.full(len(self.__rows), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.__images[int(self.__rows[index])]

    def describe(self, index: int) -> str:
        return self.__images.describe(int(self.__rows[index]))

    def identity(self, index: int) -> bytes:
        return self.__images.identity(int(self.__rows[index]))

    def check(self, index: int) -> None:
        """Raises what opening the image would raise, where it is an encoded file."""
        source, position = source_of(self.__images, int(self.__rows[index]))
        if isinstance(source, Checked):
            source.check(position)

    def reduced(self, side: int) -> Unlabelled:
        return Unlabelled(reduced(self.__images, side), self.__rows)


def rows_of(images: Images, source: Images) -> np.ndarray:
    """Which items of `source` a subset of it has, or a subset of a subset. Raises ValueError for other images."""
    if images is source:
        return np.arange(len(source))
    if isinstance(source, LabelSets) and isinstance(images, Subset) and images.source is source.source:
        return np.flatnonzero(np.isin(source.indices, images.indices))
    if not isinstance(images, Subset):
        raise ValueError("not a subset of these images")
    return rows_of(images.source, source)[images.indices]


def taken(images: Images, rows: np.ndarray) -> Subset:
    """Those items, with all that is said of them."""
    return images.taken(rows) if isinstance(images, LabelSets) else Subset(images, rows, images.labels[rows])


def showing(images: Images, c: int) -> np.ndarray:
    """Which items show class number c."""
    return np.flatnonzero(images.targets[:, c] if isinstance(images, LabelSets) else images.labels == c)


class Concatenation:
    """Several collections, one after the other."""

    def __init__(self, parts: Sequence[Images]):
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.labels = np.concatenate([part.labels for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[Images, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - (int(self.ends[part - 1]) if part else 0)

    def __getitem__(self, index: int) -> Any:
        part, position = self.place(index)
        return part[position]

    def describe(self, index: int) -> str:
        part, position = self.place(index)
        return part.describe(position)

    def identity(self, index: int) -> bytes:
        part, position = self.place(index)
        return part.identity(position)


def source_of(images: Images, index: int) -> tuple[Images, int]:
    """The collection that an item of subsets and concatenations comes from, and its place there."""
    while isinstance(images, Subset | Concatenation):
        if isinstance(images, Subset):
            images, index = images.source, int(images.indices[index])
        else:
            images, index = images.place(index)
    return images, index


def reduced(images: Images, side: int | None) -> Images:
    """The same images, JPEGs among them decoded at no less than `side` pixels along either side (see `Reducible`); all whole if
    None. Items that are no encoded files stay as they are."""
    if side is None:
        return images
    if isinstance(images, Subset):
        return reduced_subset(images, side)
    if isinstance(images, Concatenation):
        return Concatenation([reduced(part, side) for part in images.parts])
    return images.reduced(side) if isinstance(images, Reducible) else images


def reduced_subset(images: SubsetOf, side: int | None) -> SubsetOf:
    """The same of a subset, which stays one of its kind."""
    return images if side is None else replace(images, source=reduced(images.source, side))


def mask_of(images: Images, index: int) -> np.ndarray | None:
    """Where the object of an item lies, bool (h, w), if that is known."""
    source, position = source_of(images, index)
    return source.mask(position) if isinstance(source, Masked) else None


@dataclass(frozen=True)
class Dataset:
    """A data set before it becomes a stream: classes in their natural order, labels indexing them.

    `templates` are prompts with one `{}` for the class name; the first serves where a method takes a single one.
    `embeddings` holds what a features file brings besides the images (see `cairn.data.embeddings`), `descriptions` what
    is said of the classes beyond their names, where the data set brings that. `notices` are what a user should hear of it.
    Where `train` and `test` are `LabelSets`, an image may show several classes.
    Raises DataError for a class name that `class_name` refuses.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    templates: tuple[str, ...]
    embeddings: Any = None
    descriptions: Descriptions | None = None
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(class_name, self.classes)))
        templates = prompt_templates(self.templates, f"data '{self.name}': templates", DataError)
        object.__setattr__(self, "templates", templates)

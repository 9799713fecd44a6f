"""What a method is given: a task, and the lazy collections of labelled images in it.

An item is opened when it is asked for, never before. A `Task` carries no test image, by design.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cairn.data.templates import prompt_templates


@runtime_checkable
class Images(Protocol):
    """Items with integer labels. An item is a PIL image, uint8 values (h, w, 3), (h, w, 4) or (h, w), or an embedding's row (d,)."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,): class ids, known without opening anything."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def describe(self, index: int) -> str:
        """Where the item comes from, for error messages: a file name, a row number."""
        ...

    def identity(self, index: int) -> bytes:
        """What the item is: equal bytes, equal items. Nothing is decoded for it. Asked for by a feature store alone."""
        ...


@dataclass(frozen=True)
class Subset:
    """Some items of another collection, with labels of their own. Opens nothing."""

    source: Images
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def identity(self, index: int) -> bytes:
        return self.source.identity(int(self.indices[index]))


@dataclass(frozen=True)
class LabelSets(Subset):
    """Some items of another collection, each of which may show several classes: `targets` bool (n, k), a column per class.

    `labels` is for whoever asks for one: the first class that each shows, -1 for an image that shows none.
    """

    targets: np.ndarray

    @classmethod
    def of(cls, source: Images, targets: np.ndarray, indices: np.ndarray | None = None) -> LabelSets:
        """Items of `source`, all of them unless `indices` says which, with these targets."""
        labels = np.where(targets.any(1), targets.argmax(1), -1).astype(np.int64)
        return cls(source, np.arange(len(targets)) if indices is None else indices, labels, targets)

    def taken(self, rows: np.ndarray, columns: np.ndarray | slice = slice(None)) -> LabelSets:
        """Those images, with those columns, in that order."""
        return LabelSets.of(self.source, self.targets[rows][:, columns], self.indices[rows])

    def copies(self) -> Subset:
        """For methods that learn one class of an image: each image once for every class that it shows, class by class.

        Source: Tsoumakas, Katakis, Multi-Label Classification: An Overview (2007), section 3.1, the copy transformation (there PT3).
        """
        labels, rows = np.nonzero(self.targets.T)
        return Subset(self.source, self.indices[rows], labels.astype(np.int64))


@runtime_checkable
class Sentences(Protocol):
    """Sentences about classes, by name: `cairn.data.descriptions.Descriptions`, or what else has them."""

    def of(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Those of each of these classes, in this order. Raises DataError listing the classes that have none."""
        ...


@dataclass(frozen=True)
class Task:
    """What a method is given of task `index`: its new classes (arrival numbers), their names, prompts and images.

    Among the images may be some of classes that came earlier: those are learned on.
    """

    index: int
    classes: range
    names: tuple[str, ...]
    templates: tuple[str, ...]
    train: Images
    descriptions: Sentences | None = None
    """What the data set says of its classes, if it does; of all of them: a file is one thing."""
    label_sets: LabelSets | None = None
    """Where images may show several classes: those of the task once each, with a column per class up to the task's last. That an
    image shows one of the task's own classes is told, of earlier ones nothing is. `train` holds their `copies`."""
    unlabelled: Images | None = None
    """Images that come with the task and of which nobody says what they show: all their labels are -1."""

    def __post_init__(self):
        object.__setattr__(self, "templates", prompt_templates(self.templates, f"task {self.index}: templates"))

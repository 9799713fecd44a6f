"""Mosaics: 2 x 2 grids of the pictures of a data set, as images that show several classes.

Every picture is in one mosaic and no other, those of the test split in mosaics of their own, so that a class is shown as
often as it has pictures. A mosaic shows one to four classes, as often the one number as the other, at places drawn anew; half
of them take the further classes from the superclass of the first, where superclasses are known and as long as there are
pictures. The rest of a mosaic has the mean colour of CLIP's training images. Nothing is opened to put them together.

Where in a mosaic a class is has no mask: a mask is of an image's one label, and which one that is depends on who asks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cairn.data.images import Checked, Dataset, reduced, source_of
from cairn.data.names import packaged, spaced
from cairn.data.stream import long_tail
from cairn.data.task import Images, LabelSets
from cairn.errors import DataError

PLACES = 4
ALIKE = 0.5
"""Share of the mosaics whose further classes come from the superclass of the first."""

CELL = 112
"""Width of a cell in pixels at most: a mosaic is as large as the towers' images usually are."""

MEAN = (123, 117, 104)
"""Of the images that CLIP was trained on: what preprocessing turns into zeros."""

SEED = 23


class Mosaics:
    """Grids of pictures. An item is a PIL image in RGB, put together when it is asked for; its cells are as wide as its largest
    picture, of whose sides the shorter counts, and `CELL` at most. Of a picture that is not square a cell shows the middle.

    `cells` int (n, 4) has the picture at each place, -1 where there is none; `groups` int (k,) the superclass of every class of
    the pictures.
    """

    def __init__(self, pictures: Images, cells: np.ndarray, groups: np.ndarray):
        self.pictures, self.cells, self.groups = pictures, cells, groups
        self.labels = np.full(len(cells), -1)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> Image.Image:
        shown = [(place, _picture(self.pictures[row])) for place, row in self._filled(index)]
        side = min(CELL, max(min(picture.size) for _, picture in shown))
        mosaic = Image.new("RGB", (2 * side, 2 * side), MEAN)
        for place, picture in shown:
            cell = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
            mosaic.paste(cell, (side * (place % 2), side * (place // 2)))
        return mosaic

    def _filled(self, index: int) -> list[tuple[int, int]]:
        """Places and the pictures at them."""
        return [(place, row) for place, row in enumerate(self.cells[index].tolist()) if row >= 0]

    def describe(self, index: int) -> str:
        """What lies at its four places."""
        shown = {place: self.pictures.describe(row) for place, row in self._filled(index)}
        return "mosaic of " + ", ".join(shown.get(place, "-") for place in range(PLACES))

    def identity(self, index: int) -> bytes:
        """The pictures at their places."""
        parts = [f"{place} ".encode() + self.pictures.identity(row) for place, row in self._filled(index)]
        return b"mosaic 1\0" + b"\0".join(b"%d " % len(part) + part for part in parts)

    def check(self, index: int) -> None:
        """Raises what opening its pictures would raise, where they are encoded files."""
        for _, row in self._filled(index):
            source, position = source_of(self.pictures, row)
            if isinstance(source, Checked):
                source.check(position)

    def reduced(self, side: int) -> Mosaics:
        """The same of pictures decoded at no less than a cell's width, whatever is asked of the whole."""
        return Mosaics(reduced(self.pictures, CELL), self.cells, self.groups)

    def long_tailed(self, imbalance: float) -> LabelSets:
        """Mosaics of the first so many pictures of each class as `long_tail` leaves it, put together anew."""
        return _composed(self.pictures, self.groups, imbalance)


def mosaic_dataset(of: Dataset) -> Dataset:
    """Mosaics of the pictures of a data set. Raises DataError where it has none, or where they show several classes already."""
    if of.embeddings is not None:
        raise DataError(f"data 'mosaic={of.name}': holds embeddings, of which there are no mosaics; give pictures")
    if isinstance(of.train, LabelSets) or isinstance(of.test, LabelSets):
        raise DataError(
            f"data 'mosaic={of.name}': its images show several classes as they are; give it without mosaic="
        )
    groups = superclasses(of.classes)
    train, test = (_composed(images, groups) for images in (of.train, of.test))
    return replace(of, name=f"mosaic={of.name}", train=train, test=test)


def superclasses(classes: Sequence[str]) -> np.ndarray:
    """The number of each class's superclass, int (k,): of CIFAR-100's 20, where all classes are its; else each is alone.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009), for the names.
    """
    known = [_cifar100().get(spaced(name).casefold()) for name in classes]
    return np.arange(len(classes)) if None in known else np.array(known)


@functools.cache
def _cifar100() -> dict[str, int]:
    """The number of the superclass by the class's name. A line of the file has a superclass, then its classes."""
    lines = packaged("cifar100.txt")
    return {name: number for number, line in enumerate(lines) for name in line.split("\t")[1:]}


def _composed(pictures: Images, groups: np.ndarray, imbalance: float = 1.0) -> LabelSets:
    """Mosaics in which each of these pictures is once: of class c all, or the first so many of `long_tail`."""
    k, rng = len(groups), np.random.default_rng(SEED)
    counts = np.bincount(pictures.labels, minlength=k)
    own = np.split(np.argsort(pictures.labels, kind="stable"), np.cumsum(counts)[:-1])
    if imbalance > 1:
        counts = np.minimum(counts, long_tail(int(counts.max()), k, imbalance))
    piles = [rng.permutation(rows[:n]).tolist() for rows, n in zip(own, counts, strict=True)]
    chosen = [*_shown(counts, groups, rng)]
    cells, targets = np.full((len(chosen), PLACES), -1), np.zeros((len(chosen), k), dtype=bool)
    for number, shown in enumerate(chosen):
        cells[number, rng.permutation(PLACES)[: len(shown)]] = [piles[c].pop() for c in shown]
        targets[number, shown] = True
    return LabelSets.of(Mosaics(pictures, cells, groups), targets)


def _shown(counts: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> Iterator[list[int]]:
    """The classes of one mosaic after the other, each class as often as it counts: the first as if a picture were drawn of all
    that are left, the further ones as if of those of other classes, for half of the mosaics in the same group."""
    left = counts.copy()
    while left.any():
        shown: list[int] = []
        number, alike = rng.integers(1, PLACES + 1), rng.random() < ALIKE
        while len(shown) < number:
            free = left.copy()
            free[shown] = 0
            near = np.where(groups == groups[shown[0]], free, 0) if alike and shown else free
            free = near if near.any() else free
            if not free.any():
                break
            shown.append(int(np.searchsorted(free.cumsum(), rng.integers(free.sum()), side="right")))
        left[shown] -= 1
        yield shown


def _picture(item: Any) -> Image.Image:
    return item if isinstance(item, Image.Image) else Image.fromarray(item)

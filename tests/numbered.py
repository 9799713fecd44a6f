"""Six classes of unequal sizes whose images are numbers, for tests of how streams are cut."""

from __future__ import annotations

import numpy as np

from cairn.data.images import Dataset

COUNTS = (12, 5, 9, 7, 1, 8)
"""Training images of each class."""


class Numbers:
    """Each item is its number."""

    def __init__(self, labels):
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return index

    def describe(self, index):
        return f"item {index}"

    def identity(self, index):
        return str(index).encode()


def dataset() -> Dataset:
    train, test = Numbers(np.repeat(np.arange(6), COUNTS)), Numbers(np.tile(np.arange(6), 3))
    return Dataset("made", tuple("abcdef"), train, test, ("a photo of a {}.",))


def rows(images):
    return [images[i] for i in range(len(images))]

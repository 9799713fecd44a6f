"""The drawn world as images that show several classes: of every scene its shape, colour, texture and background are told.

The 31 words are the classes; a scene shows four of them, one of each kind. In training, words of a kind follow an exponential
tail: the rarest is drawn RATIO times less often than the most frequent. Test scenes draw all words of a kind alike. Distractors
of a scene are not told, which makes some labels incomplete, as labels of photographs are.
"""

from __future__ import annotations

import numpy as np

from cairn.data.images import Dataset, LabelSets
from cairn.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SHIFTED, TEXTURES, Scene, ShapesImages

KINDS = (SHAPES, COLOURS, TEXTURES, BACKGROUNDS)
RATIO = 50.0
TRAIN, TEST = 1500, 600

TEMPLATES = ("a picture of a {}.", "a photo of something {}.", "a {} thing.", "there is a {}.")
"""The first serves where a method takes a single one."""

FIRST_SEED = 10**7
"""Of scenes; those of the other streams are below."""


def attributes_dataset(part: str = "stream") -> Dataset:
    """1,500 training and 600 test scenes in the shifted style. `dev` has others, and another choice of rare words."""
    dev = part == "dev"
    words = [word for kind in KINDS for word in kind]
    order = np.random.default_rng([20, dev]).permutation(len(words))  # so that a task has words of several kinds
    train, test = (_scenes(split, dev, order) for split in (0, 1))
    return Dataset("attributes:dev" if dev else "attributes", tuple(words[i] for i in order), train, test, TEMPLATES)


def _scenes(split: int, dev: bool, order: np.ndarray) -> LabelSets:
    """Training (0) or test scenes (1), with a column per word in that order."""
    rng, n = np.random.default_rng([21, split, dev]), (TRAIN, TEST)[split]
    kinds = [rng.choice(len(kind), n, p=_shares(len(kind), split, [22, dev, i])) for i, kind in enumerate(KINDS)]
    starts = np.cumsum([0, *map(len, KINDS)])
    targets = np.zeros((n, starts[-1]), dtype=bool)
    for start, chosen in zip(starts, kinds, strict=False):
        targets[np.arange(n), start + chosen] = True
    first = FIRST_SEED * (1 + 2 * dev + split)
    scenes = [Scene(*map(int, drawn), seed=first + i) for i, drawn in enumerate(zip(*kinds, strict=True))]
    return LabelSets.of(ShapesImages(scenes, np.full(n, -1), SHIFTED), targets[:, order])


def _shares(words: int, split: int, seed: list[int]) -> np.ndarray:
    """How often each word of a kind is drawn."""
    if split:
        return np.full(words, 1 / words)
    places = np.random.default_rng(seed).permutation(words)
    shares = RATIO ** (-places / (words - 1))
    return shares / shares.sum()

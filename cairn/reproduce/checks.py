"""What is wrong, if the first figures are not reached: found out by changing one thing after the other.

Zero-shot accuracy has no training in it. If it is not what was published, towers, images, prompts or class order are others. Each
of them is varied on a sample of the test images, and the variation under which the figure would be reached is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cairn.data.catalogue import SETTING_A_TEMPLATE
from cairn.data.images import Dataset
from cairn.data.stream import class_order, task_sizes
from cairn.errors import counted
from cairn.reproduce.figures import Copy, Figure
from cairn.reproduce.plan import Reproduction, embedded
from cairn.towers.clip import ClipTowers
from cairn.towers.preprocessing import CLIP_MEAN, CLIP_STD
from cairn.towers.protocol import Towers

TOLERANCE = 0.005
"""Of a method that draws nothing: copies of a data set that the field itself uses differ by as much."""

EXACT = 0.0006
"""What is left between equal results: figures are rounded to a hundredth of a percent, and arithmetic differs between machines."""

MOST_IMAGES = 2000
"""Test images on which variations are tried."""

TEMPLATES = ("a photo of a {}.", SETTING_A_TEMPLATE, "a {}", "{}")
"""Prompts that published code uses."""

ORDERS = ("natural", "seed:1993")
"""Class orders that published code uses."""

PLAIN = (0.5, 0.5, 0.5)
"""Mean and deviation of pixels as image networks other than CLIP take them."""


@dataclass(frozen=True)
class Curve:
    """Accuracy on the classes seen after each task: its mean, and the last."""

    average: float
    last: float


@dataclass(frozen=True)
class Cause:
    """What may be wrong: `otherwise` is how it would have to be, `expected` what that would give."""

    what: str
    otherwise: str
    expected: Curve

    def __str__(self) -> str:
        return f"{self.what}: {self.otherwise} would give {100 * self.expected.average:.1f} / {100 * self.expected.last:.1f}"


def copy_differences(expected: Copy | None, dataset: Dataset) -> list[str]:
    """How a copy of a data set differs in size from the published one."""
    if expected is None:
        return []
    counts = {
        "classes": (expected.classes, len(dataset.classes)),
        "training images": (expected.train, len(dataset.train)),
        "test images": (expected.test, len(dataset.test)),
    }
    found = [
        f"{have:,} {what}, published {wanted:,}"
        for what, (wanted, have) in counts.items()
        if wanted is not None and wanted != have
    ]
    return [f"split: the copy has {' and '.join(found)}"] if found else []


def distance(figure: Figure, found: Curve) -> float:
    """The larger of the differences of average and last, of those that were published."""
    pairs = ((figure.average, found.average), (figure.last, found.last))
    return max((abs(found - wanted) for wanted, found in pairs if wanted is not None), default=0.0)


def likely_causes(
    reproduction: Reproduction,
    dataset: Dataset,
    towers: Towers,
    figure: Figure,
    found: Curve,
    own: Sequence[str] = (),
) -> list[Cause]:
    """Variations under which zero-shot would reach the figure, the nearest first; empty if none would. `own` are the data set's
    templates, where the setting has others.

    The effect of a variation is its difference from what is there on the same images, at most `MOST_IMAGES`.
    """
    rows = _sample(dataset)
    labels = torch.from_numpy(np.asarray(dataset.test.labels)[rows])
    templates = dataset.templates
    features = embedded(towers, dataset.test, rows)
    texts = towers.class_texts(dataset.classes, templates).cpu()
    order = class_order(reproduction.setting.order, dataset.classes)
    present_scores = _scores(features, texts)
    present = curve(present_scores, labels, order, reproduction.base, reproduction.step)
    answers = present_scores.argmax(1)
    near: list[Cause] = []

    def tried(what: str, otherwise: str, scores: Tensor, order: np.ndarray = order) -> None:
        """Kept, if it would give the figure: but for one image, whose classes may be level, where all test images are tried, else
        within two deviations of what a sample can tell, of images that are answered otherwise."""
        other = curve(scores, labels, order, reproduction.base, reproduction.step)
        expected = Curve(found.average + other.average - present.average, found.last + other.last - present.last)
        changed = int((scores.argmax(1) != answers).sum())
        chance = (1.5 if len(rows) == len(dataset.test) else 2 * changed**0.5) / len(rows)
        if distance(figure, expected) <= max(EXACT, chance) and distance(figure, expected) < distance(figure, found):
            near.append(Cause(what, otherwise, expected))

    for name in ORDERS:
        if name != reproduction.setting.order:
            tried("class order", f"--order {name}", present_scores, class_order(name, dataset.classes))
    for others in dict.fromkeys((tuple(own), *((template,) for template in (*TEMPLATES, templates[0])))):
        if others and others != tuple(templates) and towers.has_images:
            other_texts = towers.class_texts(dataset.classes, others).cpu()
            tried("prompts", f"{_told(others)} in place of {_told(templates)}", _scores(features, other_texts))
    if isinstance(towers, ClipTowers):
        for what, otherwise, varied in _other_towers(towers):
            other_texts = varied.class_texts(dataset.classes, templates).cpu()
            tried(what, otherwise, _scores(embedded(varied, dataset.test, rows), other_texts))
    return sorted(near, key=lambda cause: distance(figure, cause.expected))


def _other_towers(towers: ClipTowers) -> Iterator[tuple[str, str, ClipTowers]]:
    """The same weights, read otherwise."""
    other = "gelu" if towers.activation == "quick_gelu" else "quick_gelu"
    yield "activation", f"{other} in place of {towers.activation}", towers.varied(activation=other)
    read = towers.preprocessing
    mode = "squash" if read.mode == "crop" else "crop"
    yield "preprocessing", f"{mode} in place of {read.mode}", towers.varied(preprocessing=read.with_mode(mode))
    for what, mean, std in (
        ("mean and deviation .5", PLAIN, PLAIN),
        ("CLIP's mean and deviation", CLIP_MEAN, CLIP_STD),
    ):
        if (read.mean, read.std) != (mean, std):
            normalized = read.model_copy(update={"mean": mean, "std": std})
            yield "preprocessing", f"{what} in place of the checkpoint's", towers.varied(preprocessing=normalized)


def curve(scores: Tensor, labels: Tensor, order: np.ndarray, base: int, step: int) -> Curve:
    """Accuracy of scores (n, k), columns and labels in natural order, over a stream in that order."""
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.from_numpy(np.asarray(order))] = torch.arange(len(order))
    arrived, columns = place[labels], scores[:, torch.from_numpy(np.asarray(order))]
    accuracies = []
    for seen in accumulate(task_sizes(len(order), base, step)):
        rows = arrived < seen
        if rows.any():
            accuracies.append(float((columns[rows, :seen].argmax(1) == arrived[rows]).float().mean()))
    return Curve(float(np.mean(accuracies)), accuracies[-1])


def _scores(features: Tensor, texts: Tensor) -> Tensor:
    return normalize(features.float(), dim=-1) @ texts.float().T


def _sample(dataset: Dataset) -> np.ndarray:
    n = len(dataset.test)
    if n <= MOST_IMAGES:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, MOST_IMAGES, replace=False))


def _told(templates: Sequence[str]) -> str:
    return f"'{templates[0]}'" if len(templates) == 1 else f"the mean of {counted(len(templates), 'template')}"

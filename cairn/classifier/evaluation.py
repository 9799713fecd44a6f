"""How a learner does on labelled images: the classification report, calibration, unknown images, and what is mixed up.

Letters: n images of known classes, k classes; C confusion matrix (k x k), row the class, column the class predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cairn.classifier.estimate import ConfusedPair, confused_pairs, confusion_counts
from cairn.classifier.predictions import Predictions
from cairn.data.names import normal_form
from cairn.errors import InvalidInput
from cairn.maths.calibration_error import (
    calibration_error,
    calibration_error_by_chance,
    negative_log_likelihood,
)

EXAMPLES = 4
"""Images that are named of a pair, at most."""


@dataclass(frozen=True)
class ClassReport:
    """Of one class. A share of nothing is 0, as scikit-learn has it."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """Images of the class."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Of images with labels. Those whose label is no class of the learner are `foreign`: they count for `unknown` alone."""

    predictions: Predictions
    """Of all images that can be read, with known scores."""
    names: Sequence[str]
    """The label of each of these."""
    images: Sequence[str]
    """What each of these is called."""
    unknown_below: float = 0.05
    """The known score below which an image counts as unknown."""
    learned: int = 0
    """How many of these the learner learned: the figures of them tell nothing of new images."""

    @cached_property
    def labels(self) -> np.ndarray:
        """The class number of each image, -1 for foreign ones."""
        numbers = {normal_form(str(name)): c for c, name in enumerate(self.predictions.classes)}
        return np.array([numbers.get(normal_form(name), -1) for name in self.names], dtype=np.int64)

    @property
    def known(self) -> np.ndarray:
        """Rows of images of known classes."""
        return np.flatnonzero(self.labels >= 0)

    @property
    def foreign(self) -> dict[str, int]:
        """Labels that are no class of the learner, and how many images have them."""
        found: dict[str, int] = {}
        for row in np.flatnonzero(self.labels < 0).tolist():
            found[self.names[row]] = found.get(self.names[row], 0) + 1
        return found

    @cached_property
    def predicted(self) -> np.ndarray:
        """The number of the likeliest class of each image."""
        return self.predictions.scores.argmax(1).numpy()

    @cached_property
    def confusion(self) -> np.ndarray:
        """C, of images of known classes."""
        rows = self.known
        return confusion_counts(self.predicted[rows], self.labels[rows], len(self.predictions.classes))

    def topk(self, k: int) -> float:
        """Share of images of known classes whose class is among the k likeliest. Raises InvalidInput without any."""
        if not len(rows := self._some()):
            return 0.0
        best = self.predictions.scores[rows].topk(min(k, len(self.predictions.classes)), 1).indices.numpy()
        return float((best == self.labels[rows, None]).any(1).mean())

    @property
    def accuracy(self) -> float:
        """Share of images of known classes that are classified correctly."""
        return self.topk(1)

    @property
    def class_mean_accuracy(self) -> float:
        """Mean of the recalls of the classes that have images."""
        self._some()
        return float(np.mean([one.recall for one in self.by_class if one.support]))

    @cached_property
    def by_class(self) -> list[ClassReport]:
        C, found = self.confusion, []
        for c, name in enumerate(self.predictions.classes):
            hits, said, support = C[c, c], C[:, c].sum(), C[c].sum()
            precision, recall = hits / max(said, 1), hits / max(support, 1)
            f1 = 2 * hits / max(said + support, 1)
            found.append(ClassReport(str(name), float(precision), float(recall), float(f1), int(support)))
        return found

    @property
    def ece(self) -> float:
        """Expected calibration error in 15 bins, over images of known classes."""
        rows = self._some()
        return calibration_error(self._confidence, (self.predicted[rows] == self.labels[rows]).tolist())

    @property
    def ece_by_chance(self) -> float:
        """What it would be on average if the probabilities were perfect: with few images that is most of it."""
        return calibration_error_by_chance(self._confidence)

    @property
    def _confidence(self) -> list[float]:
        return self.predictions.probabilities[self._some()].amax(1).tolist()

    @property
    def nll(self) -> float:
        """Mean of -log p of the true class, in nats, p at least 1e-30."""
        rows = self._some()
        p = self.predictions.probabilities[rows, self.labels[rows]].double().clamp_min(1e-30)
        return negative_log_likelihood(p.log().tolist())

    @property
    def lost(self) -> float | None:
        """Share of images of known classes that are called unknown; None without any."""
        return self._unknown(self.known)

    @property
    def found_unknown(self) -> float | None:
        """Share of foreign images that are called unknown; None without any."""
        return self._unknown(np.flatnonzero(self.labels < 0))

    def _unknown(self, rows: np.ndarray) -> float | None:
        return float((self.predictions.known_scores()[rows] < self.unknown_below).mean()) if len(rows) else None

    @property
    def confused(self) -> list[ConfusedPair]:
        """Pairs of classes that are taken for one another, those of the most images first."""
        return confused_pairs(self.confusion)

    def examples(self, pair: ConfusedPair) -> list[int]:
        """Rows of images of one of the two that are taken for the other, the surest first."""
        found = [
            row
            for a, b in ((pair.a, pair.b), (pair.b, pair.a))
            for row in np.flatnonzero((self.labels == a) & (self.predicted == b)).tolist()
        ]
        sure = self.predictions.probabilities.amax(1)
        return sorted(found, key=lambda row: -float(sure[row]))[:EXAMPLES]

    def _some(self) -> np.ndarray:
        if not len(rows := self.known):
            raise InvalidInput("no image is of a class that the learner knows; nothing can be evaluated")
        return rows

    def report(self, topk: int = 5, advice: Sequence[str] = ()) -> dict[str, Any]:
        """All of it as JSON holds it. `advice` has a line for each of the first of `confused`."""
        names = list(map(str, self.predictions.classes))
        pairs = self.confused
        return {
            "images": len(self.names),
            "learned": self.learned,
            "accuracy": self.accuracy,
            f"top{topk}": self.topk(topk),
            "class_mean_accuracy": self.class_mean_accuracy,
            "ece": self.ece,
            "ece_by_chance": self.ece_by_chance,
            "nll": self.nll,
            "unknown": {
                "below": self.unknown_below,
                "known_called_unknown": self.lost,
                "foreign_called_unknown": self.found_unknown,
                "foreign_labels": self.foreign,
            },
            "classes": [vars(one) for one in self.by_class],
            "confusion": {"classes": names, "counts": self.confusion.astype(int).tolist()},
            "confused": [
                {
                    "classes": [names[pair.a], names[pair.b]],
                    "images": [int(pair.a_as_b), int(pair.b_as_a)],
                    "examples": [self.images[row] for row in self.examples(pair)],
                    **({"advice": said} if said else {}),
                }
                for pair, said in zip(pairs, [*advice, *[""] * len(pairs)], strict=False)
            ],
            "unreadable": len(self.predictions.unreadable),
        }

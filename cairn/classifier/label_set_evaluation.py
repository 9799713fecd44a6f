"""How a learner does on images that may show several classes: average precision, and precision, recall and F1 of what it says.

Letters: n images, k classes; Y what they show and S what they are said to show, both (n, k) of bool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cairn.classifier.predictions import Predictions
from cairn.data.images import Images
from cairn.data.names import normal_form
from cairn.errors import InvalidInput
from cairn.maths.average_precision import average_precision
from cairn.maths.calibration_error import calibration_error, calibration_error_by_chance
from cairn.maths.f1 import macro_f1, micro_f1
from cairn.maths.frequency import ByFrequency, by_frequency


@dataclass(frozen=True)
class LabelReport:
    """Of one class. A share of nothing is 0, as scikit-learn has it."""

    name: str
    precision: float
    recall: float
    f1: float
    average_precision: float | None
    """None where no image shows the class."""
    support: int
    """Images that show it."""
    threshold: float


@dataclass(frozen=True, eq=False)
class LabelSetEvaluation:
    """Of images with sets of labels. Labels that are no class of the learner are `foreign`, and passed over."""

    predictions: Predictions
    """Of all images that can be read."""
    targets: np.ndarray
    """Y."""
    foreign: dict[str, int]
    """Labels that are no class of the learner, and how many images have them."""
    images: Sequence[str]
    """What each image is called."""
    counts: Sequence[int]
    """Images that each class was learned from."""
    threshold: float | None = None
    """In place of the classes' own."""
    learned: int = 0
    """How many of these the learner learned: the figures of them tell nothing of new images."""

    @classmethod
    def of(
        cls,
        predictions: Predictions,
        sets: Sequence[list[str]],
        given: Images,
        counts: Sequence[int],
        threshold: float | None = None,
        learned: int = 0,
    ) -> LabelSetEvaluation:
        """Of predictions for the images `given` that show these classes. Raises ConfigError for a threshold that is none, InvalidInput
        where no image shows a class of the learner."""
        numbers = {normal_form(str(name)): c for c, name in enumerate(predictions.classes)}
        targets = np.zeros((len(predictions), len(numbers)), dtype=bool)
        foreign: dict[str, int] = {}
        rows = predictions.positions.tolist()
        for at, row in enumerate(rows):
            for name in dict.fromkeys(sets[row]):
                if (c := numbers.get(normal_form(name))) is None:
                    foreign[name] = foreign.get(name, 0) + 1
                else:
                    targets[at, c] = True
        predictions.shown(threshold)
        if not targets.any():
            raise InvalidInput("no image shows a class that the learner knows; nothing can be evaluated")
        return cls(predictions, targets, foreign, [given.describe(row) for row in rows], counts, threshold, learned)

    @cached_property
    def said(self) -> np.ndarray:
        """S."""
        return self.predictions.shown(self.threshold)

    @cached_property
    def by_class(self) -> list[LabelReport]:
        hits, said, shows = (self.said & self.targets).sum(0), self.said.sum(0), self.targets.sum(0)
        found, thresholds = [], self.predictions.thresholds
        assert thresholds is not None
        for c, name in enumerate(self.predictions.classes):
            right = int(hits[c])
            found.append(
                LabelReport(
                    str(name),
                    right / max(1, int(said[c])),
                    right / max(1, int(shows[c])),
                    2 * right / max(1, int(said[c] + shows[c])),
                    self.average_precision[c],
                    int(shows[c]),
                    float(thresholds[c]) if self.threshold is None else self.threshold,
                )
            )
        return found

    @cached_property
    def average_precision(self) -> list[float | None]:
        """Of each class, over all images: how well its probability ranks them."""
        return average_precision(self.predictions.probabilities, torch.from_numpy(self.targets))

    @property
    def mean_average_precision(self) -> float:
        """Over the classes that an image shows, every class counted the same."""
        return float(np.mean([value for value in self.average_precision if value is not None]))

    @property
    def by_frequency(self) -> ByFrequency | None:
        """That of frequent and of rare classes, by the images that they were learned from; None where all have as many."""
        known = [c for c, value in enumerate(self.average_precision) if value is not None]
        values = [self.average_precision[c] or 0.0 for c in known]
        return by_frequency(values, [self.counts[c] for c in known])

    @property
    def micro_f1(self) -> float:
        """Of all decisions together: 2 |S and Y| / (|S| + |Y|)."""
        return micro_f1(*self._decisions) or 0.0

    @property
    def macro_f1(self) -> float:
        """Mean of the classes' F1, over those that an image shows."""
        return macro_f1(*self._decisions) or 0.0

    @property
    def _decisions(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.said), torch.from_numpy(self.targets)

    @property
    def exact(self) -> float:
        """Share of images of which all classes are told and no other."""
        return float((self.said == self.targets).all(1).mean())

    @property
    def ece(self) -> float:
        """Expected calibration error in 15 bins, over all decisions: how far probabilities are from how often they are right."""
        return calibration_error(self._probabilities, self.targets.ravel().tolist())

    @property
    def ece_by_chance(self) -> float:
        """What it would be on average if the probabilities were perfect and images were shown apart from one another."""
        return calibration_error_by_chance(self._probabilities)

    @property
    def _probabilities(self) -> list[float]:
        return self.predictions.probabilities.flatten().tolist()

    def report(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        grouped = self.by_frequency
        return {
            "images": len(self.targets),
            "learned": self.learned,
            "mAP": self.mean_average_precision,
            "mAP_by_frequency": None if grouped is None else dict(grouped.means),
            "frequency_terciles": grouped is not None and grouped.terciles,
            "micro_f1": self.micro_f1,
            "macro_f1": self.macro_f1,
            "exact": self.exact,
            "ece": self.ece,
            "ece_by_chance": self.ece_by_chance,
            "foreign_labels": self.foreign,
            "classes": [vars(one) for one in self.by_class],
            "unreadable": len(self.predictions.unreadable),
        }

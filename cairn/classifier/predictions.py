"""What a classifier makes of images in one pass: scores, probabilities, known scores and reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cairn.classifier.novelty import require_threshold
from cairn.errors import ConfigError
from cairn.maths.overlap import pixel_classes
from cairn.types import Scores


@dataclass(frozen=True)
class Predictions:
    """Of n images among k classes. Every image went through the tower once, whatever is read from here."""

    classes: np.ndarray
    """(k,), names in the order of the columns."""
    scores: Scores
    """(n, k), as the method gives them; higher is likelier."""
    probabilities: Scores
    """(n, k), rows sum to 1; see `cairn.classifier.calibration`. Where images may show several classes, of each by itself."""
    known: np.ndarray | None = None
    """(n,) in [0, 1]: how well each image fits the classes that are known, if that was asked for."""
    reasons: list[list[dict[str, Any]]] | None = None
    """For each image its likeliest classes, if they were asked for: `name`, `score`, `probability`, and of SPA `patches`."""
    patch_grid: int | None = None
    """Patches along a side of an image, where reasons name patches."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Images that have no row here, by their position among those given, and why they cannot be read."""
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(n,), which of the images given each row is of."""
    segments: Float[Tensor, "n c g g"] | None = None
    """Where reasons were asked for and the method finds objects: the probabilities of every patch, column 0 the background."""
    thresholds: np.ndarray | None = None
    """(k,), where images may show several classes: from this probability on one is said to be shown."""

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of several batches, one at least, as one."""
        first, whys = parts[0], [part.reasons for part in parts if part.reasons is not None]
        knowns = [part.known for part in parts if part.known is not None]
        segments = [part.segments for part in parts if part.segments is not None]
        return cls(
            first.classes,
            torch.cat([part.scores for part in parts]),
            torch.cat([part.probabilities for part in parts]),
            np.concatenate(knowns) if knowns else None,
            [why for part in whys for why in part] if whys else None,
            next((part.patch_grid for part in parts if part.patch_grid is not None), None),
            {row: said for part in parts for row, said in part.unreadable.items()},
            np.concatenate([part.positions for part in parts]),
            torch.cat(segments) if segments else None,
            first.thresholds,
        )

    def moved(self, by: int) -> Predictions:
        """With positions counted from `by` further back."""
        bad = {row + by: said for row, said in self.unreadable.items()}
        return replace(self, positions=self.positions + by, unreadable=bad)

    def known_scores(self) -> np.ndarray:
        """`known`. Raises ConfigError where it was not asked for."""
        if self.known is None:
            raise ConfigError("known scores were not asked for; call predictions(images, known=True)")
        return self.known

    def told_reasons(self) -> list[list[dict[str, Any]]]:
        """`reasons`. Raises ConfigError where they were not asked for."""
        if self.reasons is None:
            raise ConfigError("reasons were not asked for; call predictions(images, reasons=3)")
        return self.reasons

    def masks(self, side: int) -> np.ndarray:
        """(n, side, side): of each pixel of what the tower saw of an image 0 for the background, c + 1 for class number c. Raises
        ConfigError where objects are not found, or were not asked for."""
        if not len(self):
            return np.zeros((0, side, side), dtype=np.int64)
        if self.reasons is None:
            raise ConfigError("objects were not asked for; call predictions(images, reasons=1)")
        if self.segments is None:
            raise ConfigError(
                "this learner does not tell where in a picture a class is: only one of method 'segment' that has learned from masks "
                "does, as a run on data with masks keeps it (cairn run segment --keep-learner)"
            )
        return pixel_classes(self.segments, side, side).numpy()

    def shown(self, threshold: float | None = None) -> np.ndarray:
        """(n, k) of bool: which classes each image is said to show, by its probabilities and the classes' thresholds, or by one for
        all. Raises ConfigError where an image shows one class."""
        if self.thresholds is None:
            raise ConfigError("images of this learner show one class each, so there is no threshold; leave it out")
        if threshold is not None:
            require_threshold(threshold, "threshold")
        return self.probabilities.numpy() >= (self.thresholds if threshold is None else threshold)

    def sets(self, threshold: float | None = None) -> list[list[tuple[str, float]]]:
        """For each image the classes that it is said to show with their probabilities, the likeliest first."""
        shown = self.shown(threshold)
        order, p = self.probabilities.argsort(stable=True, dim=1, descending=True), self.probabilities.tolist()
        return [
            [(str(self.classes[c]), p[row][c]) for c in own if shown[row, c]] for row, own in enumerate(order.tolist())
        ]

    def labels(self, unknown_below: float | None = None, threshold: float | None = None) -> np.ndarray:
        """(n,), the likeliest class; with `unknown_below` in [0, 1], None where the known score is below it. Where images may show
        several classes, a tuple of those that each is said to show, the likeliest first, maybe none; with `threshold` by this one
        for every class."""
        if self.thresholds is not None or threshold is not None:
            sets = np.empty(len(self), dtype=object)
            for row, own in enumerate(self.sets(threshold)):
                sets[row] = tuple(name for name, _ in own)
            return sets
        found = self.classes[self.scores.argmax(1).numpy()] if len(self) else np.array([], dtype=object)
        if unknown_below is not None:
            require_threshold(unknown_below, "unknown_below")
            found[self.known_scores() < unknown_below] = None
        return found

    def topk(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k likeliest classes with their probabilities, the likeliest first."""
        if k < 1:
            raise ConfigError(f"k {k}: must be at least 1")
        best = self.probabilities.topk(min(k, len(self.classes)), 1)
        return [
            [(str(self.classes[c]), value) for c, value in zip(row, values, strict=True)]
            for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

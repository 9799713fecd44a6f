"""How well a learner tells where in images their class is: intersection over union with masks of their objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cairn.classifier.evaluation import Evaluation
from cairn.data.decoding import decoded, reason
from cairn.errors import DataError, one_line
from cairn.maths.overlap import confusion, overlaps
from cairn.towers.masks import in_view
from cairn.towers.preprocessing import decoded_side
from cairn.towers.protocol import Towers

if TYPE_CHECKING:
    from cairn.classifier.classifier import IncrementalClassifier


@dataclass(frozen=True, eq=False)
class ObjectEvaluation:
    """Of n images of classes that are known: of each pixel, as the tower sees the image, what was `found` there and what the `truth`
    is, (n, s, s): 0 the background, c + 1 class number c."""

    classes: Sequence[str]
    files: Sequence[Path]
    images: np.ndarray
    """What the tower saw, uint8 (n, s, s, 3)."""
    found: np.ndarray
    truth: np.ndarray

    @classmethod
    def of(
        cls, learner: IncrementalClassifier, found: Evaluation, files: Sequence[Path], masks: Sequence[Path]
    ) -> ObjectEvaluation:
        """Of an evaluation of these files by the learner; what is not black in a picture's mask is its object. Raises ConfigError
        where the learner does not find objects, DataError for a mask that cannot be read or has another shape than its picture."""
        rows, towers = found.known.tolist(), learner.method_.towers
        taken = found.predictions.positions[rows].tolist()
        files = [files[row] for row in taken]
        seen, inside = [np.zeros((0, 1, 1, 3), np.uint8)], []
        for file, row in zip(files, taken, strict=True):
            picture = decoded(file, decoded_side(towers))
            seen.append(towers.prepare(picture).permute(1, 2, 0).numpy()[None])
            inside.append(_mask(masks[row], picture.size, towers))
        seen = np.concatenate(seen[1:] or seen)
        predicted = learner.segment(list(map(str, files)), side=seen.shape[1])
        inside = np.array(inside, dtype=bool).reshape(predicted.shape)
        truth = np.where(inside, found.labels[rows][:, None, None] + 1, 0)
        return cls(list(map(str, found.predictions.classes)), files, seen, predicted, truth)

    @cached_property
    def iou(self) -> list[float | None]:
        """Of the background, and of each class; None for one that no image shows."""
        truth, found = (torch.from_numpy(part.astype(np.int64)).flatten() for part in (self.truth, self.found))
        return overlaps(confusion(truth, found, len(self.classes) + 1))

    @property
    def mean_iou(self) -> float | None:
        """Over the background and the classes that an image shows; None without an image."""
        known = [value for value in self.iou if value is not None]
        return float(np.mean(known)) if known else None

    def report(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        background, *classes = self.iou
        return {
            "images": len(self.files),
            "mIoU": self.mean_iou,
            "background": background,
            "classes": {name: value for name, value in zip(self.classes, classes, strict=True) if value is not None},
        }


def _mask(path: Path, size: tuple[int, int], towers: Towers) -> np.ndarray:
    """Where the object is in what the tower sees of a picture of this size, bool (s, s)."""
    try:
        picture = np.asarray(decoded(path))
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        raise DataError(f"mask '{one_line(path)}': cannot be read ({reason(error)}); each picture needs one") from None
    return in_view(np.any(picture > 0, 2), size, towers, f"mask '{one_line(path)}'")

"""Images in, predictions out, batch by batch: one pass of the tower for each image, whatever is asked of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cairn.classifier.calibration import Calibration
from cairn.classifier.label_sets import LearnedSets
from cairn.classifier.novelty import Novelty
from cairn.classifier.predictions import Predictions
from cairn.data.decoding import decoded, reason
from cairn.data.folders import unreadable
from cairn.data.in_memory import InMemoryImages, Item
from cairn.data.loading import Loader
from cairn.errors import DataError, NotFinite, one_line
from cairn.methods.protocol import Method, PatchReasons, Segments
from cairn.storage.tensors import first_not_finite
from cairn.towers.cached import CachedTowers
from cairn.towers.preprocessing import decoded_side
from cairn.types import Features, Scores

BATCH = 64
"""Images scored at once."""


class ReadableImages(InMemoryImages):
    """Images of which the files that cannot be read are noted in `unreadable`, with why, and stood in for by a grey one."""

    def __init__(self, items: Sequence[Item], width: int | None, side: int | None = None):
        super().__init__(items, np.zeros(len(items), dtype=np.int64), width, side)
        self.unreadable: dict[int, str] = {}

    def _picture(self, index: int, side: int | None) -> Image.Image:
        item = self.items[index]
        if not isinstance(item, (str, os.PathLike)):
            return super()._picture(index, side)
        try:
            return decoded(Path(item), side)
        except Exception as error:  # a decoder fed with damaged bytes may raise anything
            self.unreadable[index] = reason(error)
            return Image.new("RGB", (64, 64))


@dataclass(frozen=True)
class Scorer:
    """A method as it stands, with what makes answers of its scores. Learning later changes none of it."""

    method: Method
    classes: np.ndarray
    calibration: Calibration
    novelty: Novelty | None
    """For known scores, if they are asked for."""
    reasons: int
    """Of so many of the likeliest classes reasons are given."""
    width: int | None
    """Numbers in a row, where embeddings are scored."""
    sets: LearnedSets | None = None
    """Where images may show several classes: what makes probabilities in place of `calibration`."""

    @torch.no_grad()
    def batches(self, items: Sequence[Item], size: int = BATCH) -> Iterator[Predictions]:
        """Predictions for at most `size` items each, in order. Files that cannot be read have no row in theirs."""
        if isinstance(self.method.towers, CachedTowers):
            yield from self._from_store(self.method.towers, items, size)
            return
        towers, start = self.method.towers, 0
        images = ReadableImages(items, self.width, decoded_side(towers))
        for pixels, _ in Loader(images, towers.prepare, towers.pixels, batch=size, cache_bytes=0).ordered():
            here = range(start, start + len(pixels))
            bad = {row: images.unreadable[row] for row in here if row in images.unreadable}
            rows = np.array([row for row in here if row not in bad], dtype=np.int64)
            if bad:
                pixels = pixels[torch.from_numpy(rows - start).to(pixels.device)]
            yield self._predictions(self.method.embed(pixels), images, rows, bad) if len(rows) else self.nothing(bad)
            start = here.stop

    def _from_store(self, towers: CachedTowers, items: Sequence[Item], size: int) -> Iterator[Predictions]:
        """The same, where embeddings are kept: those that are missing are made for all items before the first answer."""
        images = InMemoryImages(items, np.zeros(len(items), dtype=np.int64), self.width, decoded_side(towers))
        rows, bad, features = np.arange(len(items)), dict[int, str](), list[Features]()
        while len(rows):
            placed = towers.placed(images.taken(rows))
            try:
                loader = Loader(placed, towers.prepare, towers.pixels, batch=size, cache_bytes=0)
                features = [self.method.embed(places) for places, _ in loader.ordered()]
                break
            except DataError:
                found = {int(rows[row]): said for row, said in unreadable(placed.images, whole=True).items()}
                if not found:
                    raise
                bad |= found
                rows = np.setdiff1d(rows, list(found))
        if bad:
            yield self.nothing(bad)
        for part, here in zip(features, np.split(rows, range(size, len(rows), size)), strict=False):
            yield self._predictions(part, images, here, {})

    def _predictions(
        self, features: Features, images: InMemoryImages, rows: np.ndarray, bad: dict[int, str]
    ) -> Predictions:
        scores = self.method.scores(features).cpu()
        if (row := first_not_finite(scores)) is not None:  # no class is the answer then
            raise NotFinite(
                f"{one_line(images.describe(rows[row]))}: scores that are not finite; the weights or the image hold NaN"
            )
        telling = self.method if isinstance(self.method, PatchReasons) and self.method.has_reasons else None
        if self.sets is None:
            probabilities = self.calibration.log_probabilities(scores).exp()
        else:
            probabilities = self.sets.rule.probabilities(scores)
        return Predictions(
            self.classes,
            scores,
            probabilities,
            None if self.novelty is None else self.novelty.known(features, scores),
            self._reasons(features, scores, probabilities) if self.reasons else None,
            telling.patch_grid(features) if self.reasons and telling is not None else None,
            bad,
            rows,
            self._segments(features) if self.reasons else None,
            self._thresholds,
        )

    def _segments(self, features: Features) -> Tensor | None:
        method = self.method
        return method.segment(features).cpu() if isinstance(method, Segments) and method.finds_objects else None

    @property
    def _thresholds(self) -> np.ndarray | None:
        return None if self.sets is None else self.sets.thresholds

    def nothing(self, bad: dict[int, str]) -> Predictions:
        """Where no image can be read, or there is none."""
        none = torch.zeros(0, len(self.classes))
        known = None if self.novelty is None else np.zeros(0)
        whys = [] if self.reasons else None
        return Predictions(self.classes, none, none.double(), known, whys, None, bad, thresholds=self._thresholds)

    def _reasons(self, features: Features, scores: Scores, probabilities: Scores) -> list[list[dict[str, Any]]]:
        """For each row its likeliest classes and what speaks for them."""
        method, found = self.method, []
        for row, own in enumerate(scores):
            if isinstance(method, PatchReasons) and method.has_reasons:
                classes = method.reasons(features[row : row + 1], self.reasons)
            else:
                top = own.topk(min(self.reasons, len(own))).indices.tolist()
                classes = [{"class": c, "score": own[c].item()} for c in top]
            found.append(
                [
                    told
                    | {
                        "name": str(self.classes[told["class"]]),
                        "probability": probabilities[row, told["class"]].item(),
                    }
                    for told in classes
                ]
            )
        return found

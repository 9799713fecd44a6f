"""What a classifier says of images, once it has learned."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, overload

import numpy as np
import torch

from cairn.classifier.advice import advice, alike_names
from cairn.classifier.comparison import drift_of_images
from cairn.classifier.drift import Drift
from cairn.classifier.estimate import ConfusedPair
from cairn.classifier.evaluation import Evaluation
from cairn.classifier.fitted import Fitted, require_classes
from cairn.classifier.inputs import Labelled, Labels, NameSet, labelled, labelled_sets, readable, skips, unlabelled
from cairn.classifier.label_set_evaluation import LabelSetEvaluation
from cairn.classifier.novelty import Novelty, require_threshold
from cairn.classifier.predictions import Predictions
from cairn.classifier.scoring import BATCH, Scorer
from cairn.data.folders import named_unreadable, unreadable
from cairn.data.in_memory import InMemoryImages, Item, items_of
from cairn.data.names import normal_form
from cairn.data.templates import prompt_templates
from cairn.errors import ConfigError, DataError, UnreadableImages
from cairn.storage.locks import ReadWriteLock
from cairn.towers.catalogue import load_towers
from cairn.towers.feature_file import ROWS, is_features_file, open_features_towers, require_no_images_asked
from cairn.towers.preprocessing import asked_mode, decoded_side
from cairn.towers.protocol import Towers
from cairn.training.context import Log

AHEAD = 16
"""Batches for which images are taken from a generator at once."""


class Predicting(Fitted):
    """Base of a classifier: classes, scores, masks and reasons of images, and measures of how they are classified.

    The attributes are arguments of the constructor, the towers once they are loaded, and what keeps learning and predicting apart.
    """

    towers: str | os.PathLike[str] | Towers
    templates: Sequence[str] | str
    seed: int
    device: str
    precision: str
    preprocess: Literal["crop", "squash"] | None
    decode: Literal["whole", "reduced"]
    revision: str | None
    _towers: Towers | None
    _novelty: Novelty | None
    _lock: ReadWriteLock

    @torch.no_grad()
    def predictions(
        self,
        images: Item | Iterable[Item],
        *,
        known: bool = False,
        reasons: int = 0,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> Predictions:
        """Everything that is to be said of images, from one pass of the tower: scores and probabilities; with `known`, how
        well each fits the classes that are known; with `reasons`, why it looks like so many of its likeliest classes.

        With `on_bad_image="skip"` images that cannot be read have no row and are listed in `unreadable`, unless that is all of
        them. Raises UnreadableImages, with all such files, otherwise.
        """
        with self._lock.reading():
            skip, scorer = skips(on_bad_image), self._scorer(known, reasons)
            items, parts = items_of(images, self._width), []
            for part in scorer.batches(items):
                if part.unreadable and not skip:
                    raise self.unreadable(items)
                parts.append(part)
            found = Predictions.joined(parts or [scorer.nothing({})])
            if found.unreadable and not len(found):
                raise self.unreadable(items)
            return found

    def stream(
        self,
        images: Item | Iterable[Item],
        *,
        known: bool = False,
        reasons: int = 0,
        on_bad_image: Literal["stop", "skip"] = "skip",
        batch: int = BATCH,
    ) -> Iterator[Predictions]:
        """`predictions` of at most `batch` images each, in order and as they are there: for more images than memory holds
        answers, or than anyone waits for. `positions` and `unreadable` count through all of them.

        Images may come from a generator, which is read a little ahead; only with `on_bad_image="stop"`, where all files are
        read before the first answer, are they gathered first. What is learned meanwhile is for the next call.
        """
        if batch < 1:
            raise ConfigError(f"batch {batch}: must be at least 1")
        skip = skips(on_bad_image)
        with self._lock.reading():
            scorer = self._scorer(known, reasons)
        if not skip or not isinstance(images, Iterator):
            images = items_of(images, self._width)
            if not skip and (error := self.unreadable(images)).reasons:
                raise error
        several, done = iter(images), 0
        while items := list(islice(several, AHEAD * batch)):
            for part in self._locked(scorer.batches(items, batch)):
                yield part.moved(done)
            done += len(items)

    def _locked(self, parts: Iterator[Predictions]) -> Iterator[Predictions]:
        """Each made while nobody learns, none held while it is looked at."""
        while True:
            with self._lock.reading():
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _scorer(self, known: bool, reasons: int) -> Scorer:
        method = self._fitted()
        require_classes(self)
        if known:
            self._require_one_class("known score", "one that shows no class reaches the threshold of none")
        novelty = self._known_scores() if known else None
        return Scorer(method, self.classes_, self.calibration_, novelty, reasons, self._width, self._learned.sets)

    def _known_scores(self) -> Novelty:
        if self._novelty is None:
            self._novelty = Novelty(
                self._fitted(), self.seed, self.references_, self.referenced_among_, calibration=self.calibration_
            )
        return self._novelty

    def unreadable(self, items: Sequence[Item]) -> UnreadableImages:
        """The error that names all of these that cannot be read."""
        given = unlabelled(items, self._width)
        bad = unreadable(given, whole=True)
        return UnreadableImages(f"{named_unreadable(given, bad)}; replace or leave them out", bad)

    def predict(
        self, images: Item | Iterable[Item], unknown_below: float | None = None, threshold: float | None = None
    ) -> np.ndarray:
        """The likeliest class of each image; of a single one, too, an array. With `unknown_below` in [0, 1], None where
        `known_score` is below it.

        Where images may show several classes, a tuple of them for each, the likeliest first: those whose probability reaches their
        `thresholds_`, or `threshold`."""
        if unknown_below is not None:
            require_threshold(unknown_below, "unknown_below")
        return self.predictions(images, known=unknown_below is not None).labels(unknown_below, threshold)

    def predict_proba(self, images: Item | Iterable[Item]) -> np.ndarray:
        """(n, k), columns in the order of `classes_`: softmax of the scores over a temperature, which is fitted on images that
        were left out of learning (see `cairn.classifier.calibration`), so that of images of known classes about as many are
        classified correctly as the largest probabilities say. Where images may show several classes, of each class by itself."""
        return self.predictions(images).probabilities.numpy()

    def predict_topk(self, images: Item | Iterable[Item], k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k likeliest classes with their probabilities, the likeliest first."""
        if k < 1:
            raise ConfigError(f"k {k}: must be at least 1")
        return self.predictions(images).topk(k)

    def known_score(self, images: Item | Iterable[Item]) -> np.ndarray:
        """How well each image fits the classes that are known, (n,) in [0, 1]; see `cairn.classifier.novelty`.

        Of a method that keeps Gaussians: the share of learned images that, left out of the statistics, fitted no better. So
        about `t` of the images of known classes fall below `t`, if they are like those that were learned. Of other methods:
        the largest probability, which promises nothing of the kind.
        """
        known = self.predictions(images, known=True).known
        assert known is not None
        return known

    def score(self, images: Labelled, labels: Labels = None) -> float:
        """Share of images whose class is predicted, or all classes of which are and no other. Raises DataError unless there is a
        label, a text, for each image."""
        if self._known().sets is not None:
            return self.evaluate(*labelled_sets(images, labels, self._width)).exact
        items, names = labelled(images, labels, self._width)
        found = [normal_form(name) for name in self.predict(items)]
        return float(np.mean([name == normal_form(label) for name, label in zip(found, names, strict=True)]))

    def advice(self, pairs: Sequence[ConfusedPair]) -> list[str]:
        """What to do about classes that are mixed up, a line for each pair, such as those of `estimate_.confused`."""
        method, names = self._fitted(), list(map(str, self.classes_))
        templates = prompt_templates(self.templates)
        same = alike_names(method.towers, names, templates, pairs) if method.card.text else [False] * len(pairs)
        pictures = self._known().pictures
        shared = [len(pictures.of_both(pair.a, pair.b)) for pair in pairs]
        return advice(pairs, names, self.counts_.tolist(), same, shared)

    @overload
    def evaluate(
        self,
        images: Labelled,
        labels: str | Iterable[str] | None = None,
        *,
        unknown_below: float = 0.05,
        threshold: None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> Evaluation: ...

    @overload
    def evaluate(
        self,
        images: Labelled,
        labels: Iterable[NameSet],
        *,
        unknown_below: float = 0.05,
        threshold: float | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> LabelSetEvaluation: ...

    def evaluate(
        self,
        images: Labelled,
        labels: Labels = None,
        *,
        unknown_below: float = 0.05,
        threshold: float | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> Evaluation | LabelSetEvaluation:
        """How labelled images are classified: see `Evaluation`, and `LabelSetEvaluation` where they may show several classes. Labels
        that are no class of the learner are no error: their images count for how many unknown ones are found. Raises DataError
        unless there is a label, a text, for each image, or a list of them."""
        if self._known().sets is not None:
            items, sets = labelled_sets(images, labels, self._width)
            found, given = self.predictions(items, on_bad_image=on_bad_image), unlabelled(items, self._width)
            learned = self._learned_among(given, found)
            return LabelSetEvaluation.of(found, sets, given, self.counts_.tolist(), threshold, learned)
        require_threshold(unknown_below, "unknown_below")
        items, names = labelled(images, labels, self._width)
        found = self.predictions(items, known=True, on_bad_image=on_bad_image)
        given = unlabelled(items, self._width)
        rows, learned = found.positions.tolist(), self._learned_among(given, found)
        called = [given.describe(row) for row in rows]
        return Evaluation(found, [names[row] for row in rows], called, unknown_below, learned)

    def _learned_among(self, given: InMemoryImages, found: Predictions) -> int:
        """How many of the images that can be read were learned, as whatever class; 0 for a learner that knows none one by one."""
        pictures = self._learned.pictures
        if not len(pictures):
            return 0
        hashes = given.taken(found.positions).content_hashes()
        return sum(bool(pictures.learned_as(value)) for value in hashes)

    def drift(
        self,
        images: Item | Iterable[Item],
        *,
        log: Log | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> Drift:
        """Whether images, which need no labels, still look like those that were learned: see `cairn.classifier.drift`. Nothing of
        them is kept. Raises ConfigError for a method that keeps no means and covariances."""
        self._require_one_class("drift", "what a shift of them means is not known")
        with self._lock.reading():
            method = self._fitted()
            require_classes(self)
            given = readable(unlabelled(images, self._width), {}, on_bad_image, log or Log())
            return drift_of_images(method, self._known_scores(), given, list(map(str, self.classes_)))

    def explain(self, image: Item, best: int = 3) -> list[dict[str, Any]]:
        """Why an image looks like its likeliest classes: per class `name`, `score`, `probability`, and of SPA which patches
        speak for it and for which sentence (`patches`, see `SPA.reasons`)."""
        items = items_of(image, self._width)
        if len(items) != 1:
            raise DataError(f"{len(items)} images: explain takes one at a time")
        return self.predictions(items, reasons=best).told_reasons()[0]

    def segment(self, images: Item | Iterable[Item], side: int = 224) -> np.ndarray:
        """Where in images which class is, (n, side, side): see `Predictions.masks`."""
        return self.predictions(images, reasons=1).masks(side)

    # towers

    def open_towers(self) -> Towers:
        """The towers, loaded if they were not yet. Raises TowersError, DataError or UnknownName."""
        if self._towers is None:
            self._towers = self._opened(self._asked_towers)
            self._notices += self._towers.notices
        return self._towers

    @property
    def _asked_towers(self) -> str | Towers:
        """As they were given, a path as its text."""
        return os.fspath(self.towers) if isinstance(self.towers, os.PathLike) else self.towers

    def _opened(self, towers: str | Towers) -> Towers:
        if not isinstance(towers, str):
            self._require_as_asked(towers)
            return towers
        if is_features_file(towers):
            require_no_images_asked(towers, self.precision, self.decode, self.preprocess, self.revision)
            return open_features_towers(towers)
        return load_towers(
            towers,
            device=self.device,
            precision=self.precision,
            preprocess=self.preprocess,
            decode=self.decode,
            revision=self.revision,
        )

    def _require_as_asked(self, towers: Towers) -> None:
        """Raises ConfigError for towers, loaded by who hands them over, that prepare images otherwise than the arguments say."""
        decode = "whole" if decoded_side(towers) is None else "reduced"
        for name, asked, has in (
            ("preprocess", self.preprocess, asked_mode(towers)),
            ("decode", None if self.decode == "whole" else self.decode, decode),
            ("precision", None if self.precision in ("float32", "auto") else self.precision, towers.precision),
        ):
            if asked not in (None, has):
                raise ConfigError(
                    f"{name} '{asked}': the towers '{towers.name}' that are given were loaded with {has}; load them with it, or leave "
                    "it out"
                )

    @property
    def _width(self) -> int | None:
        """How many numbers an item has, where embeddings are learned in place of images."""
        asked = self._asked_towers
        if isinstance(asked, str) and asked != ROWS and not is_features_file(asked):
            return None
        towers = self.open_towers()
        return None if towers.has_images else towers.dim

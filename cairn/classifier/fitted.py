"""What a classifier tells of what it has learned, once it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cairn.classifier.calibration import Calibration
from cairn.classifier.choice import AUTO, FIRST
from cairn.classifier.estimate import AccuracyEstimate
from cairn.classifier.estimator import Estimator
from cairn.classifier.label_sets import LearnedSets
from cairn.classifier.learned import Learned
from cairn.errors import ConfigError, DataError, NotFitted
from cairn.methods.protocol import Method


class Fitted(Estimator):
    """Base of a classifier: its attributes with an underscore, which are there after learning."""

    method: str
    _chosen: str | None
    _method: Method | None
    _learned: Learned
    _notices: list[str]

    @property
    def _name(self) -> str:
        """The method that it was learned with, or will be if images do not tell of a better one."""
        return self._chosen or (FIRST if self.method == AUTO else self.method)

    def _fitted(self) -> Method:
        if self._method is None:
            raise NotFitted("nothing was learned yet: call fit or partial_fit first, or load a learner")
        return self._method

    def __sklearn_is_fitted__(self) -> bool:
        return self._method is not None

    def _known(self) -> Learned:
        self._fitted()
        return self._learned

    @property
    def method_(self) -> Method:
        return self._fitted()

    @property
    def chosen_(self) -> str:
        """The name of the method that it learned with."""
        self._fitted()
        return self._name

    @property
    def classes_(self) -> np.ndarray:
        return self._known().classes

    @property
    def counts_(self) -> np.ndarray:
        return self._known().counts

    @property
    def history_(self) -> Sequence[dict[str, Any]]:
        return self._known().history

    @property
    def references_(self) -> Sequence[float]:
        return self._known().references

    @property
    def referenced_among_(self) -> Sequence[int]:
        return self._known().referenced_among

    @property
    def calibration_(self) -> Calibration:
        return self._known().calibration

    @property
    def estimate_(self) -> AccuracyEstimate:
        """How many new images it classifies correctly, by class and in all, from images left out of learning."""
        return self._known().estimate

    @property
    def thresholds_(self) -> np.ndarray:
        """(k,): from which probability on an image is said to show a class. Raises AttributeError where it shows one class."""
        if (sets := self._known().sets) is None:
            raise AttributeError("images show one class each, so there are no thresholds")
        return sets.thresholds

    @property
    def sets_(self) -> LearnedSets | None:
        """Where images may show several classes: what makes probabilities and sets of scores."""
        return self._known().sets

    @property
    def notices_(self) -> list[str]:
        self._fitted()
        return self._notices

    @property
    def n_features_in_(self) -> int:
        """Numbers in a row. Raises AttributeError where images are learned."""
        if (towers := self._fitted().towers).has_images:
            raise AttributeError("images have no number of features")
        return towers.dim

    def _require_one_class(self, what: str, instead: str) -> None:
        """Raises ConfigError where images may show several."""
        if self._known().sets is not None:
            raise ConfigError(f"{what}: images of this learner may show several classes; {instead}")


def require_classes(learner: Fitted) -> None:
    """Raises DataError for a learner of which every class was forgotten."""
    if not len(learner.classes_):
        raise DataError("no class is left: all of them were forgotten; learn some")

"""scikit-learn's conventions for an estimator, without scikit-learn: its arguments by name, and what it is."""

from __future__ import annotations

import inspect
from typing import Any, Self

from cairn.errors import UnknownName


class Estimator:
    """Base of a classifier whose constructor only stores its arguments, each as the attribute of its name."""

    @classmethod
    def _parameters(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **values: Any) -> Self:
        """They count from the next `fit` on. Raises UnknownName."""
        for name, value in values.items():
            if name not in self._parameters():
                raise UnknownName("argument", name, self._parameters())
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # it is scikit-learn that asks

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=True, string=True),
        )

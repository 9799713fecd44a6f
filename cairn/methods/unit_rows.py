"""What methods with Gaussians of unit embeddings offer to whoever scores rows that are no images."""

from __future__ import annotations

from abc import ABC, abstractmethod

from cairn.maths.similarity import unit
from cairn.types import Features, Scores


class UnitRows(ABC):
    """Rows are unit embeddings; `row_scores` is the method's own."""

    def scores(self, features: Features) -> Scores:
        return self.row_scores(self.memory_rows(features))

    def memory_rows(self, features: Features) -> Features:
        """Rows as the memory holds them."""
        return unit(features)

    def on_sphere(self, drawn: Features) -> Features:
        """Draws from the memory, where rows of images lie."""
        return unit(drawn)

    @abstractmethod
    def row_scores(self, z: Features) -> Scores:
        """One column per class seen."""

"""The mean of each class and how many rows it is of: the least that can be kept."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cairn.maths.rows import merged, without
from cairn.types import Features, Labels


class ClassMeans:
    """p_c, the mean of all rows of class c seen so far. Immutable: `add` and `without` return others."""

    def __init__(self, means: Float[Tensor, "k d"], counts: Int[Tensor, " k"]):
        self.means, self.counts = means, counts

    @classmethod
    def empty(cls, dim: int) -> ClassMeans:
        return cls(torch.zeros(0, dim), torch.zeros(0, dtype=torch.int64))

    @property
    def bytes(self) -> int:
        return self.means.nbytes + self.counts.nbytes

    def add(self, rows: Features, labels: Labels) -> ClassMeans:
        """With these rows learned: p_c + (mean of the new - p_c) m / (n + m), n rows before and m new ones."""
        new = max(0, int(labels.max()) + 1 - len(self.counts)) if len(labels) else 0
        p = torch.cat([self.means, self.means.new_zeros(new, self.means.shape[1])])
        n = torch.cat([self.counts, self.counts.new_zeros(new)])
        for c in labels.unique().tolist():
            own = rows[labels == c]
            n[c] += len(own)
            p[c] += (own.mean(0) - p[c]) * (len(own) / n[c])
        return ClassMeans(p, n)

    def without_rows(self, rows: Features, labels: Labels) -> ClassMeans:
        """As if these rows had not been learned: p_c - (mean of them - p_c) m / (n - m); 0 where no row is left."""
        p, n = self.means.double(), self.counts.clone()
        for c in labels.unique().tolist():
            own = rows[labels == c].double()
            n[c] -= len(own)
            p[c] = p[c] - (own.mean(0) - p[c]) * (len(own) / n[c]) if n[c] else 0.0
        return ClassMeans(p.to(self.means), n)

    def merged(self, c: int, other: int) -> ClassMeans:
        """With class `other` gone into class c < other, and later ones one number lower."""
        sums = merged(self.counts.double()[:, None] * self.means.double(), c, other)
        n = merged(self.counts, c, other)
        return ClassMeans((sums / n[:, None]).to(self.means), n)

    def without(self, c: int) -> ClassMeans:
        p, n = self.means, self.counts
        return ClassMeans(without(p, c), without(n, c))

    def state_dict(self) -> dict[str, Tensor]:
        return {"prototypes": self.means, "counts": self.counts}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ClassMeans:
        return cls(state["prototypes"], state["counts"])

"""Ridge regression on one-hot labels with more random features than can be counted: in the kernel they tend to.

Letters: Z rows that were learned (n x d), Y their labels one-hot (n x k), K = k(Z, Z), k of `cairn.maths.kernels.arc_cosine`;
lam the ridge. The score of an embedding z is k(z, Z) A with A = (K + lam I)^-1 Y.

RanPAC's head has W = (G + lam I)^-1 C of 10,000 random features; this one is the limit of ever more of them.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cairn.errors import NotFinite
from cairn.maths.kernels import arc_cosine
from cairn.maths.ridge import descended, one_hot, solved
from cairn.types import Features, Labels, Scores

RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 5))
"""What lam is chosen from: 1e-4 to 100 in steps of half a power of ten, in units of k(z, z) = 1."""


class KernelRidge:
    """k(z, Z) A; lam is that of the smallest squared error on rows held out."""

    def __init__(self, dim: int):
        self.Z, self.labels, self.A = torch.zeros(0, dim), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        self.lam = RIDGES[len(RIDGES) // 2]

    def fit(self, Z: Features, y: Labels, k: int, out: Bool[Tensor, " n"]) -> Float[Tensor, "m k"]:
        """Scores of the rows `out`, learned from the others with the lam that suits them best; then all rows are learned."""
        K, Y = arc_cosine(Z, Z), one_hot(y, k)
        found = Y[out]
        if out.any() and not out.all():

            @cache
            def scores(i: int) -> Scores:
                return K[out][:, ~out] @ solved(K[~out][:, ~out], Y[~out], RIDGES[i])

            def error(i: int) -> float:
                squared = (scores(i) - Y[out]).square().mean().item()
                return squared if math.isfinite(squared) else math.inf

            best = descended(error, RIDGES.index(self.lam), len(RIDGES))
            self.lam, found = RIDGES[best], scores(best)
        self.Z, self.labels, self.A = Z, y, solved(K, Y, self.lam)
        if not self.A.isfinite().all():
            raise NotFinite(f"ridge {self.lam:g} on {len(Z)} embeddings has no solution: some of them are not finite")
        return found

    def __call__(self, z: Features) -> Scores:
        return (arc_cosine(z.cpu(), self.Z) @ self.A).to(z)

    def forget(self, c: int) -> None:
        """Without the rows of class c, as if they had never been learned; with the same lam."""
        kept, k = self.labels != c, self.A.shape[1] - 1
        y = self.labels[kept] - (self.labels[kept] > c).long()
        self.fit(self.Z[kept], y, k, torch.zeros(len(y), dtype=torch.bool))

    def state_dict(self) -> dict[str, Tensor]:
        return {"Z": self.Z, "labels": self.labels, "A": self.A, "lam": torch.tensor(self.lam, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.Z, self.labels, self.A, self.lam = state["Z"], state["labels"], state["A"], float(state["lam"])

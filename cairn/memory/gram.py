"""The normal equations of a ridge regression: sums over the rows of all classes, and what rows say of the ridge before they are
learned from.

Letters: H rows of features (n x m), Y their labels one-hot (n x k); G = sum H^T H, C = sum H^T Y; W = (G + lam I)^-1 C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.maths.rows import merged, without


class Gram:
    """G and C, by default in float32, of which W is solved in float64. Immutable: `joined` and `without` return others."""

    def __init__(self, G: Float[Tensor, "m m"], C: Float[Tensor, "m k"]):
        self.G, self.C = G, C

    @classmethod
    def empty(cls, m: int, dtype: torch.dtype = torch.float32) -> Gram:
        return cls(torch.zeros(m, m, dtype=dtype), torch.zeros(m, 0, dtype=dtype))

    @property
    def bytes(self) -> int:
        """Of one triangle of G, and of C."""
        m = len(self.G)
        return self.G.itemsize * (m * (m + 1) // 2) + self.C.nbytes

    def joined(self, H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"]) -> Gram:
        """With n more rows learned, of at least as many classes."""
        H, Y = H.double(), Y.double()
        C = torch.cat([self.C, self.C.new_zeros(len(self.C), Y.shape[1] - self.C.shape[1])], 1)
        return Gram((self.G + H.T @ H).to(self.G), (C + H.T @ Y).to(self.C))

    def without_rows(self, H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"]) -> Gram:
        """As if these rows had not been learned."""
        H, Y = H.double(), Y.double()
        return Gram((self.G - H.T @ H).to(self.G), (self.C - H.T @ Y).to(self.C))

    def merged(self, c: int, other: int) -> Gram:
        """With class `other` gone into class c < other, and later ones one number lower."""
        return Gram(self.G, merged(self.C, c, other, 1))

    def without(self, c: int) -> Gram:
        """Column c of C gone; in G its images stay, as counterexamples of the others."""
        return Gram(self.G, without(self.C, c, 1))

    def solution(self, lam: float) -> Float[Tensor, "m k"]:
        """W, float64."""
        return torch.cholesky_solve(self.C.double(), self._factor(lam))

    def left_out(
        self, H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"], ridges: Sequence[float]
    ) -> list[Float[Tensor, "n k"]]:
        """For each ridge what W says of rows that are among those learned, each as if it had not been:

        f_i = (h_i W - l_i y_i) / (1 - l_i),  l_i = h_i (G + lam I)^-1 h_i^T.

        Source: the prediction sum of squares (Allen 1974, Technometrics 16).
        """
        H, Y = H.double(), Y.double()
        found = []
        for lam in ridges:
            L = self._factor(lam)
            V = torch.linalg.solve_triangular(L, H.T, upper=False)
            leverage = V.square().sum(0)[:, None].clamp(max=1 - 1e-9)
            fit = V.T @ torch.linalg.solve_triangular(L, self.C.double(), upper=False)
            found.append((fit - leverage * Y) / (1 - leverage))
        return found

    def _factor(self, lam: float) -> Float[Tensor, "m m"]:
        return torch.linalg.cholesky(self.G.double() + lam * torch.eye(len(self.G), dtype=torch.float64))

    def state_dict(self) -> dict[str, Tensor]:
        i, j = torch.tril_indices(*self.G.shape)
        return {"G": self.G[i, j], "C": self.C}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Gram:
        C = state["C"]
        m = len(C)
        i, j = torch.tril_indices(m, m)
        G = C.new_zeros(m, m)
        G[i, j] = state["G"]
        G[j, i] = state["G"]
        return cls(G, C)

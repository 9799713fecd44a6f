"""Sums of squares over the images of all classes together, from which a linear head is solved for."""

from __future__ import annotations

from functools import cached_property
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.errors import DataError, ResultError
from cairn.maths.ridge import compressed, joined_to_triangle, solved, squared
from cairn.maths.rows import merged, without

ROUNDING = 1e-5
"""What is left of a direction that an image alone had, in float32."""

FOREIGN = 1e-3
"""Share of rows beyond what was learned from which on they were not."""


class SecondOrder:
    """G = sum H^T H and C = sum H^T Y over everything learned, as a square root: R^T R = G, R^T D = C, in at most m rows.

    H are rows of features (n x m), Y their labels one-hot (n x k). R and D are in float32; beyond m rows R is an upper triangle,
    of which half is stored. K = R R^T, in float64, and the last solutions are kept while the object lives and can be made again;
    while rows are added, only theirs are multiplied. Immutable: `joined` and `without` return others.
    """

    def __init__(self, R: Float[Tensor, "r m"], D: Float[Tensor, "r k"], first: Float[Tensor, "q q"] | None = None):
        """`first`: K of the first q rows, where it is known."""
        self.R, self.D, self._first = R, D, first
        self._solutions: dict[float, Tensor] = {}

    @classmethod
    def empty(cls, m: int) -> SecondOrder:
        return cls(torch.zeros(0, m), torch.zeros(0, 0))

    @property
    def bytes(self) -> int:
        """What is stored."""
        m = self.R.shape[1]
        return (self.R.element_size() * m * (m + 1) // 2 if self._triangle else self.R.nbytes) + self.D.nbytes

    @cached_property
    def _triangle(self) -> bool:
        return len(self.R) == self.R.shape[1] and not self.R.tril(-1).any()

    @property
    def K(self) -> Float[Tensor, "r r"]:
        if self._first is None or len(self._first) < len(self.R):
            self._first = squared(self.R, triangle=self._triangle, known=self._first)
        return self._first

    def joined(
        self, H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"], rng: torch.Generator | None = None
    ) -> SecondOrder:
        """With n more rows learned, of at least as many classes.

        With `rng` they are mixed among themselves by a random rotation, so that none of them can be read from R: what is
        to be kept must be. Beyond m rows a QR factorisation brings them back to m, the same whatever the rotation.
        """
        if rng is not None and len(self.R) + len(H) <= H.shape[1]:
            Q = torch.linalg.qr(torch.randn(len(H), len(H), generator=rng, dtype=torch.float64))[0].to(H)
            H, Y = Q @ H, Q.to(Y) @ Y
        D = torch.cat([self.D, self.D.new_zeros(len(self.D), Y.shape[1] - self.D.shape[1])], 1)
        if self._triangle:
            return SecondOrder(*joined_to_triangle(self.R, D, H, Y))
        R, D = torch.cat([self.R, H]), torch.cat([D, Y])
        if len(R) <= R.shape[1]:
            return SecondOrder(R, D, self._first)
        return SecondOrder(*compressed(R, D))

    def without_rows(self, H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"]) -> SecondOrder:
        """As if these rows had not been learned.

        H = A R, so that R^T R - H^T H = R^T (I - A^T A) R. With A = U s V^T and c = (1 - s^2)^1/2 the root of the matrix in
        the middle is I - V (1 - c) V^T; D follows from R'^T D' = R^T D - H^T Y. Where c is 0 there is one row less.
        Raises DataError for rows that were not learned.
        """
        R, H, Y = self.R.double(), H.double(), Y.double()
        K = self.K.clone()
        K.diagonal().add_(1e-12 * K.diagonal().amax())  # copies of one image leave K singular
        A = torch.cholesky_solve(R @ H.T, torch.linalg.cholesky(K)).T
        _, s, Vh = torch.linalg.svd(A, full_matrices=False)
        squares = 1 - s.square()
        if (H - A @ R).square().sum() > FOREIGN * H.square().sum() or squares.amin() < -FOREIGN:
            raise DataError("these images were not learned with these towers: the sums do not hold them")
        gone = squares < ROUNDING
        c = squares.clamp(min=0).sqrt().masked_fill(gone, 0.0)
        inverse = torch.where(gone, 0.0, 1 / c.masked_fill(gone, 1.0))
        D = self.D.double() - A.T @ Y
        R = R - Vh.T @ ((1 - c)[:, None] * (Vh @ R))
        D = D - Vh.T @ ((1 - inverse)[:, None] * (Vh @ D))
        if gone.any():
            reflections = torch.geqrf(Vh[gone].T.contiguous())
            R, D = (torch.ormqr(*reflections, x, transpose=True)[int(gone.sum()) :] for x in (R, D))
        return SecondOrder(R.to(self.R), D.to(self.D))

    def merged(self, c: int, other: int) -> SecondOrder:
        """With class `other` gone into class c < other, and later ones one number lower."""
        return SecondOrder(self.R, merged(self.D, c, other, 1), self._first)

    def without(self, c: int) -> SecondOrder:
        """Column c of D gone; in R its images stay, as counterexamples of the others."""
        return SecondOrder(self.R, without(self.D, c, 1), self._first)

    def solution(self, lam: float) -> Float[Tensor, "m k"]:
        """W = (G + lam I)^-1 C = R^T (K + lam I)^-1 D. NaN where there is none."""
        if lam not in self._solutions:
            self._solutions[lam] = self.R.T @ solved(self.K, self.D, lam).to(self.R)
        return self._solutions[lam]

    def error(self, H: Float[Tensor, "v m"], Y: Float[Tensor, "v k"], lam: float) -> float:
        """|H W(lam) - Y|^2 / (v k) on rows that were not learned."""
        return ((H @ self.solution(lam) - Y) ** 2).mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        """R row by row; of an upper triangle m (m + 1) / 2 numbers."""
        R = torch.cat([row[i:] for i, row in enumerate(self.R)]) if self._triangle else self.R
        return {"R": R, "D": self.D}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> SecondOrder:
        R = state["R"]
        if R.ndim == 1:
            m = (isqrt(8 * len(R) + 1) - 1) // 2
            if m * (m + 1) // 2 != len(R):
                raise ResultError(
                    f"sums of squares with {len(R)} numbers: no triangle has so many; the file is damaged"
                )
            rows = R.split(list(range(m, 0, -1)))
            R = R.new_zeros(m, m)
            for i, row in enumerate(rows):
                R[i, i:] = row
        return cls(R, state["D"])

"""Sums of squares over the images of all classes together, from which a linear head is solved for."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.maths.ridge import compressed, solved
from cairn.maths.rows import without


class SecondOrder:
    """G = sum H^T H and C = sum H^T Y over everything learned, as a square root: R^T R = G, R^T D = C, in at most m rows.

    H are rows of features (n x m), Y their labels one-hot (n x k). R and D are in float32; K = R R^T, in float64, is kept
    while the object lives and can be made again. Immutable: `joined` and `without` return others.
    """

    def __init__(self, R: Float[Tensor, "r m"], D: Float[Tensor, "r k"], K: Float[Tensor, "r r"] | None = None):
        self.R, self.D, self._K = R, D, K

    @classmethod
    def empty(cls, m: int) -> SecondOrder:
        return cls(torch.zeros(0, m), torch.zeros(0, 0))

    @property
    def bytes(self) -> int:
        return self.R.nbytes + self.D.nbytes

    @property
    def K(self) -> Float[Tensor, "r r"]:
        if self._K is None:
            A = self.R.double()
            self._K = A @ A.T
        return self._K

    def joined(
        self, H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"], rng: torch.Generator | None = None
    ) -> SecondOrder:
        """With n more rows learned, of at least as many classes.

        With `rng` they are mixed among themselves by a random rotation, so that none of them can be read from R: what is
        to be kept must be. Beyond m rows a QR factorisation brings them back to m.
        """
        if rng is not None:
            Q = torch.linalg.qr(torch.randn(len(H), len(H), generator=rng, dtype=torch.float64))[0].to(H)
            H, Y = Q @ H, Q.to(Y) @ Y
        D = torch.cat([self.D, self.D.new_zeros(len(self.D), Y.shape[1] - self.D.shape[1])], 1)
        R, D = torch.cat([self.R, H]), torch.cat([D, Y])
        if len(R) > R.shape[1]:
            return SecondOrder(*compressed(R, D))
        new = H.double()
        X = (
            torch.cat([rows.double() @ new.T for rows in self.R.split(1024)])
            if len(self.R)
            else new.new_zeros(0, len(new))
        )
        K = torch.cat([torch.cat([self.K, X], 1), torch.cat([X.T, new @ new.T], 1)])
        return SecondOrder(R, D, K)

    def without(self, c: int) -> SecondOrder:
        """Column c of D gone; in R its images stay, as counterexamples of the others."""
        return SecondOrder(self.R, without(self.D, c, 1), self._K)

    def solution(self, lam: float) -> Float[Tensor, "m k"]:
        """W = (G + lam I)^-1 C = R^T (K + lam I)^-1 D. NaN where there is none."""
        return self.R.T @ solved(self.K, self.D, lam).to(self.R)

    def error(self, H: Float[Tensor, "v m"], Y: Float[Tensor, "v k"], lam: float) -> float:
        """|H W(lam) - Y|^2 / (v k) on rows that were not learned."""
        return ((H @ self.solution(lam) - Y) ** 2).mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        return {"R": self.R, "D": self.D}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> SecondOrder:
        return cls(state["R"], state["D"])

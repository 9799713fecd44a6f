"""Linear regression with a ridge on one-hot labels, learned task after task without the rows it was learned from.

Letters: H rows (n x m), Y their labels one-hot (n x k), lam the ridge; G = H^T H, C = H^T Y. The solution is

W = (G + lam I)^-1 C,

and what is needed of old rows is G and C alone. They are kept in one of two exact forms:

- as a square root: R (r x m) and D (r x k) with R^T R = G and R^T D = C, r <= min(n, m). Then W = R^T (K + lam I)^-1 D
  with K = R R^T, which costs r^3 and not m^3, and what is stored loses nothing to squaring: memory/second_order.py;
- as the inverse P = (G + lam I)^-1 beside W, for one ridge that is fixed beforehand.

Sources: for the solution, Hoerl and Kennard, Ridge Regression (1970). The square root with more than one ridge is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def one_hot(labels: Int[Tensor, " n"], k: int) -> Float[Tensor, "n k"]:
    """Row i is 1 in column labels_i, float64."""
    return torch.eye(k, dtype=torch.float64)[labels]


def compressed(R: Float[Tensor, "r m"], D: Float[Tensor, "r k"]) -> tuple[Float[Tensor, "q m"], Float[Tensor, "q k"]]:
    """The same R^T R and R^T D in at most m rows."""
    if len(R) <= R.shape[1]:
        return R, D
    Q, R = torch.linalg.qr(R)
    return R, Q.T.to(D) @ D


def solved(K: Float[Tensor, "r r"], D: Float[Tensor, "r k"], lam: float) -> Float[Tensor, "r k"]:
    """(K + lam I)^-1 D in float64; NaN where the sum is not positive definite to rounding."""
    shifted = K.double().clone()
    shifted.diagonal().add_(lam)
    L, failed = torch.linalg.cholesky_ex(shifted)
    return torch.full_like(D.double(), torch.nan) if failed else torch.cholesky_solve(D.double(), L)


def descended(error: Callable[[int], float], start: int, stop: int) -> int:
    """From `start`, the first place in range(stop) with no better neighbour."""
    at = start
    while better := [i for i in (at - 1, at + 1) if 0 <= i < stop and error(i) < error(at)]:
        at = min(better, key=error)
    return at


def reduced_ridge(
    P: Float[Tensor, "m m"], W: Float[Tensor, "m k"], H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m m"], Float[Tensor, "m k"]]:
    """The solution and P = (G + lam I)^-1 without n of the rows learned: `recursive_ridge` with H^T H taken away from G.

    P' = P + P H^T (I - H P H^T)^-1 H P
    W' = W - P' H^T (Y - H W)

    Raises ValueError where the rows cannot have been learned.
    """
    PH = P @ H.T
    L, failed = torch.linalg.cholesky_ex(torch.eye(len(H), dtype=P.dtype) - H @ PH)
    if failed:
        raise ValueError("rows that were not learned")
    P = P + PH @ torch.cholesky_solve(PH.T, L)
    P = (P + P.T) / 2
    return P, W - P @ (H.T @ (Y - H @ W))


def recursive_ridge(
    P: Float[Tensor, "m m"], W: Float[Tensor, "m j"], H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m m"], Float[Tensor, "m k"]]:
    """The solution and P = (G + lam I)^-1 with n more rows learned, k >= j. In float64 equal to the solution of all at once.

    P' = P - P H^T (I + H P H^T)^-1 H P
    W' = [W 0] + P' H^T (Y - H [W 0])

    Source: Zhuang et al., ACIL (2022), theorem 1, where W' is written with old and new columns apart.
    """
    PH = P @ H.T
    L = torch.linalg.cholesky(torch.eye(len(H), dtype=P.dtype) + H @ PH)
    P = P - PH @ torch.cholesky_solve(PH.T, L)
    P = (P + P.T) / 2  # rounding would part the halves, task after task
    W = torch.cat([W, W.new_zeros(len(W), Y.shape[1] - W.shape[1])], 1)
    return P, W + P @ (H.T @ (Y - H @ W))

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

PANEL, ROWS = 128, 256
"""Columns that are reflected at once, and rows that are multiplied at once."""


def one_hot(labels: Int[Tensor, " n"], k: int) -> Float[Tensor, "n k"]:
    """Row i is 1 in column labels_i, float64."""
    return torch.eye(k, dtype=torch.float64)[labels]


def compressed(R: Float[Tensor, "r m"], D: Float[Tensor, "r k"]) -> tuple[Float[Tensor, "q m"], Float[Tensor, "q k"]]:
    """The same R^T R and R^T D in at most m rows; the m rows are an upper triangle. Q is applied to D and never made."""
    if len(R) <= R.shape[1]:
        return R, D
    reflectors, tau = torch.geqrf(R)
    turned = torch.ormqr(reflectors, tau, D.to(R), transpose=True)
    return reflectors[: R.shape[1]].triu(), turned[: R.shape[1]].to(D)


def joined_to_triangle(
    R: Float[Tensor, "m m"], D: Float[Tensor, "m k"], H: Float[Tensor, "n m"], Y: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m m"], Float[Tensor, "m k"]]:
    """`compressed` of [R; H] and [D; Y] for an upper triangle R, which takes 2 n m^2 operations and not 2 n m^2 + 4/3 m^3.

    Of a panel of columns only the triangle's own rows and H are not zero below it: their reflections change those rows alone.
    """
    m = len(R)
    top, below = torch.cat([R, D.to(R)], 1), torch.cat([H, Y.to(R)], 1)
    for j in range(0, m, PANEL):
        own = slice(j, min(j + PANEL, m))
        size = own.stop - j
        reflectors, tau = torch.geqrf(torch.cat([top[own, own], below[:, own]]))
        rest = torch.ormqr(reflectors, tau, torch.cat([top[own, own.stop :], below[:, own.stop :]]), transpose=True)
        top[own, own], top[own, own.stop :] = reflectors[:size].triu(), rest[:size]
        below[:, own.stop :] = rest[size:]
    return top[:, :m].contiguous(), top[:, m:].to(D)


def squared(
    R: Float[Tensor, "r m"], *, triangle: bool = False, known: Float[Tensor, "q q"] | None = None
) -> Float[Tensor, "r r"]:
    """R R^T in float64 by half of the operations, and by a sixth where R is an upper triangle.

    `known` is that of R's first q rows. Of it whole blocks are taken, so that each number comes from the same product as
    without it, to the bit.
    """
    K = torch.empty(len(R), len(R), dtype=torch.float64)
    kept = 0 if known is None else len(known) // ROWS * ROWS
    if known is not None:
        K[:kept, :kept] = known[:kept, :kept]
    for i in range(kept, len(R), ROWS):
        stop, first = min(i + ROWS, len(R)), i if triangle else 0
        K[i:stop, :stop] = R[i:stop, first:].double() @ R[:stop, first:].double().T
        K[:i, i:stop] = K[i:stop, :i].T
    return K


def solved(K: Float[Tensor, "r r"], D: Float[Tensor, "r k"], lam: float) -> Float[Tensor, "r k"]:
    """(K + lam I)^-1 D in float64; NaN where the sum is not positive definite to rounding."""
    L, failed = K.double().clone(), torch.empty((), dtype=torch.int32)
    L.diagonal().add_(lam)
    torch.linalg.cholesky_ex(L, out=(L, failed))
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

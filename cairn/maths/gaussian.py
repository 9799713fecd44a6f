"""Gaussians: their moments, how two samples' moments combine, drawing, and the maps that move them.

Letters: x rows (n x d), m mean, S covariance (biased: divided by n), L factor with S = L L^T, U orthonormal columns
(d x r) with eigenvalues lam, diag a diagonal (d), n rows, d width, k classes, (A, b) the affine map x -> A x + b.
Statistics are float64; draws have the type of the mean they start from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.errors import NotFinite

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
"""Tried in turn by `cholesky_repaired`, relative to tr(S)/d. The last is far below any shrinkage worth the name."""


class AffineMap(NamedTuple):
    """x -> A x + b on columns; on rows, x @ A^T + b. One map (d x d and d), or one per class (k x d x d and k x d)."""

    A: Float[Tensor, "*k d d"]
    b: Float[Tensor, "*k d"]

    @classmethod
    def identity(cls, d: int) -> AffineMap:
        return cls(torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))

    def __call__(self, x: Float[Tensor, "*k n d"]) -> Float[Tensor, "*k n d"]:
        return x @ self.A.mT + self.b[..., None, :]


SPARE, ITERATIONS = 16, 4
"""Of `leading`: columns beside those that are wanted, and products after the first."""


def moments(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean and biased covariance of the rows, in float64: m = sum(x)/n, S = (x - m)^T (x - m) / n. Needs n >= 1."""
    x = x.double()
    m = x.mean(0)
    centred = x - m
    return m, centred.T @ centred / len(x)


def merged(
    n1: int,
    m1: Float[Tensor, " d"],
    S1: Float[Tensor, "d d"],
    n2: int,
    m2: Float[Tensor, " d"],
    S2: Float[Tensor, "d d"],
) -> tuple[int, Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Count, mean and biased covariance of two samples together, from those of each. Exact. Needs n1 + n2 >= 1.

    n = n1 + n2,  m = (n1 m1 + n2 m2) / n
    S = (n1 S1 + n2 S2) / n + (n1 n2 / n^2) (m2 - m1) (m2 - m1)^T

    Source: Chan, Golub & LeVeque 1983, The American Statistician 37(3), written for covariances. No squares of raw
    values are kept or subtracted, so nothing cancels when |m| is large beside the spread.
    """
    n = n1 + n2
    gap = m2.double() - m1.double()
    m = m1.double() + n2 / n * gap
    S = (n1 * S1.double() + n2 * S2.double()) / n + n1 * n2 / n**2 * torch.outer(gap, gap)
    return n, m, S


def draw(
    mean: Float[Tensor, "*k d"], factor: Float[Tensor, "*f d d"], n: int, generator: torch.Generator
) -> Float[Tensor, "*k n d"]:
    """n rows from N(mean, L L^T) with L = factor, for every mean: mean + N @ L^T, N standard normal (n x d).

    As *columns* a draw is mean + L z; as rows the factor is therefore transposed. N @ L has covariance L^T L instead:
    same trace, same eigenvalues, wrong directions.
    `factor` is one per mean, or a single one for all. What is held at once is the noise and the result, k n d each.
    """
    return placed(mean, factor, standard_normals(mean, n, mean.shape[-1], generator))


def placed(
    mean: Float[Tensor, "*k d"], factor: Float[Tensor, "*f d d"], noise: Float[Tensor, "*k n d"]
) -> Float[Tensor, "*k n d"]:
    """`draw` from numbers that are drawn already."""
    return (noise @ factor.mT).add_(mean[..., None, :])


def standard_normals(
    mean: Float[Tensor, "*k d"], n: int, width: int, generator: torch.Generator
) -> Float[Tensor, "*k n {width}"]:
    """n rows of them for every mean."""
    return torch.randn(*mean.shape[:-1], n, width, generator=generator, device=generator.device, dtype=mean.dtype)


def low_rank_draw(
    mean: Float[Tensor, "*k d"],
    U: Float[Tensor, "*k d r"],
    lam: Float[Tensor, "*k r"],
    diag: Float[Tensor, "*k d"],
    n: int,
    generator: torch.Generator,
) -> Float[Tensor, "*k n d"]:
    """n rows from N(mean, U diag(lam) U^T + diag(diag)): mean + (N1 sqrt(lam)) @ U^T + N2 sqrt(diag).

    N1 (n x r) and N2 (n x d) are standard normal and independent; lam >= 0, diag >= 0.
    """
    wide = standard_normals(mean, n, mean.shape[-1], generator)
    return low_rank_placed(mean, U, lam, diag, standard_normals(mean, n, lam.shape[-1], generator), wide)


def low_rank_placed(
    mean: Float[Tensor, "*k d"],
    U: Float[Tensor, "*k d r"],
    lam: Float[Tensor, "*k r"],
    diag: Float[Tensor, "*k d"],
    N1: Float[Tensor, "*k n r"],
    N2: Float[Tensor, "*k n d"],
) -> Float[Tensor, "*k n d"]:
    """`low_rank_draw` from numbers that are drawn already; N2 is overwritten."""
    draws = N2.mul_(diag.sqrt()[..., None, :]).add_(mean[..., None, :])
    return draws.add_((N1 * lam.sqrt()[..., None, :]) @ U.mT)


def low_rank(
    B: Float[Tensor, "d m"], diag: Float[Tensor, " d"], r: int
) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"], Float[Tensor, " d"]]:
    """B B^T + diag(diag) as U diag(lam) U^T + diag(rest): the r largest eigenpairs of B B^T, lam falling.

    rest = diag + the diagonal of what the other eigenpairs hold. So every variance is kept exactly, and the covariances
    as well where B has rank r or less. Where B has fewer than r columns, U and lam end in zeros.

    Source: a truncated eigendecomposition; putting the remainder on the diagonal is ours.
    """
    d, m = B.shape
    # One decomposition of the d x d product beats a thin one as soon as B is not thin.
    if 2 * m > d:
        lam, U = torch.linalg.eigh(B @ B.T)
        lam, U = lam.flip(0).clamp_min(0), U.flip(1)
    else:
        U, singular, _ = torch.linalg.svd(B, full_matrices=False)
        lam = singular**2
    rest = diag + (U[:, r:] ** 2) @ lam[r:]
    U, lam = U[:, :r], lam[:r]
    missing = r - len(lam)
    return torch.nn.functional.pad(U, (0, missing)), torch.nn.functional.pad(lam, (0, missing)), rest


def leading(S: Float[Tensor, "d d"], r: int) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """The r largest eigenpairs of a positive semi-definite S, eigenvalues falling: exact where r + SPARE is half of d or more, else by
    subspace iteration from fixed columns, which leaves |S - U diag(lam) U^T| within some thousandths of the least there is and
    takes a sixth of the time (d = 512, r = 32).

    Source: Halko, Martinsson & Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.3.
    """
    d, q = len(S), r + SPARE
    if 2 * q >= d:
        lam, U = torch.linalg.eigh(S)
    else:
        Y = S @ torch.randn(d, q, generator=torch.Generator().manual_seed(0), dtype=S.dtype)
        for _ in range(ITERATIONS):
            Y = S @ torch.linalg.qr(Y)[0]
        Q = torch.linalg.qr(Y)[0]
        lam, V = torch.linalg.eigh(Q.mT @ S @ Q)
        U = Q @ V
    return U.flip(1)[:, :r], lam.flip(0)[:r].clamp_min(0)


def cholesky_repaired(S: Float[Tensor, "d d"], name: str = "covariance") -> tuple[Float[Tensor, "d d"], float]:
    """Lower L with L L^T = S + jitter tr(S)/d I in float64, and the smallest of JITTERS for which it exists.

    A jitter of 0 is the normal case; a singular S (fewer samples than dimensions, no shrinkage) needs 1e-12 or so.
    Raises NotFinite, naming `name`, where S holds a value that is not finite, has no variance, or is so far from
    positive semi-definite that it is no covariance.
    """
    S = S.double()
    if not S.isfinite().all():
        bad = int((~S.isfinite()).sum())
        raise NotFinite(f"{name}: {bad} of {S.numel()} values are not finite: compute statistics in float32 or float64")
    S = (S + S.T) / 2
    average = float(S.trace()) / len(S)
    if average <= 0:
        raise NotFinite(f"{name}: average variance {average:g}: a covariance needs a positive one")
    for jitter in JITTERS:
        repaired = S.clone()
        repaired.diagonal().add_(jitter * average)
        L, failed = torch.linalg.cholesky_ex(repaired)
        if not failed:
            return L, jitter
    smallest = float(torch.linalg.eigvalsh(S)[0])
    raise NotFinite(f"{name}: smallest eigenvalue {smallest:g} beside an average of {average:g}: not a covariance")


class Halved(NamedTuple):
    """Lower triangles L_1..L_k in half precision, d (d + 1) bytes each (d - 1 more where d is odd) instead of 4 d^2: `scale` times
    what is folded.

    With a = d / 2 rounded up, the triangle below row a lies turned in the empty corner of the one above it:
    corner = L[:a, :a] + strict(L[a:, a:])^T, a x a; the square L[a:, :a] and the diagonal of L[a:, a:] stand beside.
    Every number is within 2^-11 of its own size, or 2^-25 of the largest of its triangle where that is more.
    """

    scale: Float[Tensor, " k"]
    corner: Float[Tensor, "k a a"]
    square: Float[Tensor, "k b a"]
    diagonal: Float[Tensor, "k b"]

    @classmethod
    def of(cls, L: Float[Tensor, "k d d"]) -> Halved:
        a = (L.shape[-1] + 1) // 2
        scale = L.abs().amax((1, 2))
        L = L / torch.where(scale > 0, scale, 1.0)[:, None, None]
        corner, lower = L[:, :a, :a].tril(), L[:, a:, a:]
        b = lower.shape[-1]
        corner[:, :b, :b] += lower.tril(-1).mT
        return cls(scale, corner.half(), L[:, a:, :a].half(), lower.diagonal(dim1=1, dim2=2).half())

    def whole(self) -> Float[Tensor, "k d d"]:
        """L_1..L_k in float32."""
        a, b = self.corner.shape[-1], self.diagonal.shape[-1]
        L = self.scale.new_zeros(len(self.scale), a + b, a + b)
        L[:, :a, :a] = self.corner.tril()
        L[:, a:, :a] = self.square
        L[:, a:, a:] = self.corner[:, :b, :b].triu(1).mT
        L[:, a:, a:].diagonal(dim1=1, dim2=2).copy_(self.diagonal)
        return L.mul_(self.scale[:, None, None])

"""Gaussians under optimal transport: their Bures-Wasserstein distance, and the map of one onto another.

Letters: m means (d), S covariances (d x d), L lower factor with S0 = L L^T, (A, b) the affine map
x -> A x + b, k Gaussians, d width. Index 0 is where mass comes from, 1 where it goes. All in float64.

No matrix root of S0 is taken. For any factor S0 = L L^T the matrices S0^1/2 S1 S0^1/2 and L^T S1 L have the same
eigenvalues, and the map written with L is the same map, so one Cholesky and one eigendecomposition do.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.errors import NotFinite
from cairn.maths.gaussian import AffineMap

REG = 1e-6
"""Ridge of `gaussian_map`, relative to the average variance: for d = 512 and unit features 1e-9 in absolute terms."""


def bures_squared(
    m0: Float[Tensor, "*k d"], S0: Float[Tensor, "*k d d"], m1: Float[Tensor, "*k d"], S1: Float[Tensor, "*k d d"]
) -> Float[Tensor, "*k"]:
    """Squared 2-Wasserstein distance of N(m0, S0) and N(m1, S1), pair by pair: both parts of `bures_parts` together.

    |m0 - m1|^2 + tr(S0 + S1 - 2 (S0^1/2 S1 S0^1/2)^1/2), in squared units of x.
    """
    mean, covariance = bures_parts(m0, S0, m1, S1)
    return mean + covariance


def bures_parts(
    m0: Float[Tensor, "*k d"], S0: Float[Tensor, "*k d d"], m1: Float[Tensor, "*k d"], S1: Float[Tensor, "*k d d"]
) -> tuple[Float[Tensor, "*k"], Float[Tensor, "*k"]]:
    """What the means and what the covariances contribute to `bures_squared`; both are non-negative.

    mean = |m0 - m1|^2,  covariance = tr(S0) + tr(S1) - 2 sum(sqrt(eigenvalues(L^T S1 L)))
    Any positive semi-definite covariances, zero included. Squared, the covariance part carries a rounding of about
    1e-8 tr(S) where the covariances are singular, 1e-15 where they are well conditioned.

    Differentiable in all four where both covariances are positive definite. A singular S0 is factorised by its
    eigenvectors and taken as a constant in the cross term: the distance has no derivative there.

    Source: Bures 1969; Gelbrich 1990, Math. Nachr. 147; Peyre & Cuturi 2019, remark 2.31. The Cholesky form is ours.
    """
    m0, S0, m1, S1 = m0.double(), S0.double(), m1.double(), S1.double()
    L = _factor(S0)
    cross = torch.linalg.eigvalsh(_symmetric(L.mT @ S1 @ L)).clamp_min(0).sqrt().sum(-1)
    covariance = _trace(S0) + _trace(S1) - 2 * cross
    return ((m0 - m1) ** 2).sum(-1), covariance.clamp_min(0)


def gaussian_map(
    m0: Float[Tensor, "*k d"],
    S0: Float[Tensor, "*k d d"],
    m1: Float[Tensor, "*k d"],
    S1: Float[Tensor, "*k d d"],
    reg: float = REG,
) -> AffineMap:
    """The optimal transport map of N(m0, S0) onto N(m1, S1): x -> A x + b with A symmetric and A S0 A = S1.

    A = S0^-1/2 (S0^1/2 S1 S0^1/2)^1/2 S0^-1/2 = L^-T (L^T S1 L)^1/2 L^-1,  b = m1 - A m0

    The ridge reg (tr(S0) + tr(S1)) / 2d is added to *both* covariances beforehand. It gives a singular S0 a factor, and
    in directions where neither Gaussian has any variance A is then the identity rather than undefined (two points: a
    translation); swapping the two inverts the map. Elsewhere its effect is of the order of reg. It does not make few
    samples enough: where n < d the directions that S1 has and S0 lacks are stretched by up to reg^-1/2, which is what
    shrinkage is for.

    Raises NotFinite where a covariance is not finite or S0 with its ridge is not positive definite.

    Source: Olkin & Pukelsheim 1982; Peyre & Cuturi 2019, equation 2.40. Ours: the Cholesky form, at one
    eigendecomposition instead of two, and the same ridge on both sides.
    """
    m0, S0, m1, S1 = m0.double(), S0.double(), m1.double(), S1.double()
    d = S0.shape[-1]
    # In place on the diagonals of the symmetrised copies, not of what the caller handed in
    S0, S1 = _symmetric(S0), _symmetric(S1)
    average = (_trace(S0) + _trace(S1)) / (2 * d)
    ridge = torch.where(average == 0, 1.0, reg * average)
    S0.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
    S1.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
    if not (S0.isfinite().all() and S1.isfinite().all()):
        raise NotFinite("covariance of a Gaussian map is not finite: compute statistics in float32 or float64")
    L, failed = torch.linalg.cholesky_ex(S0)
    if failed.any():
        raise NotFinite(f"covariance of a Gaussian map is singular with a ridge of {reg:g}: raise it, or shrink")
    lam, V = torch.linalg.eigh(_symmetric(L.mT @ S1 @ L))
    root = V * lam.clamp_min(0).sqrt()[..., None, :] @ V.mT
    # L^-T root L^-1 by two triangular solves; the second works on the transpose, and root is symmetric
    half = torch.linalg.solve_triangular(L.mT, root, upper=True)
    A = _symmetric(torch.linalg.solve_triangular(L.mT, half.mT, upper=True))
    return AffineMap(A, m1 - (A @ m0[..., None])[..., 0])


def _factor(S: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k d d"]:
    """Some L with L L^T = S: Cholesky's, or sqrt(eigenvalues) times eigenvectors where S is singular."""
    L, failed = torch.linalg.cholesky_ex(_symmetric(S))
    if failed.any():
        lam, V = torch.linalg.eigh(_symmetric(S.detach()))
        L = torch.where((failed > 0)[..., None, None], V * lam.clamp_min(0).sqrt()[..., None, :], L)
    return L


def _symmetric(S: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k d d"]:
    return (S + S.mT) / 2


def _trace(S: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k"]:
    return S.diagonal(dim1=-2, dim2=-1).sum(-1)

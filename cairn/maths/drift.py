"""How the Gaussians of old classes follow an encoder that moved: estimators of the motion, one object each.

Letters: Z0 rows of the current task's images under the old encoder (n x d, unit norm), Z1 the same images in the same
order under the new one; m0, m1 and C0, C1 their means and covariances; mu, S mean and covariance of an old class;
(A, b) the affine map x -> A x + b that moves it, mu' = A mu + b and S' = A S A^T; D the regression of Z1 - Z0 on
Z0 - m0, on rows, so that A = I + D^T; G covariance of Z0; w weights; k old classes, d width. All in float64.

Old images are gone, so the motion is seen on the current images alone. The estimators differ in what they take from
them: two moments (`none`, `mean`, `bures`), the classes (`sinkhorn`), or which image went where (`sdc`, `paired`,
`local`). If the encoder did not move, every one of them answers the identity, to the bit.

Maps are handed out one by one, in the order of the classes, and made when they are asked for: at d = 512 one of them is
2 MB, and k of them would be as much as the statistics that they move, twice over.

Two further ideas were tried and are not here, since neither won on real drift: adding the regression's residual
covariance to S', and following the paired map by the Gaussian map of its image onto C1 (within classes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import repeat
from typing import Annotated, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cairn.errors import NotFinite, counted
from cairn.maths.bures import bures_squared, gaussian_map
from cairn.maths.gaussian import AffineMap, moments
from cairn.maths.shrinkage import oas
from cairn.maths.transport import sinkhorn_log
from cairn.settings import Given
from cairn.types import Features, Labels

LAMS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Ridges that holding out classes chooses from."""

FOLDS = 5
"""Parts of the current classes that are held out in turn."""

FLAT = 1e-12
"""Total variance below which features of unit norm are one point: nothing to regress on."""

STILL = 1e-16
"""Least |A - I| in a logarithm: a map that moves nothing has log_norm -16, not minus infinity."""


@runtime_checkable
class Gaussians(Protocol):
    """What a drift reads of a memory of old classes: `cairn.memory.gaussians.GaussianMemory` has it."""

    @property
    def classes(self) -> int:
        """Number k of old classes."""
        ...

    @property
    def means(self) -> Float[Tensor, "k d"]:
        """Their means."""
        ...

    def covariance(self, c: int) -> Float[Tensor, "d d"]:
        """Covariance of class c."""
        ...


@runtime_checkable
class Drift(Protocol):
    """An estimator of how old statistics follow a moving encoder."""

    kind: str

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """The map of each of the k old classes, in order; classes that share one get the same object.

        before, after: the current images under the old and the new encoder, the same images in the same order.
        labels: their classes; only which images share one matters.

        Raises ValueError where the shapes disagree or there is no image, NotFinite where a feature is not finite.
        """
        ...


class NoDrift(Given):
    """Old statistics stay where they are: A = I, b = 0. What every estimator is measured against."""

    kind: Literal["none"] = Field(default="none", description="old statistics stay where they are")

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """The identity."""
        return repeat(_identity(_images(before, after, labels)[0]), memory.classes)


class MeanShift(Given):
    """Every old class moves as the mean of the current images did: A = I, b = m1 - m0. Covariances are not repaired."""

    kind: Literal["mean"] = Field(default="mean", description="old classes move as the mean of the current images did")

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """One translation for all."""
        Z0, Z1 = _images(before, after, labels)
        return repeat(_identity(Z0)._replace(b=(Z1 - Z0).mean(0)), memory.classes)


class KernelShift(Given):
    """Every old class moves as the current images near its mean did; semantic drift compensation.

    b_c = sum_i w_ci (z1_i - z0_i),  w_ci proportional to exp(-|z0_i - mu_c|^2 / (2 sigma^2)), summing to 1 over i;  A = I
    A class far from every image follows the nearest ones. Covariances are not repaired.

    Source: Yu et al. 2020 (CVPR), equations 9-12. Ours: weights normalised in the log domain, so that they never
    vanish together.
    """

    kind: Literal["sdc"] = Field(default="sdc", description="an old class moves as the images near its mean did")
    sigma: float = Field(default=0.3, gt=0, allow_inf_nan=False, description="width of the kernel, at unit norm")

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """One translation per old class. All of them hold the same A."""
        Z0, Z1 = _images(before, after, labels)
        w = _nearness(memory.means.to(Z0), Z0, self.sigma)
        identity = _identity(Z0)
        return (identity._replace(b=b) for b in w @ (Z1 - Z0))


class BuresMap(Given):
    """Every old class is carried by the optimal transport map of N(m0, C0) onto N(m1, C1): `gaussian_map`.

    Only the moments of the current images count, not which image went where. The map is symmetric, so that a drift that
    rotates features is not what it finds.

    Source: ours, a reading of DMC-OT's "optimal-transport guided" calibration (abstract); map as in `gaussian_map`.
    """

    kind: Literal["bures"] = Field(
        default="bures", description="optimal map between the Gaussians of the current images"
    )
    reg: float = Field(
        default=1e-4, ge=0, le=1, description="ridge on both covariances, relative to the average variance"
    )

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """One map for all."""
        Z0, Z1 = _images(before, after, labels)
        still = torch.equal(Z0, Z1)
        map = _identity(Z0) if still else gaussian_map(*_moments(Z0), *_moments(Z1), self.reg)
        return repeat(map, memory.classes)


class SinkhornMap(Given):
    """Every old class is carried by the maps of the current classes that an entropic plan matches it to.

    P = entropic plan of C_cj = bures_squared(old class c, current class j under the old encoder), uniform marginals
    A_c = sum_j w_cj A_j, b_c = sum_j w_cj b_j, w_cj = P_cj / sum_j P_cj, (A_j, b_j) = gaussian_map of class j
    Drift is local: a class near a drifting class drifts with it.

    Source: ours, a reading of DMC-OT's abstract; eps is relative to the average cost, so that it means the same at
    every spread; moments of one class are shrunk (`oas`) as n < d is normal there; and distances are taken in the
    `rank` leading directions of all classes together, since k x j full ones would take minutes at d = 512.
    """

    kind: Literal["sinkhorn"] = Field(default="sinkhorn", description="maps of the current classes, weighted by a plan")
    eps: float = Field(default=0.2, gt=0, allow_inf_nan=False, description="entropy, relative to the average cost")
    reg: float = Field(
        default=1e-4, ge=0, le=1, description="ridge on both covariances, relative to the average variance"
    )
    rank: int = Field(default=64, ge=1, description="leading directions in which classes are compared")

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """One map per old class, mixed from those of the current classes."""
        Z0, Z1 = _images(before, after, labels)
        if memory.classes == 0 or torch.equal(Z0, Z1):
            return repeat(_identity(Z0), memory.classes)
        rows = [labels.to(Z0.device) == c for c in labels.unique().tolist()]
        n = torch.tensor([int(row.sum()) for row in rows], device=Z0.device)
        (m0, C0), (m1, C1) = (_class_moments(Z, rows, n) for Z in (Z0, Z1))
        current = gaussian_map(m0, C0, m1, C1, self.reg)
        C = self._costs(memory, m0, C0)
        P = sinkhorn_log(C, eps=self.eps * float(C.mean().clamp_min(1e-12)), iterations=1000).P
        w = P / P.sum(1, keepdim=True)
        return (AffineMap(torch.einsum("j,jxy->xy", row, current.A), row @ current.b) for row in w)

    def _costs(self, memory: Gaussians, m: Float[Tensor, "j d"], S: Float[Tensor, "j d d"]) -> Float[Tensor, "k j"]:
        """Squared Bures-Wasserstein distances of old and current classes, in the leading directions of their mixture."""
        mu = memory.means.to(m)
        both = torch.cat([mu, m])
        mixture = torch.cov(both.T, correction=0) * len(both) + S.sum(0)
        for c in range(memory.classes):
            mixture += memory.covariance(c).to(m)
        U = torch.linalg.eigh(mixture).eigenvectors[:, -self.rank :]
        m, S = m @ U, U.T @ S @ U
        costs = []
        for c in range(memory.classes):
            mean, covariance = mu[c] @ U, U.T @ memory.covariance(c).to(m) @ U
            costs.append(bures_squared(m, S, mean.expand_as(m), covariance.expand_as(S)))
        return torch.stack(costs)


class PairedMap(Given):
    """Every old class is carried by the ridge regression of where each image went on where it was.

    D = argmin_D mean_i |(z1_i - z0_i) - (z0_i - m0) D|^2 + lam tr(G)/d |D|^2 = (G + lam tr(G)/d I)^-1 (Z0 - m0)^T (Z1 - Z0) / n
    A = I + D^T,  b = m1 - A m0
    The ridge draws A towards I: what the images do not show is left where it is.

    lam None: of LAMS the one that predicts best how *classes* held out of the regression move (FOLDS parts in turn),
    which is what old classes are. On a mini-CLIP's drift it lowers both errors where images are few, and none otherwise.

    Source: ours, ridge regression on image pairs; the choice of lam by held-out classes is ours.
    """

    kind: Literal["paired"] = Field(default="paired", description="regression of where images went on where they were")
    lam: float | None = Field(
        default=1e-2,
        gt=0,
        allow_inf_nan=False,
        description="ridge, relative to the average variance; none: held-out classes",
    )

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """One map for all."""
        Z0, Z1 = _images(before, after, labels)
        return repeat(_regression(Z0, Z1, self.lam or _held_out(Z0, Z1, labels)), memory.classes)


class LocalPairedMap(Given):
    """The paired map of all images, corrected for every old class by the residuals of the images near it.

    E_i = z1_i - (A z0_i + b), (A, b) the `paired` map;  w_ci proportional to exp(-|z0_i - mu_c|^2 / (2 sigma^2))
    D_c = argmin_D sum_i w_ci |(E_i - E_c) - (z0_i - m_c) D|^2 + stiffness lam tr(G_c)/d |D|^2
    A_c = A + D_c^T,  b_c = b + E_c - D_c^T m_c,  with E_c, m_c, G_c the weighted means and covariance
    A drift that is not affine is met by its tangent near each class; where images are few or far, stiffness keeps the
    shared map. Costs one d x d solve and one weighted covariance per old class. The defaults were chosen on simulated
    drifts and on training images of CIFAR-100 under a mini-CLIP, where it has the least errors of all estimators here.

    Source: ours; locally weighted regression (Cleveland & Devlin 1988) of the residuals of a shared ridge, with the
    kernel of `KernelShift`.
    """

    kind: Literal["local"] = Field(default="local", description="the paired map, corrected near each old class")
    lam: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="ridge, relative to the average variance; none: held-out classes",
    )
    sigma: float = Field(default=0.4, gt=0, allow_inf_nan=False, description="width of the kernel, at unit norm")
    stiffness: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="ridge of the correction, in units of lam"
    )

    def maps(self, before: Features, after: Features, labels: Labels, memory: Gaussians) -> Iterator[AffineMap]:
        """One map per old class."""
        Z0, Z1 = _images(before, after, labels)
        lam = self.lam or _held_out(Z0, Z1, labels)
        shared = _regression(Z0, Z1, lam)
        E = Z1 - shared(Z0)

        def corrected(w: Float[Tensor, " n"]) -> AffineMap:
            m = w @ Z0
            D = _ridge(Z0 - m, E, w, self.stiffness * lam)
            return AffineMap(shared.A + D.T, shared.b + w @ E - m @ D)

        return (corrected(w) for w in _nearness(memory.means.to(Z0), Z0, self.sigma))


AnyDrift: TypeAlias = Annotated[
    NoDrift | MeanShift | KernelShift | BuresMap | SinkhornMap | PairedMap | LocalPairedMap, Field(discriminator="kind")
]
"""The field of a configuration: any of the estimators, told apart by `kind`."""


class Health(NamedTuple):
    """What a map does, by its singular values."""

    log_norm: float
    """log10 |A - I| (Frobenius), at least -16; infinite where the map is not finite."""
    condition: float
    """Largest over smallest singular value of A; infinite where A is singular or the map is not finite."""
    effective_rank: float
    """Directions in which A - I acts: 0 for the identity, at most d."""


def map_health(map: AffineMap) -> Health:
    """How far a map is from the identity, how badly it is conditioned, and in how many directions it acts.

    log_norm = log10 |A - I|,  condition = s_1(A) / s_d(A)
    effective_rank = (sum_i s_i^2)^2 / sum_i s_i^4, s_i = s_i(A - I): the participation ratio;  0 where A = I

    Singular values of A are roots of the eigenvalues of A^T A, which tells condition numbers up to about 1e7 apart; those
    of A - I are not needed, since their sums are norms. Two thirds of the time of one decomposition of A.
    """
    if not (map.A.isfinite().all() and map.b.isfinite().all()):
        return Health(math.inf, math.inf, 0.0)
    squared = torch.linalg.eigvalsh(map.A.mT @ map.A)
    least, most = float(squared[0]), float(squared[-1])
    E = map.A - torch.eye(len(map.A), dtype=map.A.dtype, device=map.A.device)
    norm = float(torch.linalg.matrix_norm(E))
    rank = norm**4 / float((E.mT @ E).square().sum()) if norm > STILL else 0.0
    return Health(math.log10(max(norm, STILL)), math.sqrt(most / least) if least > 0 else math.inf, rank)


class Guarded:
    """The maps of an estimator, with those replaced by `fallback` (the mean shift, by custom) that cannot be trusted.

    A map is replaced where it is not finite or its condition number exceeds `limit`: errors of B - 1 tasks multiply, and
    a covariance moved by A is stretched by the square of it. Iterated once; afterwards `health` holds the largest of each
    measure among the maps handed out, `replaced` the classes whose map was not, and `reason` says so in words.
    """

    def __init__(self, maps: Iterable[AffineMap], fallback: AffineMap, limit: float = 1e4):
        self._maps, self._fallback, self._limit = maps, fallback, limit
        self.classes = 0
        self.replaced: list[int] = []
        self.health = Health(-math.inf, 0.0, 0.0)
        self._worst = 0.0

    def __iter__(self) -> Iterator[AffineMap]:
        judged: tuple[Tensor, Health] | None = None
        for map in self._maps:
            # Translations share their matrix, which is then decomposed once
            if judged is None or map.A is not judged[0] or not map.b.isfinite().all():
                health = map_health(map)
                judged = (map.A, health) if map.b.isfinite().all() else judged
            else:
                health = judged[1]
            if health.condition > self._limit:
                self.replaced.append(self.classes)
                self._worst = max(self._worst, health.condition if math.isfinite(health.condition) else 0.0)
                map, health = self._fallback, self._fallback_health
            self.health = Health(*(max(pair) for pair in zip(self.health, health, strict=True)))
            self.classes += 1
            yield map

    @cached_property
    def _fallback_health(self) -> Health:
        return map_health(self._fallback)

    @property
    def reason(self) -> str:
        """What was replaced and why; "" if nothing was."""
        if not self.replaced:
            return ""
        shown = ", ".join(str(c) for c in self.replaced[:8]) + (", ..." if len(self.replaced) > 8 else "")
        worst = (
            f"condition number {self._worst:.3g} above {self._limit:g}" if self._worst else "not finite, or singular"
        )
        return f"{len(self.replaced)} of {counted(self.classes, 'map')} (class {shown}) {worst}: fell back"


def _images(before: Features, after: Features, labels: Labels) -> tuple[Features, Features]:
    """Both sets of features in float64, or the error that says what is wrong with them."""
    if before.shape != after.shape or before.ndim != 2 or labels.shape != before.shape[:1] or len(before) == 0:
        raise ValueError(
            f"features {tuple(before.shape)} before, {tuple(after.shape)} after and labels {tuple(labels.shape)}: "
            "the same images in the same order, at least one"
        )
    for name, rows in (("before", before), ("after", after)):
        if not rows.isfinite().all():
            raise NotFinite(f"features {name} the encoder moved hold values that are not finite: encode in float32")
    return before.detach().double(), after.detach().double()


def _identity(Z: Features) -> AffineMap:
    d = Z.shape[1]
    return AffineMap(torch.eye(d, dtype=Z.dtype, device=Z.device), Z.new_zeros(d))


def _nearness(mu: Float[Tensor, "k d"], Z0: Features, sigma: float) -> Float[Tensor, "k n"]:
    """Gaussian weights of the images around each mean, summing to 1 per mean."""
    return torch.softmax(torch.cdist(mu, Z0).square() / (-2 * sigma**2), 1)


def _ridge(centred: Features, moved: Features, weights: Float[Tensor, " n"], lam: float) -> Float[Tensor, "d d"]:
    """argmin_D sum_i w_i |moved_i - centred_i D|^2 + lam tr(G)/d |D|^2 for rows centred under w; 0 where they are one point.

    Centring of `moved` is not needed: its mean is orthogonal to centred rows.
    """
    d = centred.shape[1]
    weighted = centred * weights[:, None]
    G = weighted.T @ centred
    average = float(G.trace()) / d
    if average * d <= FLAT:
        return torch.zeros_like(G)
    G.diagonal().add_(lam * average)
    L, failed = torch.linalg.cholesky_ex(G)
    if failed:
        raise NotFinite(f"paired regression with a ridge of {lam:g} is singular: a larger lam")
    return torch.cholesky_solve(weighted.T @ moved, L)


def _regression(Z0: Features, Z1: Features, lam: float) -> AffineMap:
    """The paired map of these images."""
    m0, shift = Z0.mean(0), (Z1 - Z0).mean(0)
    D = _ridge(Z0 - m0, Z1 - Z0, Z0.new_full((len(Z0),), 1 / len(Z0)), lam)
    # b = m1 - A m0, written so that D = 0 and no shift give exactly 0
    return AffineMap(_identity(Z0).A + D.T, shift - m0 @ D)


def _held_out(Z0: Features, Z1: Features, labels: Labels) -> float:
    """The ridge among LAMS under which the motion of held-out classes is predicted best (of images, if there is one class).

    One eigendecomposition per fold serves every ridge: D = V (lam_i + lam tr(G)/d)^-1 V^T X.
    """
    groups = labels.to(Z0.device).unique(return_inverse=True)[1]
    if int(groups.max()) == 0:
        groups = torch.arange(len(Z0), device=Z0.device)
    folds = min(FOLDS, int(groups.max()) + 1)
    errors = Z0.new_zeros(len(LAMS))
    for fold in range(folds if folds > 1 else 0):
        held = groups % folds == fold
        X0, motion = Z0[~held], (Z1 - Z0)[~held]
        m0, shift = X0.mean(0), motion.mean(0)
        spread, V = torch.linalg.eigh((X0 - m0).T @ (X0 - m0) / len(X0))
        average = float(spread.mean())
        if average * len(spread) <= FLAT:
            continue
        answer = V.T @ ((X0 - m0).T @ motion) / len(X0)
        there, wanted = (Z0[held] - m0) @ V, (Z1 - Z0)[held] - shift
        for i, lam in enumerate(LAMS):
            D = answer / (spread.clamp_min(0) + lam * average)[:, None]
            errors[i] += (there @ D - wanted).square().sum()
    # Without anything to hold out the stiffest is the cautious choice
    return LAMS[int(errors.argmin())] if errors.any() else LAMS[-1]


def _moments(Z: Features) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """`moments`, with exactly no covariance where the rows are one point: rounding is no shape to be mapped."""
    m, S = moments(Z)
    return m, S if float(S.trace()) > FLAT else torch.zeros_like(S)


def _class_moments(Z: Features, rows: list[Tensor], n: Tensor) -> tuple[Float[Tensor, "j d"], Float[Tensor, "j d d"]]:
    """Mean and shrunk covariance of each class."""
    means, covariances = zip(*(_moments(Z[row]) for row in rows), strict=True)
    return torch.stack(means), oas(torch.stack(covariances), n)[0]

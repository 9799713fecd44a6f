"""Shrinkage of sample covariances: S_shrunk = a S + b I, better conditioned and closer to the truth when n is small.

Letters: S covariance (biased: divided by n), n samples it was estimated from, d width, v its diagonal,
rho weight of the target, eps relative ridge. All in float64.

With 30 images and d = 512 a sample covariance is singular, so shrinkage is no refinement here: without it nothing can
be factorised. Every rule below is linear in S and needs only tr(S) and tr(S S), so that a covariance held as low rank
plus diagonal is shrunk without being written out.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from cairn.settings import Given

Samples: TypeAlias = int | Int[Tensor, "*k"]


def oas(S: Float[Tensor, "*k d d"], n: Samples) -> tuple[Float[Tensor, "*k d d"], Float[Tensor, "*k"]]:
    """Oracle-approximating shrinkage towards the isotropic covariance of the same trace, and its weight.

    rho = min(1, (tr(S S) + tr(S)^2) / ((n + 1) (tr(S S) - tr(S)^2 / d)))
    S_shrunk = (1 - rho) S + rho tr(S)/d I
    rho lies in (0, 1] and is 1 where S is already isotropic (then it changes nothing), zero or one-dimensional.

    Source: Chen, Wiesel, Eldar & Hero 2010, IEEE TSP 58(10), equation 23, without the terms in 2/d that vanish for
    large d: the form of `sklearn.covariance.oas`, which this equals. Ours: rho is 1, not negative, where rounding turns
    the denominator's sign.
    """
    S = S.double()
    d = S.shape[-1]
    trace = _trace(S)
    rho = oas_weight(trace, (S * S).sum((-2, -1)), n, d)
    return _plus_identity((1 - rho)[..., None, None] * S, rho * trace / d), rho


def oas_weight(trace: Float[Tensor, "*k"], square: Float[Tensor, "*k"], n: Samples, d: int) -> Float[Tensor, "*k"]:
    """rho of `oas` from trace = tr(S) and square = tr(S S)."""
    return _weight(square + trace**2, (n + 1) * (square - trace**2 / d))


def oas_diagonal(v: Float[Tensor, "*k d"], n: Samples) -> tuple[Float[Tensor, "*k d"], Float[Tensor, "*k"]]:
    """Shrinkage of d variances alone towards their average, and its weight.

    rho = min(1, 2/(n + 2) (1 - 1/d) sum(v^2) / sum((v - v_bar)^2)),  v_bar = mean(v)
    v_shrunk = (1 - rho) v + rho v_bar

    Source: ours. `oas` counts the sampling noise of d^2 entries. Where only the diagonal is kept, most of that noise is
    not there, and for n < d the formula would answer rho = 1 on nearly any data. This is the oracle weight of the
    diagonal problem, rho = E<v - s, v - v_bar> / E|v - v_bar|^2 with Var(v_i) = 2 s_i^2 / n (Gaussian, independent
    coordinates), with sum(s^2) estimated without bias by n/(n + 2) sum(v^2).
    """
    v = v.double()
    d = v.shape[-1]
    average = v.mean(-1, keepdim=True)
    rho = _weight(2 * (1 - 1 / d) * (v * v).sum(-1), (n + 2) * ((v - average) ** 2).sum(-1))
    return v + rho[..., None] * (average - v), rho


def ridge(S: Float[Tensor, "*k d d"], eps: float) -> Float[Tensor, "*k d d"]:
    """S + eps tr(S)/d I: eps >= 0 is relative to the average variance, so that it means the same at every scale.

    Source: ridge covariances are common practice; relative rather than absolute because an absolute 1e-4 is already
    an eighth of the variance of features of unit norm.
    """
    S = S.double()
    return _plus_identity(S, eps * _trace(S) / S.shape[-1])


class Oas(Given):
    """Oracle-approximating shrinkage: the weight follows from the data, nothing is to be set."""

    kind: Literal["oas"] = Field(default="oas", description="weight of the isotropic part chosen from the data")

    def __call__(self, S: Float[Tensor, "*k d d"], n: Samples) -> Float[Tensor, "*k d d"]:
        return oas(S, n)[0]

    def diagonal(self, v: Float[Tensor, "*k d"], n: Samples) -> Float[Tensor, "*k d"]:
        """The same for a covariance that is its diagonal (see `oas_diagonal`)."""
        return oas_diagonal(v, n)[0]

    def scales(
        self, trace: Float[Tensor, "*k"], square: Float[Tensor, "*k"], n: Samples, d: int
    ) -> tuple[Float[Tensor, "*k"], Float[Tensor, "*k"]]:
        """(a, b) of S_shrunk = a S + b I, from trace = tr(S) and square = tr(S S)."""
        rho = oas_weight(trace, square, n, d)
        return 1 - rho, rho * trace / d


class Ridge(Given):
    """A fixed share of the average variance added to the diagonal; eps = 0 leaves S as it is."""

    kind: Literal["ridge"] = Field(default="ridge", description="fixed isotropic part")
    eps: float = Field(
        default=0.05, ge=0, allow_inf_nan=False, description="variance added, relative to the average variance"
    )

    def __call__(self, S: Float[Tensor, "*k d d"], n: Samples) -> Float[Tensor, "*k d d"]:
        return ridge(S, self.eps)

    def diagonal(self, v: Float[Tensor, "*k d"], n: Samples) -> Float[Tensor, "*k d"]:
        """The same for a covariance that is its diagonal."""
        v = v.double()
        return v + self.eps * v.mean(-1, keepdim=True)

    def scales(
        self, trace: Float[Tensor, "*k"], square: Float[Tensor, "*k"], n: Samples, d: int
    ) -> tuple[Float[Tensor, "*k"], Float[Tensor, "*k"]]:
        """(a, b) of S_shrunk = a S + b I, from trace = tr(S)."""
        return torch.ones_like(trace), self.eps * trace / d


Shrinkage: TypeAlias = Annotated[Oas | Ridge, Field(discriminator="kind")]
"""Three calls: `(S, n)` for a matrix, `diagonal(v, n)` for variances, `scales(...)` for what is not written out."""


def _trace(S: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k"]:
    return S.diagonal(dim1=-2, dim2=-1).sum(-1)


def _plus_identity(S: Float[Tensor, "*k d d"], b: Float[Tensor, "*k"]) -> Float[Tensor, "*k d d"]:
    shrunk = S.clone()
    shrunk.diagonal(dim1=-2, dim2=-1).add_(b[..., None])
    return shrunk


def _weight(above: Float[Tensor, "*k"], below: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    # below >= 0 by Cauchy-Schwarz, but for an isotropic S it is rounding noise of either sign
    return torch.where(below > above, above / torch.where(below > 0, below, 1.0), 1.0)

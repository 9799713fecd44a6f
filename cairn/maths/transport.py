"""Optimal transport between finite sets: the entropic plan in two forms that agree, and the exact one as a check.

Letters: C cost (n x m), a and b marginals (n and m, positive, equal sums; uniform 1/n and 1/m by default), P plan
(n x m) with row sums a and column sums b, eps strength of the entropy in units of C, f and g duals, K kernel, u and v
scalings, so that P = exp((f_i + g_j - C_ij) / eps) = u_i K_ij v_j. Every argument may carry a leading batch.

    P = argmin <P, C> + eps sum(P log P)   over the plans with these marginals

The log domain cannot underflow and carries gradients; the kernel form is several times as fast and stays with it by
absorbing its scalings into the duals. Plans are computed in the cost's type, float32 at least.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ABSORB = 20.0
"""|log u| past which scalings go into the duals."""

LOOK = 6
"""Sweeps of the kernel form between two looks at errors and scalings, at most: a look costs half a sweep."""

GROWTH = 14.0
"""By how much |log u| may grow between two looks. A sweep adds log max(n, m) at most, so large problems are looked at more
often. With both scalings at ABSORB + GROWTH an entry of K that underflows in float32 weighs e^-35 or less."""

RELAXED = 0.5
"""Worst error of a row below which sweeps of the kernel form are over-relaxed: scalings then change by small factors."""


class Plan(NamedTuple):
    """A transport plan and how good it is."""

    P: Float[Tensor, "*B n m"]
    cost: Float[Tensor, "*B"]
    """<P, C>, without the entropy. Its gradient with respect to C is P, plus what flows through P if that was asked for."""
    error: Float[Tensor, "*B"]
    """Worst error of a row or column sum, relative to that row's or column's weight."""
    iterations: int
    """Sweeps over both marginals that the slowest problem of the batch took."""


def sinkhorn_log(
    C: Float[Tensor, "*B n m"],
    a: Float[Tensor, "*#B n"] | None = None,
    b: Float[Tensor, "*#B m"] | None = None,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float = 1e-3,
    gradient: bool = False,
) -> Plan:
    """The entropic plan, by alternating updates of the duals in the log domain.

    f_i = eps (log a_i - logsumexp_j((g_j - C_ij) / eps)),  then the same for g with rows and columns swapped,
    until every row sum is within `tolerance` of its weight (relative), or `iterations` are spent; columns are exact.
    What was reached is in `Plan.error`: in float32 it does not fall below about 1e-7 max(C)/eps.

    gradient: let gradients flow into P through the unrolled updates, at their memory; otherwise P is a constant.

    Raises ValueError for eps <= 0, weights that are not positive, or unequal sums.

    Source: Cuturi 2013; Schmitzer 2019, SIAM J. Sci. Comput. 41(3), algorithm 1; Peyre & Cuturi 2019, section 4.4.
    """
    C, a, b = _problem(C, a, b, eps)
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
        log_a, log_b, M = a.log(), b.log(), -C / eps
        # Duals in units of eps
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        spent = 0
        while spent < iterations:
            renewed = log_a - (M + g[..., None, :]).logsumexp(-1)
            # By how much f moves is how wrong the row sums were
            if spent and _worst(torch.expm1(f - renewed)) <= tolerance:
                break
            f = renewed
            g = log_b - (M + f[..., :, None]).logsumexp(-2)
            spent += 1
        P = (M + f[..., :, None] + g[..., None, :]).exp()
    return _plan(P, C, a, b, spent)


def sinkhorn_kernel(
    C: Float[Tensor, "*B n m"],
    a: Float[Tensor, "*#B n"] | None = None,
    b: Float[Tensor, "*#B m"] | None = None,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Plan:
    """The plan of `sinkhorn_log`, by scaling a kernel: two matrix products per sweep instead of two logsumexp.

    u = a / (K v),  v = b / (K^T u),  K = exp((f_i + g_j - C_ij) / eps)
    Once |log u| or |log v| is seen past ABSORB, f += eps log u, g += eps log v, u = v = 1 and K is computed anew.

    Slow problems are over-relaxed: log u goes 7/4 of the way to its new value, and then log v. The fixed point is the
    same, and it takes a third of the sweeps where many are needed. Between two looks the last sweep is plain, so that
    columns are exact where rows are judged. If a problem's error is seen at four times the least that it had, all its further
    sweeps are plain, which converge from anywhere.

    Never NaN, whatever eps: the duals start at f_i = min_j C_ij, g_j = min_i(C_ij - f_i), so each row and column of K
    holds a 1; one sweep changes a scaling by at most the number of points; and right after columns were fitted row i
    still holds at least a_i min(b), so K v cannot vanish between absorptions either. No gradient: P is a constant.

    Raises ValueError as `sinkhorn_log` does.

    Source: Schmitzer 2019, SIAM J. Sci. Comput. 41(3), algorithm 2 (absorption); Thibault, Chizat, Dossal & Papadakis
    2021, Algorithms 14(5), section 3 (over-relaxation; how it is guarded here is ours). The start at the hard duals is
    ours: from zero duals the first K of a small eps is zero in whole rows.
    """
    C, a, b = _problem(C, a, b, eps)
    with torch.no_grad():
        rows = C.amin(-1)
        columns = (C - rows[..., :, None]).amin(-2)
        f, g = rows / eps, columns / eps
        K = (f[..., :, None] + g[..., None, :] - C / eps).exp()
        u, v = torch.ones_like(a), torch.ones_like(b)
        spent, look = 0, max(1, min(LOOK, int(GROWTH / math.log(max(2, *C.shape[-2:])))))
        least, steady = torch.full_like(a[..., 0], math.inf), torch.ones_like(a[..., 0], dtype=torch.bool)
        relaxed = ~steady
        while spent < iterations:
            # v as a row: several times as fast in a batch as K times a column
            sums = (v[..., None, :] @ K.mT)[..., 0, :]
            if spent and spent % look == 0:
                errors = (u * sums / a - 1).abs().amax(-1)
                if _worst(errors) <= tolerance:
                    break
                least = torch.minimum(least, errors)
                steady &= errors <= 4 * least
                relaxed = steady & (errors < RELAXED)
            # Plain before a look and at the end: there columns are to be exact
            plain = spent % look == look - 1 or spent == iterations - 1
            u = a / sums if plain else _further(u, a / sums, relaxed)
            renewed = b / (u[..., None, :] @ K)[..., 0, :]
            v = renewed if plain else _further(v, renewed, relaxed)
            spent += 1
            if spent % look == 0 and (_far_from_one(u) or _far_from_one(v)):
                f, g = f + u.log(), g + v.log()
                K = (f[..., :, None] + g[..., None, :] - C / eps).exp()
                u, v = torch.ones_like(a), torch.ones_like(b)
        P = u[..., :, None] * K * v[..., None, :]
    return _plan(P, C, a, b, spent)


def _problem(C: Tensor, a: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cost and marginals in one type and one shape, or ValueError."""
    dtype = torch.promote_types(C.dtype, torch.float32)
    C, (n, m) = C.to(dtype), C.shape[-2:]
    a = C.new_full((n,), 1 / n) if a is None else a
    b = C.new_full((m,), 1 / m) if b is None else b
    if not eps > 0:
        raise ValueError(f"eps {eps:g}: the entropic plan needs a positive one")
    a, b = a.to(C).expand(C.shape[:-1]), b.to(C).expand(*C.shape[:-2], m)
    if not ((a > 0).all() and (b > 0).all()):
        raise ValueError("a marginal holds a weight that is not positive: leave such points out")
    if not torch.allclose(a.sum(-1), b.sum(-1), rtol=1e-4, atol=0):
        raise ValueError(
            f"marginals of total weight {float(a.sum(-1).max()):g} and {float(b.sum(-1).max()):g}: equal ones"
        )
    return C, a, b


def _worst(relative: Tensor) -> float:
    # A batch of no problems has none that is wrong
    return float(relative.detach().abs().amax()) if relative.numel() else 0.0


def _further(u: Tensor, renewed: Tensor, relaxed: Tensor) -> Tensor:
    """u (renewed / u)^(7/4) for the problems that are relaxed, `renewed` for the others."""
    if not relaxed.any():
        return renewed
    step = renewed / u
    root = step.sqrt()  # by roots: a power costs as much as the product with the kernel
    further = step.mul_(u).mul_(root).mul_(root.sqrt_())
    return further if relaxed.all() else torch.where(relaxed[..., None], further, renewed)


def _far_from_one(u: Tensor) -> bool:
    """|log u| > ABSORB somewhere."""
    if not u.numel():
        return False
    least, most = u.aminmax()
    return float(least) < math.exp(-ABSORB) or float(most) > math.exp(ABSORB)


def _plan(P: Tensor, C: Tensor, a: Tensor, b: Tensor, spent: int) -> Plan:
    with torch.no_grad():
        error = torch.maximum((P.sum(-1) / a - 1).abs().amax(-1), (P.sum(-2) / b - 1).abs().amax(-1))
    return Plan(P, (P * C).sum((-2, -1)), error, spent)

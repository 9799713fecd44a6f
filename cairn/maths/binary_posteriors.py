"""Independent probabilities of several classes from their scores, and from which probability on a class is said to be shown.

Letters: decisions i = 1..n, each of one class c_i of k: score v_i, target y_i in [0, 1] (whether the image shows the class), weight
w_i; p_i the probability:

    p_i = sigma(a v_i + b + u_ci)
    minimise  sum_i w_i BCE(y'_i, p_i) + sum_c u_c^2 / (2 S^2) + (a s)^2 / (2 A^2) + b^2 / (2 A^2)

s deviation of the scores. a and b are those of all classes together, u_c what class c is more or less frequent, or scored too low
or too high: the fewer images show it, the nearer to 0. y' are Platt's targets, which are not quite 0 and 1, so that scores
that part the two do not make a infinite. Convex, minimised by Newton's method; u is eliminated, its part of the Hessian
being diagonal.

Source: Platt 1999, Probabilistic Outputs for Support Vector Machines, section 2; the classes' own offsets are ours, a normal prior on
them as in a random intercept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

OFFSET = 1.0
"""S."""

WIDE = 10.0
"""A."""

LEAST = 1e-3
"""a s at least: whatever is found, probabilities rank images as scores do."""

STEPS, ENOUGH = 50, 1e-10


class LogOdds(NamedTuple):
    """a v + b + u_c, b and u as one."""

    slope: float
    offsets: Float[Tensor, " k"]


class Decisions(NamedTuple):
    """Whether images show classes, one row for each image and class that is known of."""

    classes: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    shown: Float[Tensor, " n"]
    """y, in [0, 1]."""
    weights: Float[Tensor, " n"]


def log_odds(told: Decisions, k: int) -> LogOdds:
    """a > 0 and the offsets b + u of k classes, in float64. Without decisions a is 1 and the offsets are 0."""
    if not len(told.values):
        return LogOdds(1.0, torch.zeros(k, dtype=torch.float64))
    c, w = told.classes, told.weights.double()
    s = float(told.values.double().std(correction=0)) or 1.0
    x, y = told.values.double() / s, _platt(told)
    theta, u = torch.zeros(2, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)

    def loss(theta: Tensor, u: Tensor) -> float:
        data = cross_entropy(theta[0] * x + theta[1] + u[c], y, w, reduction="sum")
        return float(data + u.square().sum() / (2 * OFFSET**2) + theta.square().sum() / (2 * WIDE**2))

    now = loss(theta, u)
    for _ in range(STEPS):
        step, own = _newton(theta, u, c, x, y, w)
        size, then = 1.0, math.inf
        while size > 1e-6 and not (then := loss(theta - size * step, u - size * own)) <= now:
            size /= 2
        if not then <= now:
            break
        theta, u, gained, now = theta - size * step, u - size * own, now - then, then
        if gained <= ENOUGH * max(1.0, now):
            break
    return LogOdds(max(LEAST, float(theta[0])) / s, theta[1] + u)


def _platt(told: Decisions) -> Float[Tensor, " n"]:
    """y' = y (N+ + 1) / (N+ + 2) + (1 - y) / (N- + 2)."""
    y, w = told.shown.double(), told.weights.double()
    yes, no = (w * y).sum(), (w * (1 - y)).sum()
    return y * (yes + 1) / (yes + 2) + (1 - y) / (no + 2)


def _newton(theta: Tensor, u: Tensor, c: Tensor, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The steps of (a s, b) and of u."""
    k = len(u)
    p = (theta[0] * x + theta[1] + u[c]).sigmoid()
    r, h = w * (p - y), w * p * (1 - p)
    columns = torch.stack([x, torch.ones_like(x)], 1)

    def by_class(values: Tensor) -> Tensor:
        return torch.zeros(k, *values.shape[1:], dtype=values.dtype).index_add_(0, c, values)

    g, gu = columns.T @ r + theta / WIDE**2, by_class(r) + u / OFFSET**2
    H = columns.T @ (h[:, None] * columns) + torch.eye(2, dtype=torch.float64) / WIDE**2
    D, B = by_class(h) + 1 / OFFSET**2, by_class(h[:, None] * columns)  # of u, and between u and theta
    step = torch.linalg.solve(H - B.T @ (B / D[:, None]), g - B.T @ (gu / D))
    return step, (gu - B @ step) / D


def best_threshold(
    p: Float[Tensor, " n"], shown: Float[Tensor, " n"], weights: Float[Tensor, " n"]
) -> tuple[float, float]:
    """(t, F1): of all thresholds the one with the largest

        F1(t) = 2 sum_{p_i >= t} w_i y_i / (sum_{p_i >= t} w_i + sum_i w_i y_i),

    half way to the next smaller probability; (.5, 0) where nothing is shown.
    """
    order = p.double().argsort(descending=True)
    q, y, w = p.double()[order], shown.double()[order], weights.double()[order]
    whole = (w * y).sum()
    if not whole > 0:
        return 0.5, 0.0
    f1 = 2 * (w * y).cumsum(0) / (w.cumsum(0) + whole)
    last = torch.cat([q[1:] != q[:-1], torch.ones(1, dtype=torch.bool)])  # of its probability
    best = int(torch.where(last, f1, -1.0).argmax())
    below = float(q[best + 1]) if best + 1 < len(q) else 0.0
    return (float(q[best]) + below) / 2, float(f1[best])


def weighted_average_precision(
    values: Float[Tensor, " n"], shown: Float[Tensor, " n"], weights: Float[Tensor, " n"]
) -> float | None:
    """`cairn.maths.average_precision` of one class, of decisions that weigh; None where nothing is shown."""
    order = values.double().argsort(descending=True)
    v, y, w = values.double()[order], shown.double()[order], weights.double()[order]
    hits, taken = (w * y).cumsum(0), w.cumsum(0)
    if not hits[-1] > 0:
        return None
    last = torch.cat([v[1:] != v[:-1], torch.ones(1, dtype=torch.bool)])
    hits, taken = hits[last], taken[last]
    return float((torch.diff(hits, prepend=hits.new_zeros(1)) * hits / taken).sum() / hits[-1])

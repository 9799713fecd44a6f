"""Tail probabilities of two distributions, without scipy.

I_x(a, b) is the regularised incomplete beta function, by its continued fraction (modified Lentz).

Source: Press et al., Numerical Recipes, section 6.4; DiDonato and Morris 1992, ACM TOMS 18(3), the same fraction.
"""

from __future__ import annotations

import math

STEPS, CLOSE, TINY = 1000, 1e-13, 1e-300


def f_tail(f: float, a: float, b: float) -> float:
    """P(F > f) of Fisher's F with a and b degrees of freedom, which need not be whole: I_{b / (b + a f)}(b / 2, a / 2)."""
    return incomplete_beta(b / (b + a * f), b / 2, a / 2) if f > 0 else 1.0


def beta_binomial_tail(k: int, n: int, a: float, b: float) -> float:
    """P(K >= k), K binomial of n with a probability that is itself Beta(a, b): sum_j C(n, j) B(j + a, n - j + b) / B(a, b)."""
    logs = [
        math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) + _log_beta(j + a, n - j + b) - _log_beta(a, b)
        for j in range(max(k, 0), n + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) for 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(x, a, b) / a
    return 1 - front * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = _not_zero(1 + term / c), 1 / _not_zero(1 + term * d)
            found *= c * d
        if abs(c * d - 1) < CLOSE:
            break
    return found


def _not_zero(x: float) -> float:
    return x if abs(x) > TINY else TINY


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

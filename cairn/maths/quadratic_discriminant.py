"""Quadratic discriminant analysis with priors on means and covariances, and its exact leave-one-out scores.

Letters, for rows x of width d and classes c = 0..k-1 learned from n_c rows: m_c mean, A_c = sum (x - m_c)(x - m_c)^T scatter,
A = sum_c A_c; p_c prior mean; delta and kappa pseudo-rows at p_c, in the scatter and in the mean; nu pseudo-rows of the common
covariance S in that of a class; D isotropic in each block of columns, with the trace of A there.

A normal-inverse-Wishart prior around p_c, its parameters shared by all classes (empirical Bayes), gives

    A'_c = A_c + n_c delta / (n_c + delta) (m_c - p_c)(m_c - p_c)^T,      N = sum_c (n_c - 1 + n_c delta / (n_c + delta))
    S    = (1 - rho) sum_c A'_c / N + rho D,                             rho = d / (sum_c n_c + d)
    S_c  = (nu S + A'_c) / (nu + n_c),                                   mu_c = (n_c m_c + kappa p_c) / (n_c + kappa)
    g_c(x) = log N(x; mu_c, S_c)                                         up to what is the same for all classes.

A scatter is given as its factor, A_c = F_c^T F_c + rest, where only the trace of the rest is known: t_c = tr(rest) / tr(S) rows
of it count as pseudo-rows of S. With W S W^T = I, G_c = F_c W^T / sqrt(nu + t_c) and C C^T = I + G_c G_c^T,

    S_c^-1 = (nu + n_c)/(nu + t_c) W^T (I - P_c^T P_c) W,   P_c = C^-1 G_c,

so a class costs as many numbers as its factor has, and nothing of the size d x d.

Leave-one-out: x_i of class y is taken out of n_y, m_y, A'_y and sum_c A'_c; N, rho, D, t and the prior means stay as they are.
With the weight w_y = n_y + delta, r = x_i - (n_y m_y + delta p_y) / w_y and gam = w_y / (w_y - 1), both A'_y and their sum change
by -gam r r^T, hence every S_c by -w r r^T and S_y by a factor s besides:

    c != y: w = (nu + t_c) beta / (nu + n_c),           s = 1,                             e = x_i - mu_c
    c  = y: w = ((nu + t_y) beta + gam) / (nu + n_y),   s = (nu + n_y) / (nu + n_y - 1),
            e = (n_y (x_i - m_y) + kappa (x_i - p_y)) / (n_y - 1 + kappa)
    beta = (1 - rho) gam / N;  u = r^T S_c^-1 r,  v = e^T S_c^-1 r,  q = e^T S_c^-1 e
    g_c = -1/2 [(q + w v^2 / (1 - w u)) / s + log|S_c| + log(1 - w u) + d log s]

Sources: Friedman 1989, Regularized Discriminant Analysis (J. Am. Stat. Assoc. 84), for covariances between pooled and own;
Gelman et al., Bayesian Data Analysis, 3.6, for the prior; rank-one downdates by Sherman and Morrison. rho, the prior means that
texts predict, and the leave-one-out in this form are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ScatterStatistics:
    """What is known of k classes, float64."""

    counts: Float[Tensor, " k"]
    means: Float[Tensor, "k d"]
    factors: Sequence[Float[Tensor, "_ d"]]
    """F_c, of any number of rows."""
    cut: Float[Tensor, " k"]
    """Trace of what a factor lacks."""
    scatter: Float[Tensor, "d d"]
    """A, whole."""


class QuadraticDiscriminant:
    """g_c of all classes; see the module for the letters.

    `blocks` are the widths of the parts of a row, d in all. `delta` is 0 where the prior means say nothing of a class. Where no
    class has any scatter, S is isotropic with the variance of the class means around the prior means, or 1/d.
    """

    def __init__(
        self,
        statistics: ScatterStatistics,
        prior: Float[Tensor, "k d"],
        blocks: Sequence[int],
        *,
        nu: float,
        delta: float = 0.0,
    ):
        n, M = statistics.counts.double(), statistics.means.double()
        self._n, self._M, self._p, self._d, self._delta, self.nu = n, M, prior.double(), M.shape[1], delta, nu
        gap = M - self._p
        shift = (n * delta / (n + delta)).sqrt()[:, None] * gap
        A = statistics.scatter.double() + shift.T @ shift
        N = (n - 1 + n * delta / (n + delta)).sum().item()
        if not A.trace() > 0:
            A, N = gap.T @ gap, float(len(n))
            A = A.trace() / self._d * torch.eye(self._d, dtype=A.dtype)
            if not A.trace() > 0:
                A = torch.eye(self._d, dtype=A.dtype) * N / self._d
        self._N, self._rho = N, self._d / (n.sum().item() + self._d)
        D = torch.cat([part.mean().expand(len(part)) for part in (A.diagonal() / N).split(list(blocks))])
        S = (1 - self._rho) * A / N + self._rho * torch.diag(D)
        self._W = torch.linalg.solve_triangular(
            torch.linalg.cholesky(S), torch.eye(self._d, dtype=S.dtype), upper=False
        )
        self._t = statistics.cut.double() / S.trace()
        # Measured from their middle, so that squares below are of differences
        self._origin = M.mean(0)
        self._mw, self._pw = (M - self._origin) @ self._W.T, (self._p - self._origin) @ self._W.T
        self._P: list[Tensor] = []
        logdet = []
        for c, F in enumerate(statistics.factors):
            rows = torch.cat([F.double(), shift[c : c + 1]]) if delta else F.double()
            G = rows @ self._W.T / math.sqrt(nu + float(self._t[c]))
            C = torch.linalg.cholesky(torch.eye(len(G), dtype=G.dtype) + G @ G.T)
            self._P.append(torch.linalg.solve_triangular(C, G, upper=False))
            logdet.append(2 * C.diagonal().log().sum().item())
        self._scale = (nu + n) / (nu + self._t)
        self._logdet = torch.tensor(logdet, dtype=n.dtype) - self._d * self._scale.log()

    def scores(self, x: Float[Tensor, "n d"], kappa: float) -> Float[Tensor, "n k"]:
        """g_c(x)."""
        z = self._whitened(x)
        mu = self._middles(kappa)
        squares = z.square().sum(1)[:, None] - 2 * z @ mu.T + mu.square().sum(1)
        for c, P in enumerate(self._P):
            if len(P):
                squares[:, c] -= (z @ P.T - P @ mu[c]).square().sum(1)
        return -(self._scale * squares + self._logdet) / 2

    def _whitened(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (x.double() - self._origin) @ self._W.T

    def _middles(self, kappa: float) -> Float[Tensor, "k d"]:
        """mu_c, whitened; with delta for kappa the middle of the scatter."""
        return (self._n[:, None] * self._mw + kappa * self._pw) / (self._n + kappa)[:, None]

    def left_out(
        self, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], kappas: Sequence[float]
    ) -> list[Float[Tensor, "n k"]]:
        """For each kappa > 0, g_c(x_i) as it is without x_i, which is one of the rows of class y_i."""
        z, n, nu = self._whitened(x), self._n, self.nu
        weight = n[y] + self._delta
        middle, mu = self._middles(self._delta), torch.stack([self._middles(kappa) for kappa in kappas])
        r, kappa = z - middle[y], torch.tensor(kappas, dtype=z.dtype)
        alone = weight <= 1  # of a class of one row, without delta, nothing is taken out: it has no scatter
        gam = torch.where(alone, 0.0, weight / (weight - 1).masked_fill(alone, 1.0))
        beta = (1 - self._rho) * gam / self._N
        found = torch.empty(len(n), len(kappas), len(x), dtype=z.dtype)
        zz, zr, rr = z.square().sum(1), (z * r).sum(1), r.square().sum(1)
        for c, P in enumerate(self._P):
            own, m, zP = y == c, mu[:, c], z @ P.T
            mP, rP = m @ P.T, zP - (middle @ P.T)[y] if len(P) else zP
            u = self._scale[c] * (rr - rP.square().sum(1))
            w = ((nu + self._t[c]) * beta + own * gam) / (nu + n[c])
            s = torch.where(own, (nu + n[c]) / (nu + n[c] - 1), 1.0)
            # Out of its own class's mean, a row lies further off by the ratio of weights before and after
            stretch = torch.where(own, ((n[c] + kappa) / (n[c] + kappa - 1).clamp(min=1e-300))[:, None], 1.0)
            e = (
                (zz - zP.square().sum(1))
                - 2 * (m @ z.T - mP @ zP.T)
                + (m.square().sum(1) - mP.square().sum(1))[:, None]
            )
            q = self._scale[c] * stretch**2 * e
            v = self._scale[c] * stretch * ((zr - (zP * rP).sum(1)) - (m @ r.T - mP @ rP.T))
            found[c] = (q + w * v**2 / (1 - w * u)) / s + self._logdet[c] + (1 - w * u).log() + self._d * s.log()
        return [-g.T / 2 for g in found.transpose(0, 1)]


def predicted_means(means: Float[Tensor, "k d"], texts: Float[Tensor, "k w"] | None) -> Float[Tensor, "k d"]:
    """What the other classes make one expect of the mean of each class, before any of its own rows is seen: p_c = b + a t_c.

    b (d) and a are fitted by least squares to the other classes, a on the first w columns, where rows and texts share a space:
    a = sum (t - mean t).(m - mean m) / sum |t - mean t|^2 and b = mean m - a mean t, means and sums over all classes but c.
    Without texts a = 0, and a class alone is expected where it is.
    """
    M, k = means.double(), len(means)
    if k < 2:
        return M.clone()
    others = (M.sum(0) - M) / (k - 1)
    if texts is None:
        return others
    T = texts.double()
    T = T - T.mean(0)  # of no effect but on rounding
    w, around = T.shape[1], (-T) / (k - 1)  # means of the other texts
    m, t = M[:, :w] - M[:, :w].mean(0), T.square().sum(1)
    m_others = -m / (k - 1)
    spread = t.sum() - t - (k - 1) * around.square().sum(1)
    joint = (T * m).sum() - (T * m).sum(1) - (k - 1) * (around * m_others).sum(1)
    a = torch.where(spread > 1e-12, joint / spread.clamp(min=1e-12), 0.0)
    p = others.clone()
    p[:, :w] += a[:, None] * (T - around)
    return p

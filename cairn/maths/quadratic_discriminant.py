"""Quadratic discriminant analysis with priors on means and covariances, and its exact leave-one-out scores.

Letters, for rows x of width d and classes c = 0..k-1 learned from n_c rows: m_c mean, A_c = sum (x - m_c)(x - m_c)^T scatter,
A = sum_c A_c; p_c prior mean; delta and kappa pseudo-rows at p_c, in the scatter and in the mean; nu pseudo-rows of the common
covariance S in that of a class; D isotropic in each block of columns, with the trace of A there.

A normal-inverse-Wishart prior around p_c, its parameters shared by all classes (empirical Bayes), gives

    A'_c = A_c + n_c delta / (n_c + delta) (m_c - p_c)(m_c - p_c)^T,      N = sum_c (n_c - 1 + n_c delta / (n_c + delta))
    S    = (1 - rho) sum_c A'_c / N + rho D,                             rho = d / (sum_c n_c + d)
    S_c  = (nu S + A'_c) / (nu + n_c),                                   mu_c = (n_c m_c + kappa p_c) / (n_c + kappa)
    g_c(x) = log N(x; mu_c, S_c),                                        up to what is the same for all classes.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cairn.maths.score_modules import QuadraticScores

GROUP = 1024
"""Rows of factors that are multiplied at once."""


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
        self._P: list[tuple[slice, Tensor]] = []
        logdet = []
        for group in _groups([len(F) + 1 for F in statistics.factors]):
            F = pad_sequence(
                [F.double() for F in statistics.factors[group]], batch_first=True
            )  # rows of 0 change nothing
            if delta:
                F = torch.cat([F, shift[group, None]], 1)
            G = F @ self._W.T / (nu + self._t[group, None, None]).sqrt()
            C = torch.linalg.cholesky(torch.eye(G.shape[1], dtype=G.dtype) + G @ G.mT)
            self._P.append((group, torch.linalg.solve_triangular(C, G, upper=False)))
            logdet.append(2 * C.diagonal(dim1=1, dim2=2).log().sum(1))
        self._scale = (nu + n) / (nu + self._t)
        self._logdet = torch.cat([n.new_zeros(0), *logdet]) - self._d * self._scale.log()

    def scores(self, x: Float[Tensor, "n d"], kappa: float) -> Float[Tensor, "n k"]:
        """g_c(x)."""
        z = self._whitened(x)
        mu = self._middles(kappa)
        squares = z.square().sum(1)[:, None] - 2 * z @ mu.T + mu.square().sum(1)
        for group, P in self._P:
            # p_bn = P_b (z_n - mu_b)
            projected = torch.einsum("brd,nd->brn", P, z) - torch.einsum("brd,bd->br", P, mu[group])[:, :, None]
            squares[:, group] -= projected.square().sum(1).T
        return -(self._scale * squares + self._logdet) / 2

    def module(self, kappa: float) -> QuadraticScores:
        """`scores` as a module in float32."""
        longest = max((P.shape[1] for _, P in self._P), default=0)
        P = torch.cat([nn.functional.pad(P, (0, 0, 0, longest - P.shape[1])) for _, P in self._P])
        return QuadraticScores(self._origin, self._W, self._middles(kappa), P, self._scale, self._logdet)

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
        seen, at = y.unique(return_inverse=True)
        r, kappa = z - middle[y], torch.tensor(kappas, dtype=z.dtype)
        alone = weight <= 1  # of a class of one row, without delta, nothing is taken out: it has no scatter
        gam = torch.where(alone, 0.0, weight / (weight - 1).masked_fill(alone, 1.0))
        beta = (1 - self._rho) * gam / self._N
        found = torch.empty(len(kappas), len(n), len(x), dtype=z.dtype)
        zz, zr, rr = z.square().sum(1), (z * r).sum(1), r.square().sum(1)
        for group, P in self._P:
            # Of the classes b of a group and the rows n: z' S^-1 z and the like are z.z - (P z).(P z)
            own, m = y == torch.arange(len(n))[group, None], mu[:, group]
            zP, mP = torch.einsum("brd,nd->brn", P, z), torch.einsum("brd,jbd->bjr", P, m)
            rP = zP - torch.einsum("brd,kd->brk", P, middle[seen])[:, :, at]
            scale, held, count = self._scale[group, None], self._t[group, None], n[group, None]
            u = scale * (rr - rP.square().sum(1))
            w = ((nu + held) * beta + own * gam) / (nu + count)
            s = torch.where(own, (nu + count) / (nu + count - 1), 1.0)
            # Out of its own class's mean, a row lies further off by the ratio of weights before and after
            weights = n[group] + kappa[:, None]
            stretch = torch.where(own, (weights / (weights - 1).clamp(min=1e-300))[:, :, None], 1.0)
            e = (
                (zz - zP.square().sum(1))
                - 2 * (m @ z.T - (mP @ zP).transpose(0, 1))
                + (m.square().sum(2) - mP.square().sum(2).T)[:, :, None]
            )
            q = scale * stretch**2 * e
            v = scale * stretch * ((zr - (zP * rP).sum(1)) - (m @ r.T - (mP @ rP).transpose(0, 1)))
            rest = self._logdet[group, None] + (1 - w * u).log() + self._d * s.log()
            found[:, group] = (q + w * v**2 / (1 - w * u)) / s + rest
        return [-g.T / 2 for g in found]


def _groups(rows: Sequence[int]) -> Iterator[slice]:
    """Consecutive classes, together of at most GROUP rows where each has as many as the largest."""
    start = longest = 0
    for c, number in enumerate(rows):
        if c > start and max(longest, number) * (c + 1 - start) > GROUP:
            yield slice(start, c)
            start, longest = c, 0
        longest = max(longest, number)
    if rows:
        yield slice(start, len(rows))


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

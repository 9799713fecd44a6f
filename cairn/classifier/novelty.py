"""Does an image belong to any class that was learned? Told from what is kept, without an image.

Letters: z rows as the memory holds them (unit features), d wide; N(mu_c, S_c) Gaussian of class c learned from n_c images;
T = sum_c n_c S_c, N = sum_c (n_c - 1), V = T / N after shrinkage; m = sum_c n_c mu_c / sum_c n_c;

    W = (1 - r) V + r tr(V) / d I,  r = 1 / (1 + (N / d)^2): how classes scatter;  B = W + cov(mu): all of it together
    g(z) = max_c log N(z; mu_c, W) - log N(z; m, B)
    a(z) = (g(z) - mean g) / sd g + w (max_c score_c(z) - mean) / sd

with means and deviations over draws from N(mu_c, W), and score_c(z) what the method makes of the row alone, for references
and for new images alike. The known score is the share of reference values that are at most a(z): a p-value. References are
the a of images left out of a task, under a method that learned the task without them (see `cairn.classifier.calibration`), for new
images lie further from a class than those it was learned from; without any, they are the draws' own.

As classes come, N, W and the scores are others, and a values of earlier tasks are no longer those that such images have now.
A reference that was taken among k of today's K classes weighs (k / K)^p: after ten equal tasks those of the last three are
most of it, while classes that come one by one still leave references enough.

r is for few images: where N is not many times d, V is known in some directions only, and new images look further away than
left-out ones do, which share a day or a video with those that were kept.

Source: g is the relative Mahalanobis distance (Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD
Detection"); r, w, the references and p are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cairn.classifier.calibration import UNCALIBRATED, Calibration
from cairn.errors import ConfigError
from cairn.maths.gaussian import cholesky_repaired
from cairn.maths.shrinkage import Oas
from cairn.memory.protocol import WithScatter
from cairn.methods.protocol import GaussianScoring
from cairn.training.context import Seeds
from cairn.types import Features, Scores

TEXT_SHARE = 0.25
"""w. On `shapes:dev` none does as well; a little guards where texts know more than images."""

AGEING = 4
"""p, chosen on training images kept apart; see docs/calibration.md."""

DRAWS = 4096


def gaussians_of(method: Any) -> WithScatter | None:
    """Counts, means and scatter that a method keeps of its classes, if it does."""
    memory = method.memory if isinstance(method, GaussianScoring) else None
    return memory if isinstance(memory, WithScatter) else None


def require_threshold(value: float, name: str) -> None:
    """Raises ConfigError, naming `name`, for what is no known score: those are numbers from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ConfigError(f"{name} {value}: must be a number from 0 to 1, such as 0.05")


class Novelty:
    """The known score of a method as it stands. One that keeps no Gaussians gets its largest probability instead, as
    `calibration` makes it. `among` says of each of the `references` how many classes were known when it was taken; all
    weigh alike without it."""

    def __init__(
        self,
        method: Any,
        seed: int,
        references: Sequence[float] = (),
        among: Sequence[int] = (),
        text_share: float = TEXT_SHARE,
        calibration: Calibration = UNCALIBRATED,
        ageing: float = AGEING,
    ):
        self._method, self._share, self._calibration = method, text_share, calibration
        self._memory = gaussians_of(method)
        if self._memory is None or not self._memory.classes:
            self._memory = None
            return
        k, d, mu = self._memory.classes, self._memory.dim, self._memory.means
        self._gaussian = _Relative(self._memory.scatter, mu, self._memory.counts)
        rng, per_class = Seeds(seed).generator("novelty"), max(2, -(-DRAWS // k))
        noise = torch.randn(k, per_class, d, generator=rng, dtype=torch.float64)
        drawn = method.on_sphere((mu[:, None] + noise @ self._gaussian.factor.T).flatten(0, 1).float())
        g, t = self._gaussian(drawn.double().cpu()), self._text(drawn)
        self._scales = [(x.mean(), x.std().clamp_min(1e-12)) for x in (g, t)]
        a = torch.tensor(references, dtype=torch.float64) if len(references) else self._standard(g, t)
        weights = (torch.tensor(among, dtype=torch.float64) / k) ** ageing if len(among) else torch.ones_like(a)
        self._references, order = a.sort()
        self._shares = torch.cat([torch.zeros(1, dtype=torch.float64), weights[order].cumsum(0) / weights.sum()])

    @property
    def references(self) -> float:
        """m, how many references there are; where some weigh less, how many of one weight would tell as much."""
        weights = self._shares.diff()
        return float(weights.sum() ** 2 / weights.square().sum())

    def known(self, features: Features, scores: Scores) -> np.ndarray:
        """(n,) in [0, 1], from what the method made of the images; `scores` count where it keeps no Gaussians."""
        if self._memory is None:
            return self._calibration.log_probabilities(scores).amax(1).exp().numpy()
        a = self.fit(self._method.memory_rows(features))
        among = self._shares[torch.searchsorted(self._references, a, right=True)]
        # Below all of them order still counts
        below = torch.exp((a - self._references[0]).clamp_max(0)) / (len(self._references) + 1)
        return torch.where(among > 0, among, below).numpy()

    def fit(self, z: Features) -> Float[Tensor, " n"]:
        """a(z) of rows as the memory holds them; only for methods that keep Gaussians."""
        return self._standard(self._gaussian(z.detach().double().cpu()), self._text(z))

    def _text(self, z: Features) -> Float[Tensor, " n"]:
        return self._method.row_scores(z).detach().amax(1).double().cpu()

    def _standard(self, g: Tensor, t: Tensor) -> Tensor:
        (g_mean, g_scale), (t_mean, t_scale) = self._scales
        return (g - g_mean) / g_scale + self._share * (t - t_mean) / t_scale


def within_factor(memory: WithScatter) -> Float[Tensor, "d d"]:
    """L of W = L L^T."""
    return cholesky_repaired(_within(memory.scatter, memory.means, memory.counts))[0]


def _within(T: Tensor, mu: Tensor, n: Tensor) -> Tensor:
    """W. Of one image of each class, or copies of it, nothing tells it: then classes scatter as their means do."""
    if not T.trace() > 0:
        share = n.to(mu) / n.sum()
        spread = float(share @ ((mu - share @ mu) ** 2).sum(1)) or 1.0
        T = spread / len(T) * torch.eye(len(T), dtype=mu.dtype)
    d, N = len(T), int((n - 1).clamp_min(0).sum())
    V, r = Oas()(T / max(1, N), torch.tensor(max(1, N))), 1 / (1 + (N / d) ** 2)
    return (1 - r) * V + r * V.trace() / d * torch.eye(d, dtype=V.dtype)


class _Relative:
    """g(z), up to a constant."""

    def __init__(self, T: Tensor, mu: Tensor, n: Tensor):
        share, W = n / n.sum(), _within(T, mu, n)
        m = share.double() @ mu
        self.factor = cholesky_repaired(W)[0]
        self._means = _solved(self.factor, mu)
        self._whole = cholesky_repaired(W + (mu - m).T @ (share[:, None] * (mu - m)))[0]
        # Of a single class, all there is and what the class scatters are the same
        self._mean = _solved(self._whole, m[None]) if len(mu) > 1 else None

    def __call__(self, z: Tensor) -> Tensor:
        near = torch.cdist(_solved(self.factor, z), self._means).amin(1) ** 2
        if self._mean is None:
            return -0.5 * near
        return 0.5 * ((_solved(self._whole, z) - self._mean) ** 2).sum(1) - 0.5 * near


def _solved(L: Tensor, x: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, x.T, upper=False).T

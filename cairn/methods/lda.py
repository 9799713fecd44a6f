"""Discriminant analysis on a frozen image tower: class means and one covariance, no training.

Source: Hayes and Kanan, Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis (2020), arXiv 1909.01520,
section 3: running means and one running covariance, shrunk before it is inverted. A covariance per class, as in FeCAM
(Goswami et al. 2023), is a setting. Embeddings on the unit sphere and equal priors are ours.

Letters: z unit embedding of an image; N(mu_c, S_c) Gaussian of class c, with S_c = S for all classes by default.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.gaussian import cholesky_repaired
from cairn.maths.score_modules import QuadraticScores, UnitRows
from cairn.maths.similarity import unit
from cairn.memory.covariances import Covariance, LowRank, Shared
from cairn.memory.gaussians import GaussianMemory, GaussianSettings
from cairn.methods.protocol import FROZEN, Card, GaussianScoring, KeepsSums, LearnsOnline, ScoresAsModule
from cairn.towers.protocol import Towers
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.types import Features, Labels, Pixels, Scores, State


class LdaConfig(GaussianSettings):
    """The settings of discriminant analysis."""

    covariance: Covariance = Field(
        default=Shared(),
        description="shared: one for all classes, a linear head; full, low_rank or diagonal: one per class",
    )


class LDA(GaussianScoring[GaussianMemory], KeepsSums, LearnsOnline, ScoresAsModule):
    """argmax_c log N(z; mu_c, S_c)."""

    card = Card(
        title="Discriminant analysis: class means, one covariance",
        source="Hayes & Kanan 2020",
        citation="Hayes, Kanan. Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis. CVPR Workshops "
        "2020. arXiv 1909.01520.",
        config=LdaConfig,
        stages=("mean embedding per class, one covariance for all",),
        trains="nothing",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: k * (4 * d + 8) + 2 * d * (d + 1),
        closed_form=True,
        passes="one per image, can be cached",
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: LdaConfig, *, seed: int):
        self.towers, self.config = towers, config
        self._set(config.memory(towers.dim))

    def _set(self, memory: GaussianMemory) -> None:
        self.memory = memory
        self._whiteners: list[Tensor] = []

    def learn(self, task: Task, ctx: Context) -> None:
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
        z, y = encode(loader, lambda z, _: unit(z), ctx, "Z", embed=self.embed)
        self._set(self.memory.add(z, y))

    def forget(self, c: int) -> None:
        self._set(self.memory.without(c))

    @property
    def trained(self) -> str | None:
        low = isinstance(self.memory.kind, LowRank)
        return "covariance low_rank keeps leading directions alone" if low else None

    def unlearn(self, features: Features, labels: Labels) -> None:
        self._set(self.memory.without_rows(unit(features), labels))

    def merge(self, c: int, other: int) -> None:
        self._set(self.memory.merged(c, other))

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def row_scores(self, z: Features) -> Scores:
        """-|L_c^-1 (z - mu_c)|^2 / 2 - log|L_c|, where S_c = L_c L_c^T; without what is the same for all classes."""
        x, mu = z.double().cpu(), self.memory.means
        columns = [torch.empty(len(x), 0, dtype=x.dtype)]
        for c, W in enumerate(self._inverse_factors()):
            if self.config.covariance.pooled:
                near = torch.cdist(x @ W.T, mu @ W.T, compute_mode="donot_use_mm_for_euclid_dist")
                return (-(near**2) / 2).to(z)
            columns.append((W.diagonal().log().sum() - ((x - mu[c]) @ W.T).square().sum(1) / 2)[:, None])
        return torch.cat(columns, 1).to(z)

    def scores_module(self) -> nn.Sequential:
        if not self.config.covariance.pooled:
            raise ConfigError(
                "covariance: one per class cannot be exported; with covariance=shared, the default, it can"
            )
        (W,), k, d = self._inverse_factors(), self.memory.classes, self.memory.dim
        head = QuadraticScores(
            torch.zeros(d), W, self.memory.means @ W.T, torch.zeros(k, 0, d), torch.ones(k), torch.zeros(k)
        )
        return nn.Sequential(UnitRows(self.towers.vision()), head).cpu().float().eval()

    def _inverse_factors(self) -> list[Tensor]:
        """L_c^-1 for every class, one in all if the covariance is shared."""
        if not self._whiteners and self.memory.classes:
            eye = torch.eye(self.memory.dim, dtype=torch.float64)
            for c in range(1 if self.config.covariance.pooled else self.memory.classes):
                L, _ = cholesky_repaired(self.memory.covariance(c))
                self._whiteners.append(torch.linalg.solve_triangular(L, eye, upper=False))
        return self._whiteners

    def state_dict(self) -> State:
        return self.memory.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._set(self.memory.restored(state))

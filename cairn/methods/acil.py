"""ACIL: a linear head in closed form, updated task after task to exactly what training on everything would give.

Source: Zhuang et al., ACIL: Analytic Class-Incremental Learning with Absolute Memorization and Privacy Protection
(NeurIPS 2022), arXiv 2205.14922, section III: a frozen backbone, a random buffer layer, and recursive least squares. The
paper trains its backbone on the first task; here it is CLIP's, as it came [I].

Letters: h random features of an image (m numbers), H those of a task (n x m), Y its labels one-hot; lam the ridge;
P = (G + lam I)^-1 with G the sum of H^T H over all tasks.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import DataError
from cairn.maths.ridge import one_hot, recursive_ridge, reduced_ridge
from cairn.maths.rows import merged, without
from cairn.maths.score_modules import RandomFeatureScores
from cairn.methods.parts.random_features import RandomFeatures
from cairn.methods.protocol import FROZEN, Card, KeepsSums, LearnsOnline, ScoresAsModule
from cairn.settings import Settings
from cairn.towers.protocol import Towers
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.types import Features, Labels, Pixels, Scores, State


class AcilConfig(Settings):
    """The settings of ACIL."""

    width: int = Field(
        default=2048, ge=0, description="m, random features; 0: the embeddings themselves [I; paper: thousands]"
    )
    ridge: float = Field(default=100.0, gt=0, description="lam, fixed for the whole stream [I]")


class ACIL(KeepsSums, LearnsOnline, ScoresAsModule):
    """argmax_c s (h W)_c, W = (G + lam I)^-1 C; the scale s on what is near 0 or 1 is for probabilities alone."""

    card = Card(
        title="ACIL: recursive least squares",
        source="Zhuang et al. 2022",
        citation="Zhuang et al. ACIL: Analytic Class-Incremental Learning with Absolute Memorization and Privacy Protection. "
        "NeurIPS 2022. arXiv 2205.14922.",
        config=AcilConfig,
        stages=("one pass of the frozen tower, random features", "recursive update of the linear head"),
        trains="head",
        keeps="second-order",
        bytes=lambda k, d, n, i, w: 8 * 2048**2,
        closed_form=True,
        passes="one per image, can be cached",
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: AcilConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.random = RandomFeatures(towers.dim, config.width, seed)
        m = self.random.width
        self.P = torch.eye(m, dtype=torch.float64) / config.ridge
        self.W = torch.zeros(m, 0, dtype=torch.float64)

    @property
    def memory_bytes(self) -> int:
        return self.P.nbytes

    def learn(self, task: Task, ctx: Context) -> None:
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
        z, y = encode(loader, lambda z, _: z, ctx, "Z", embed=self.embed)
        k = max(task.classes.stop, self.W.shape[1])
        for rows in torch.arange(len(z)).split(self.random.width):
            H = self.random(z[rows]).double()
            self.P, self.W = recursive_ridge(self.P, self.W, H, one_hot(y[rows], k))

    def forget(self, c: int) -> None:
        """Its column of the head. That its images were other classes' counterexamples stays."""
        self.W = without(self.W, c, 1)

    def unlearn(self, features: Features, labels: Labels) -> None:
        for rows in torch.arange(len(labels)).split(self.random.width):
            H, Y = self.random(features[rows]).double(), one_hot(labels[rows], self.W.shape[1])
            try:
                self.P, self.W = reduced_ridge(self.P, self.W, H, Y)
            except ValueError:
                raise DataError("these images were not learned with these towers: the sums do not hold them") from None

    def merge(self, c: int, other: int) -> None:
        """W is linear in the labels."""
        self.W = merged(self.W, c, other, 1)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def scores(self, features: Features) -> Scores:
        return self.towers.logit_scale * self.random(features) @ self.W.to(features)

    def scores_module(self) -> nn.Sequential:
        head = RandomFeatureScores(self.random.V, self.W, self.towers.logit_scale)
        return nn.Sequential(self.towers.vision(), head).cpu().float().eval()

    def state_dict(self) -> State:
        return {"P": self.P, "W": self.W, "seed": torch.tensor(self.random.seed)}

    def load_state_dict(self, state: State) -> None:
        self.P, self.W = state["P"], state["W"]
        self.random = RandomFeatures(self.towers.dim, self.config.width, int(state["seed"]))

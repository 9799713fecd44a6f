"""RanPAC: embeddings widened by a frozen random layer, second-order statistics of all classes, a ridge chosen by each task.

Source: McDonnell et al., RanPAC: Random Projections and Pre-trained Models for Continual Learning (NeurIPS 2023),
arXiv 2307.02251, section 4 and algorithm 1. The paper's phase 1, tuning on the first task, is a setting. The statistics
are the paper's G and C; that they are kept and solved as a square root is ours and changes no result, see memory/second_order.py.

Letters: h = relu(z V) random features of an image (m numbers), H those of a task (n x m), Y its labels one-hot;
G = sum H^T H = R^T R, C = sum H^T Y = R^T D; lam the ridge.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import NotFinite
from cairn.maths.ridge import descended, one_hot
from cairn.maths.rows import merged, without
from cairn.maths.score_modules import RandomFeatureScores
from cairn.memory.second_order import SecondOrder
from cairn.methods.parts.first_session import adapted
from cairn.methods.parts.random_features import RandomFeatures
from cairn.methods.parts.stages import behind_trunk
from cairn.methods.protocol import FROZEN, Card, HoldsOut, KeepsSums, LearnsOnline, ScoresAsModule
from cairn.settings import Settings, kind_by_name
from cairn.towers.protocol import Towers
from cairn.towers.tuning import Frozen, ImageEncoder, Tuning
from cairn.training.context import Context, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part


class RanpacConfig(Settings):
    """The settings of RanPAC."""

    width: int = Field(default=10_000, ge=0, description="m, random features; 0: the embeddings themselves")
    lowest: int = Field(default=-8, ge=-30, le=30, description="lam is tried on each task from 10^lowest ...")
    highest: int = Field(default=8, ge=-30, le=30, description="... to 10^highest, in powers of ten")
    search: Literal["near", "all"] = Field(
        default="near",
        description="from the ridge of the task before, while a neighbour is better; or all of them. The same where the "
        "error has one minimum [I; paper: all]",
    )
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of a task's images that choose among them")
    tuning: Tuning = Field(
        default=Frozen(), description="phase 1, on the first task: none, bottleneck, lora, full or adapter"
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=20, batch=48, lr=0.01, optimizer="sgd"),
        description="optimisation of phase 1, if it trains",
    )

    _kinds = field_validator("tuning", mode="before")(kind_by_name)

    @model_validator(mode="after")
    def _some_ridge(self) -> RanpacConfig:
        if self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest} is above highest {self.highest}, which leaves no ridge to try")
        return self

    @property
    def ridges(self) -> list[float]:
        return [10.0**exponent for exponent in range(self.lowest, self.highest + 1)]


class RanPAC(HoldsOut, KeepsSums, LearnsOnline, ScoresAsModule):
    """argmax_c s (h W)_c, W = (G + lam I)^-1 C; the scale s on what is near 0 or 1 is for probabilities alone."""

    card = Card(
        title="RanPAC: random features, ridge chosen per task",
        source="McDonnell et al. 2023",
        citation="McDonnell et al. RanPAC: Random Projections and Pre-trained Models for Continual Learning. NeurIPS 2023. "
        "arXiv 2307.02251.",
        config=RanpacConfig,
        stages=(
            "phase 1, first task alone: the image encoder is tuned (off by default)",
            "phase 2: random features, second-order statistics; a ridge chosen on held-out images of the task",
        ),
        trains="head",
        keeps="second-order",
        bytes=lambda k, d, n, i, w: 4 * n * (10000 + k) if n <= 10000 else 4 * (50_005_000 + 10_000 * k),
        closed_form=True,
        passes="one per image, can be cached",
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    def __init__(self, towers: Towers, config: RanpacConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.image = ImageEncoder(towers, config.tuning, Seeds(seed).generator("encoder"))
        self.random = RandomFeatures(towers.dim, config.width, seed)
        m = self.random.width
        self.sums, self.W, self.lam = SecondOrder.empty(m), torch.zeros(m, 0), 0.0
        self.held_out: tuple[Scores, Labels] | None = None

    @property
    def encoder(self) -> str:
        return f"adapted-{self.image.version}" if self.image.parameters() else FROZEN

    @property
    def memory_bytes(self) -> int:
        return self.sums.bytes

    def learn(self, task: Task, ctx: Context) -> None:
        config, ctx = self.config, ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)

        # Phase 1, before the first task alone: the encoder is adapted.
        loader = behind_trunk(loader, self.image, ctx)
        if self.image.parameters() and not self.image.version:
            adapted(self.image, self.towers, loader, config.schedule, ctx.at(stage=1))

        # Phase 2: the ridge is the one that fits held-out images of the task best; then all of them count.
        with self.image.inference():
            z, y = encode(loader, lambda pixels, _: self.image(pixels), ctx, "Z1")
        Y = one_hot(y, max(task.classes.stop, self.sums.D.shape[1])).float()
        self.lam, self.sums = self._chosen(z, Y, ctx.seeds)
        self.W = self.sums.solution(self.lam)
        ctx.log("ridge", chosen=self.lam, rows=len(self.sums.R))

    def _joined(self, sums: SecondOrder, z: Features, Y: Scores, rng: torch.Generator | None = None) -> SecondOrder:
        """The sums with these images learned, some at a time."""
        for rows in torch.arange(len(z)).split(self.random.width):
            sums = sums.joined(self.random(z[rows]), Y[rows], rng)
        return sums

    def _chosen(self, z: Features, Y: Scores, seeds: Seeds) -> tuple[float, SecondOrder]:
        """The lam of the smallest error on held-out images, learned from the others and all tasks before; and the sums with
        those images, too. Their scores with it are left in `held_out`."""
        order = torch.randperm(len(z), generator=seeds.generator("held-out"))
        out, learned = order.tensor_split([max(1, round(self.config.held_out * len(z)))])
        # Not rotated: while there are fewer rows than features, ridges near 0 are told apart by less than a rotation's rounding.
        sums, H, ridges = self._joined(self.sums, z[learned], Y[learned]), self.random(z[out]), self.config.ridges

        @cache
        def error(i: int) -> float:
            found = sums.error(H, Y[out], ridges[i])
            return found if math.isfinite(found) else math.inf

        near = self.config.search == "near" and self.lam in ridges
        best = descended(error, ridges.index(self.lam), len(ridges)) if near else min(range(len(ridges)), key=error)
        if error(best) == math.inf:
            raise NotFinite(
                f"ridges 1e{self.config.lowest} to 1e{self.config.highest}: none has a solution; raise highest"
            )
        labels = Y[out].argmax(1)
        known = (sums.D != 0).any(0)[labels]  # of a class all of whose images are held out nothing was learned
        self.held_out = self.towers.logit_scale * H[known] @ sums.solution(ridges[best]), labels[known]
        rng, few = seeds.generator("rotation"), len(self.sums.R) + len(z) <= self.sums.R.shape[1]
        return ridges[best], self._joined(self.sums, z, Y, rng) if few else self._joined(sums, z[out], Y[out])

    def forget(self, c: int) -> None:
        """Its column of the head. That its images were other classes' counterexamples stays."""
        self.sums, self.W = self.sums.without(c), without(self.W, c, 1)

    @property
    def trained(self) -> str | None:
        return "the image encoder was trained on those of the first task" if self.image.parameters() else None

    @property
    def repeats(self) -> str | None:
        return "tuning trains the image encoder in epochs" if self.image.parameters() else None

    def unlearn(self, features: Features, labels: Labels) -> None:
        """The ridge stays."""
        for rows in torch.arange(len(labels)).split(self.random.width):
            Y = one_hot(labels[rows], self.sums.D.shape[1])
            self.sums = self.sums.without_rows(self.random(features[rows]), Y)
        self.W = self.sums.solution(self.lam)

    def merge(self, c: int, other: int) -> None:
        """The ridge stays."""
        self.sums, self.W = self.sums.merged(c, other), merged(self.W, c, other, 1)

    def embed(self, pixels: Pixels) -> Features:
        return self.image(pixels)

    def scores(self, features: Features) -> Scores:
        return self.towers.logit_scale * self.random(features) @ self.W.to(features)

    def scores_module(self) -> nn.Sequential:
        head = RandomFeatureScores(self.random.V, self.W, self.towers.logit_scale)
        return nn.Sequential(self.image.copied(), head).cpu().float().eval()

    def state_dict(self) -> State:
        chosen = torch.tensor(self.lam, dtype=torch.float64)
        held = {"W": self.W, "lam": chosen, "seed": torch.tensor(self.random.seed)}
        return held | flattened({"image": self.image.state_dict(), "sums": self.sums.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.W, self.lam = state["W"], float(state["lam"])
        self.sums = SecondOrder.from_state(part(state, "sums"))
        self.random = RandomFeatures(self.towers.dim, self.config.width, int(state["seed"]))
        self.image.load_state_dict(part(state, "image"))

"""CalFuse: an adapter behind a frozen image tower, calibrated by the original feature, fused by QR, distilled.

Source: Guo et al., CalFuse: Feature Calibration Enhanced Parameter Fusion for Class-Continual Learning (2025), arXiv 2503.18672.
Its abstract and published summaries were read, its equations were not, so none is cited by number. [P] marks what they state: a
frozen CLIP and a trained adapter behind its image tower; the original feature keeps a share in the decision (feature
calibration), adjusted from task to task; old and new parameters fused after each task through a QR decomposition; knowledge
distillation; no old data. [K] is RAPF's published code for the adapter and the mask of the fusion. Every formula is ours [I]:

1. calibrated feature of an image for a class of task b: z_b = unit(a_b x + (1 - a_b) unit(W x)), a_b in [0, 1] fixed, or trained
   with task b alone and standing still afterwards;
2. loss: CE(s z T_b^T, y) + kappa tau^2 KL(softmax(s z' T_old^T / tau) || softmax(s z T_old^T / tau)), z' with W';
3. fusion, after all tasks but the first: W' = Q R, D = Q^T W - R, W <- Q (R + M D), M = min(1, |D| / max |D| + constant);
4. scores: s z_b . t_c of all classes seen, b the task of class c.

The softmax of 2 is over the classes of the task alone: nothing is replayed, so over all classes seen the old ones would only be
pushed away. That is a setting, as are other bases and masks in 3; distillation is off by default.

Letters: x unit embedding of an image, W adapter (d x d), W' the adapter before the task, both the identity at first; t_c unit text
of class c, T_b those of the task's classes, T_old those of the classes before; s scale; kappa, tau weight and temperature of the
distillation.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.fusion import Mask, fused
from cairn.maths.losses import distillation
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.replay import ReplayBatches
from cairn.methods.parts.stages import class_anchors, competing, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, NamesClasses
from cairn.settings import Given, Settings, kind_by_name
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Pixels, Scores, State


class Fixed(Given):
    """The same share for all tasks."""

    kind: Literal["fixed"] = Field(default="fixed", description="the same share of the original feature in all tasks")
    share: float = Field(
        default=0.5, ge=0, le=1, description="a, share of the original feature; 0: the adapter alone [I]"
    )


class Learned(Given):
    """A share that is trained with each task, for its classes."""

    kind: Literal["learned"] = Field(default="learned", description="a share per task, trained with it")
    start: float = Field(default=0.5, gt=0, lt=1, description="a before it is trained [I]")


class _Fusion(Given):
    mask: Mask = Field(
        default="clipped",
        description="share of the new weights: min(1, D / max D + constant), or D / (D + constant mean D) [K: clipped]",
    )
    constant: float = Field(
        default=0.0, ge=0, description="the mask's constant; clipped: 1 is all new; ratio: 0 is all new [I; K: .6]"
    )


class Qr(_Fusion):
    """In the basis Q of W' = Q R."""

    kind: Literal["qr"] = Field(default="qr", description="in the basis Q of W' = Q R")


class Svd(_Fusion):
    """In the basis of the left singular vectors of W'."""

    kind: Literal["svd"] = Field(default="svd", description="in the basis of the left singular vectors of W'")


class Plain(_Fusion):
    """Entry by entry of W itself."""

    kind: Literal["plain"] = Field(default="plain", description="entry by entry of W itself")


class Unfused(Given):
    """The adapter stays as it was trained."""

    kind: Literal["none"] = Field(default="none", description="the adapter stays as it was trained")


Calibration: TypeAlias = Fixed | Learned
Fusion: TypeAlias = Qr | Svd | Plain | Unfused


class CalFuseConfig(Settings):
    """The settings of CalFuse."""

    calibration: Calibration = Field(
        default=Fixed(), description="share of the original feature: fixed, or learned per task [P: adjusted; I: how]"
    )
    fusion: Fusion = Field(
        default=Qr(), description="basis in which old and new weights are fused: qr, svd, plain; or none [P: qr]"
    )
    classes: Literal["current", "seen"] = Field(
        default="current", description="classes in the softmax: the task's, or all seen [I]"
    )
    distillation: float = Field(
        default=0.0, ge=0, description="kappa, weight of the distillation over old classes; 0: off [P: some; I: 0]"
    )
    temperature: float = Field(default=2.0, gt=0, description="tau, temperature of the distillation [K: 2]")
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=32, lr=1e-4),
        description="training of the adapter [I: the rate chosen on validation splits; K: 1e-3]",
    )

    _kinds = field_validator("calibration", "fusion", mode="before")(kind_by_name)


class CalFuse(NamesClasses):
    """argmax_c s cos(a_c x + (1 - a_c) unit(W x), t_c), a_c the share of the task of class c."""

    card = Card(
        title="CalFuse: calibrated adapter, fused by QR after every task",
        source="Guo et al. 2025",
        citation="Guo et al. CalFuse: Feature Calibration Enhanced Parameter Fusion for Class-Continual Learning. 2025. "
        "arXiv 2503.18672.",
        config=CalFuseConfig,
        stages=(
            "one pass of the frozen tower",
            "adapter: cross entropy of calibrated features over the task's classes, and distillation over old ones if asked for",
            "fusion: old and new weights in the basis of the old ones' QR decomposition",
        ),
        trains="adapter",
        keeps="nothing",
        needs="images; texts that the towers can tell apart",
        passes="one per image, can be cached",
        text=True,
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    encoder = FROZEN
    memory_bytes = 0

    def __init__(self, towers: Towers, config: CalFuseConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.W = torch.eye(towers.dim)
        self.anchors, self.shares = torch.zeros(0, towers.dim), torch.zeros(0)

    def learn(self, task: Task, ctx: Context) -> None:
        config, s, device = self.config, self.towers.logit_scale, self.towers.device
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        k = len(self.anchors)  # old classes
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, ctx.log).cpu()])
        seen = len(self.anchors)
        x, y = encode(loader, lambda z, _: unit(z), ctx, "X", embed=self.embed)

        classes = competing(y.unique() if config.classes == "current" else torch.arange(seen), seen, ctx.log).to(device)
        before, T, old = self.W.to(device), self.anchors.to(device), self.shares.to(device)
        W, logit = nn.Parameter(before.clone()), _logit(config.calibration, device)

        def shares() -> Float[Tensor, " k"]:
            """a_c of all classes seen: those of old classes stand still."""
            return torch.cat([old, _share(config.calibration, logit).expand(seen - k)])

        def loss(x: Tensor, y: Tensor) -> Tensor:
            x, y, a = x.to(device), y.to(device), shares()
            cosines = calibrated_cosines(x, W, T, a)
            value = cross_entropy(s * cosines[:, classes], torch.searchsorted(classes, y))
            if config.distillation and k:
                former = calibrated_cosines(x, before, T[:k], old)
                value = value + config.distillation * distillation(s * cosines[:, :k], s * former, config.temperature)
            return value

        if seen > 1:
            trained = [W] if isinstance(config.calibration, Fixed) else [W, logit]
            nothing = GaussianMemory(self.towers.dim)  # of the task's images alone
            batches = ReplayBatches(x, y, nothing, batch=config.schedule.batch, real_share=None, device=device)
            fit(loss, trained, batches, config.schedule, ctx)
        self.shares = shares().detach().cpu()
        self.W = self._fused(W.detach().cpu()) if k else W.detach().cpu()
        ctx.log("adapter", distance=(self.W - torch.eye(len(self.W))).norm().item())

    def _fused(self, new: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        """Of the first task there are no older weights to hold on to."""
        how = self.config.fusion
        return new if isinstance(how, Unfused) else fused(self.W, new, how.constant, how.mask, how.kind)

    def forget(self, c: int) -> None:
        self.anchors, self.shares = without(self.anchors, c), without(self.shares, c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text. What was trained with the old one stays."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def scores(self, features: Features) -> Scores:
        W, T, shares = (held.to(features.device) for held in (self.W, self.anchors, self.shares))
        return self.towers.logit_scale * calibrated_cosines(unit(features), W, T, shares)

    def state_dict(self) -> State:
        return {"W": self.W, "anchors": self.anchors, "shares": self.shares}

    def load_state_dict(self, state: State) -> None:
        self.W, self.anchors, self.shares = state["W"], state["anchors"], state["shares"]


def _logit(calibration: Calibration, device: torch.device) -> nn.Parameter:
    """From which a share is made: log a / (1 - a), so that it stays within 0 and 1."""
    start = 0.5 if isinstance(calibration, Fixed) else calibration.start
    return nn.Parameter(torch.tensor(math.log(start / (1 - start)), device=device))


def _share(calibration: Calibration, logit: Tensor) -> Tensor:
    return torch.full_like(logit, calibration.share) if isinstance(calibration, Fixed) else logit.sigmoid()


def calibrated_cosines(
    x: Float[Tensor, "n d"], W: Float[Tensor, "d d"], T: Float[Tensor, "k d"], shares: Float[Tensor, " k"]
) -> Scores:
    """cos(a_c x_i + (1 - a_c) w_i, t_c), w = unit(W x), of unit rows x and T; a_c = shares_c.

    Written out, so that a share per class costs two products: |a x + (1 - a) w|^2 = a^2 + (1 - a)^2 + 2 a (1 - a) x . w.
    """
    w, a = unit(x @ W.T), shares
    along = a * (x @ T.T) + (1 - a) * (w @ T.T)
    squared = a**2 + (1 - a) ** 2 + 2 * a * (1 - a) * (x * w).sum(1, keepdim=True)
    return along / squared.clamp(min=torch.finfo(squared.dtype).eps).sqrt()

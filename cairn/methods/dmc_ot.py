"""DMC-OT: DMC's two stages, with the old Gaussians moved after the vision encoder, and prompts that know their task.

Source: "Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning" (arXiv 2511.10974). The abstract
states optimal-transport guided calibration of the class statistics and task-specific prompts [P]; the formula of the
calibration and the form of the prompts are not public and are ours [I] or from nearest practice [K]. `drift=bures` is the
Gaussian optimal transport map, the nearest reading of the abstract; docs/methods.md says why the default is another one.

Letters: f_old, f_new the encoder before and after stage 1; Z0, Z1 unit features of the same images under each; N(mu_c,
S_c) the Gaussian of class c; x -> A_c x + b_c the map that moves it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from cairn.data.loading import Loader
from cairn.data.probes import Probes
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.drift import AnyDrift, Guarded, LocalPairedMap, MeanShift
from cairn.maths.losses import class_cross_entropy, mean_squared_cosine
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, kept_bytes
from cairn.methods.parts.stages import TextStage, VisionStage, align_text, align_vision, behind_trunk
from cairn.methods.parts.two_stage import TwoStageState
from cairn.methods.protocol import Card
from cairn.settings import kind_by_name
from cairn.towers.prompts import Prompts
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.types import Features, Labels

PROMPTS = Prompts(shared=4, task=4, per_class=0, freeze_old=True, residual=20.0)
"""Task-specific prompts [P]; their form is ours [I]: a shared block, one of the task, both frozen when it is finished, and
a residual per class that goes on giving way to later classes."""


class DmcOtConfig(GaussianSettings):
    """The settings of DMC-OT: DMC's, the drift estimator and the separability of class texts."""

    stage1: VisionStage = Field(default=VisionStage())
    drift: AnyDrift = Field(
        default=LocalPairedMap(),
        description="how old Gaussians follow the encoder: none, mean, sdc, bures [P, as read], sinkhorn, paired or local",
    )
    probes: int = Field(
        default=0,
        ge=0,
        description="altered copies of the task's images that pass both encoders too, to see the motion elsewhere [I]",
    )
    condition_limit: float = Field(
        default=1e4,
        gt=1,
        description="largest condition number of a map; beyond it the mean shift is used, with a warning [I]",
    )
    stage2: TextStage = Field(default=TextStage(text=PROMPTS))
    separability: float = Field(
        default=0.0,
        ge=0,
        description="weight of the mean squared cosine between new and old class texts [K: STAR-Prompt, 0..30]",
    )
    prior: float | None = Field(
        default=None,
        ge=0,
        description="weight of the squared distance of texts and embeddings from those of the towers as they came [K: KgCoOp, 8, "
        "on texts]; null: where classes have fewer than 8 images, chosen by images left out, else 0 [I]",
    )
    template_weight: float = Field(
        default=0.0, ge=0, le=1, description="share of the template text in the class text at inference [K]"
    )

    _drift_kind = field_validator("drift", mode="before")(kind_by_name)

    @property
    def alters_images(self) -> bool:
        """Whether other images than the given ones pass the tower."""
        return self.probes > 0 and self.stage1.tuning.kind != "none"

    @classmethod
    def embedding(cls) -> DmcOtConfig:
        """The form for precomputed embeddings: a linear adapter in stage 1, residual class texts in stage 2."""
        return cls(stage1=VisionStage.embedding(), stage2=TextStage())


class Motion(NamedTuple):
    """What stage 1 did to images: the same ones in the same order under both encoders, and their labels.

    The task's own come first; behind them stand the probes, if any.
    """

    Z0: Features
    Z1: Features
    y: Labels


class DMCOT(TwoStageState):
    """argmax over the classes seen of s cos(f(x), t_c)."""

    card = Card(
        title="DMC-OT: DMC, Gaussians calibrated, prompts per task",
        source="arXiv 2511.10974",
        citation="Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning. arXiv 2511.10974.",
        config=DmcOtConfig,
        stages=(
            "stage 1: vision moves, class texts are the frozen anchor",
            "calibration: every old Gaussian follows the encoder by an affine map",
            "statistics: a Gaussian per new class from one pass of the new encoder",
            "stage 2: text moves (a shared and a task's prompt block), vision is frozen; old classes are drawn",
        ),
        trains="vision, then text",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: kept_bytes(k, d),
        needs="images; texts help",
        passes="one per image and epoch, with gradients, one before and one after",
        text=True,
        moves=True,
        older={"prior": 0.0},
        former={"stage1": {"margin": 0.0}},
        quick={
            "stage1.schedule.epochs": 1,
            "stage1.schedule.batch": 8,
            "stage1.schedule.lr": 1e-3,
            "stage2.schedule.epochs": 2,
            "stage2.schedule.batch": 8,
            "stage2.text.shared": 4,
        },
    )

    def __init__(self, towers: Towers, config: DmcOtConfig, *, seed: int):
        if config.probes and not towers.has_images:
            raise ConfigError("probes: a features file has no images to alter; set probes=0")
        super().__init__(towers, config, seed=seed)

    def learn(self, task: Task, ctx: Context) -> None:
        ctx, config, s = ctx.at(task=task.index), self.config, self.towers.logit_scale
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.stage1.schedule.batch)
        self.add_texts(task, loader, ctx)

        # Z0 describes what the old Gaussians describe. Taken before f_old is gone, it needs no second encoder.
        moves = self.memory.classes > 0 and config.stage1.tuning.kind != "none"
        copies = config.probes if moves else 0
        probes = Probes(loader, copies, lambda copy: ctx.seeds.at(copy=copy).generator("probes"))
        loader = behind_trunk(loader, self.image, ctx)
        Z0 = self._encoded(loader, probes, ctx, "Z0")[0] if moves else None

        # Stage 1: vision moves, the class texts are its anchor [P].
        prior = self.vision_prior(loader.labels)
        align_vision(config.stage1, self.image, self.anchors, loader, s, class_cross_entropy, ctx.at(stage=1), prior)
        Z1, y = self._encoded(loader, probes, ctx, "Z1")

        # Calibration: every old Gaussian follows the encoder, before the new ones are added [P].
        old = self.memory if Z0 is None else self.calibrated(Motion(Z0, Z1, y), ctx.log)
        z, y = Z1[: len(task.train)], y[: len(task.train)]
        self.memory = old.add(z, y)

        # Stage 2: text moves, vision is frozen; old classes are drawn from their calibrated Gaussians [P].
        def text_loss(z: Features, T: Float[Tensor, "k d"], y: Labels, s: float) -> Tensor:
            """CE(s z T^T, y) + separability mean (t_new . t_old)^2; the second term is STAR-Prompt's [K]."""
            value = class_cross_entropy(z, T, y, s)
            if config.separability and 0 < old.classes < len(T):
                value = value + config.separability * mean_squared_cosine(T[old.classes :], T[: old.classes])
            return value

        align_text(config.stage2, self.texts, z, y, old, s, text_loss, ctx.at(stage=2), self.text_prior())
        self.cache_texts()

    def _encoded(self, loader: Loader, probes: Probes, ctx: Context, name: str) -> tuple[Features, Labels]:
        """Unit features and labels of the task's images, and behind them of the probes, under the encoder as it stands."""
        passes = [self.features(loader, ctx, name)]
        if probes.copies:
            passes.append(self.features(probes, ctx, f"{name}-probes"))
        z, y = zip(*passes, strict=True)
        return torch.cat(z), torch.cat(y)

    def calibrated(self, motion: Motion, log: Log) -> GaussianMemory:
        """mu' = A mu + b, S' = A S A^T for every old class; an unusable map is replaced by the mean shift, and said."""
        kind = self.config.drift.kind
        if kind == "none":
            return self.memory
        shift = next(MeanShift().maps(*motion, self.memory))
        maps = Guarded(self.config.drift.maps(*motion, self.memory), shift, self.config.condition_limit)
        memory = self.memory.moved(maps)
        if maps.reason:
            log("warning", text=f"drift '{kind}': {maps.reason}; the mean shift is used instead")
        log("drift", kind=kind, fallback=maps.reason, **maps.health._asdict())
        return memory

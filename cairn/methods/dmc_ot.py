"""DMC-OT: DMC's two stages, with the old Gaussians moved after the vision encoder, and prompts that know their task.

Source: "Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning" (arXiv 2511.10974). The abstract
states optimal-transport guided calibration of the class statistics and task-specific prompts [P]; the formula of the
calibration and the form of the prompts are not public and are ours [I] or from nearest practice [K]. `drift=bures` is the
Gaussian optimal transport map, the nearest reading of the abstract; docs/drift.md says why the default is another one.

Letters: f_old, f_new the encoder before and after stage 1; Z0, Z1 unit features of the same images under each; N(mu_c,
S_c) the Gaussian of class c; x -> A_c x + b_c the map that moves it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, field_validator

from cairn.config import kind_by_name
from cairn.data.loading import Loader
from cairn.data.probes import Probes
from cairn.data.stream import Task
from cairn.errors import ConfigError
from cairn.maths.drift import AnyDrift, Guarded, LocalPairedMap, MeanShift
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, full_bytes
from cairn.methods.protocol import Card
from cairn.methods.stages import TextStage, VisionStage, align_text, align_vision, class_anchors
from cairn.methods.two_stage import TwoStageState
from cairn.towers.prompts import Prompts
from cairn.towers.protocol import Towers
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
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
        bytes=lambda k, d, n, i, w: k * full_bytes(d),
        needs="images; texts help",
        passes="one per image and epoch, with gradients, one before and one after",
        text=True,
        moves=True,
        quick={
            "stage1.schedule.epochs": 1,
            "stage1.schedule.batch": 8,
            "stage1.schedule.lr": 1e-3,
            "stage2.schedule.epochs": 2,
            "stage2.schedule.batch": 8,
            "stage2.text.shared": 4,
        },
    )

    def __init__(self, towers: Towers, config: DmcOtConfig, *, seed: int, log: Log):
        if config.probes and not towers.has_images:
            raise ConfigError("probes: a features file has no images to alter; set probes=0")
        super().__init__(towers, config, seed=seed, log=log)

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        self.settle(task, *self.move(task, checkpoint), checkpoint)

    def move(self, task: Task, checkpoint: Checkpoint | None = None) -> tuple[Motion | None, Features, Labels]:
        """Stage 1: vision moves, the template texts are its anchor [P]. The motion seen (None if nothing of old classes
        depends on it), and the features after and the labels of the task's images."""
        stage, seeds, log = self.config.stage1, self.seeds.at(task=task.index), self.log.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=stage.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, log).cpu()])

        # Z0 describes what the old Gaussians describe. Taken before f_old is gone, it needs no second encoder.
        moves = self.memory.classes > 0 and stage.tuning.kind != "none"
        probes = Probes(loader, self.config.probes, lambda copy: seeds.at(copy=copy).generator("probes"))
        Z0 = self._seen(loader, probes, checkpoint, "Z0")[0] if moves else None

        s = self.towers.logit_scale
        align_vision(stage, self.image, self.anchors, loader, s, seeds.at(stage=1), log.at(stage=1), checkpoint)
        if Z0 is None:
            return None, *self.features(loader, checkpoint, "Z1")
        Z1, y = self._seen(loader, probes, checkpoint, "Z1")
        own = len(task.train)
        return Motion(Z0, Z1, y), Z1[:own], y[:own]

    def _seen(
        self, loader: Loader, probes: Probes, checkpoint: Checkpoint | None, name: str
    ) -> tuple[Features, Labels]:
        """Unit features and labels of the task's images, and behind them of the probes, under the encoder as it stands."""
        z, y = self.features(loader, checkpoint, name)
        if not probes.copies:
            return z, y
        more, labels = self.features(probes, checkpoint, f"{name}-probes")
        return torch.cat([z, more]), torch.cat([y, labels])

    def settle(
        self, task: Task, motion: Motion | None, Z1: Features, y: Labels, checkpoint: Checkpoint | None = None
    ) -> None:
        """What follows stage 1: calibration, statistics, stage 2."""
        seeds, log = self.seeds.at(task=task.index), self.log.at(task=task.index)

        # Calibration: every old Gaussian follows the encoder, before the new ones are added [P].
        old = self.memory if motion is None else self.calibrated(motion, log)

        # Statistics of the new classes under the new encoder.
        self.memory = old.add(Z1, y)

        # Stage 2: text moves, vision is frozen; old classes are drawn from their calibrated Gaussians [P].
        if task.names:
            new = self.anchors[task.classes.start :].to(self.towers.device)
            self.texts.grow(task.names, new, seeds.generator("texts"))
        align_text(
            self.config.stage2, self.texts, Z1, y, old, self.towers.logit_scale, seeds.at(stage=2), log.at(stage=2),
            checkpoint, separability=self.config.separability,
        )  # fmt: skip
        self.cache_texts()

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

"""DMC: each modality is trained while the other stands frozen as its anchor; class Gaussians stand in for old images.

Source: "Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning" (arXiv 2511.10974). Only the
abstract is public. [P] marks what it says: two decoupled stages per task, vision then text, with pseudo-features of old
classes in the second. What is marked [K] (nearest published practice) or [I] (ours) is a setting with a documented
default; docs/methods.md lists them all.

Letters: f(x) image embedding, z = f(x)/|f(x)|; t_c unit text of class c; s scale; N(mu_c, S_c) Gaussian of class c.
"""

from __future__ import annotations

from pydantic import Field

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.losses import class_cross_entropy
from cairn.memory.gaussians import GaussianSettings, kept_bytes
from cairn.methods.parts.stages import TextStage, VisionStage, align_text, align_vision, behind_trunk
from cairn.methods.parts.two_stage import TwoStageState
from cairn.methods.protocol import Card
from cairn.training.context import Context


class DmcConfig(GaussianSettings):
    """The settings of DMC."""

    stage1: VisionStage = Field(default=VisionStage())
    stage2: TextStage = Field(default=TextStage())
    prior: float | None = Field(
        default=None,
        ge=0,
        description="weight of the squared distance of texts and embeddings from those of the towers as they came [K: KgCoOp, 8, "
        "on texts]; null: where classes have fewer than 8 images, chosen by images left out, else 0 [I]",
    )
    template_weight: float = Field(
        default=0.0, ge=0, le=1, description="share of the template text in the class text at inference [K]"
    )

    @classmethod
    def embedding(cls) -> DmcConfig:
        """The form for precomputed embeddings: a linear adapter in stage 1, residual class texts in stage 2."""
        return cls(stage1=VisionStage.embedding(), stage2=TextStage())


class DMC(TwoStageState):
    """argmax over the classes seen of s cos(f(x), t_c)."""

    card = Card(
        title="DMC: decoupled stages, Gaussian replay",
        source="arXiv 2511.10974",
        citation="Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning. arXiv 2511.10974.",
        config=DmcConfig,
        stages=(
            "stage 1: vision moves, class texts are the frozen anchor",
            "statistics: a Gaussian per class from one pass of the new encoder",
            "stage 2: text moves, vision is frozen; old classes are drawn from their Gaussians",
        ),
        trains="vision, then text",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: kept_bytes(k, d),
        needs="images; texts help",
        passes="one per image and epoch, with gradients, and one more",
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
        },
    )

    def learn(self, task: Task, ctx: Context) -> None:
        ctx, config, s = ctx.at(task=task.index), self.config, self.towers.logit_scale
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.stage1.schedule.batch)
        self.add_texts(task, loader, ctx)

        # Stage 1: vision moves, the template texts are its anchor [P]. L = CE(s z T^T, y), in both stages; with few images
        # plus a prior [K], w mean_i |z_i - z0_i|^2 here and w mean_c |t_c - a_c|^2 in stage 2.
        loader, prior = behind_trunk(loader, self.image, ctx), self.vision_prior(loader.labels)
        align_vision(config.stage1, self.image, self.anchors, loader, s, class_cross_entropy, ctx.at(stage=1), prior)

        # Statistics: one pass with the new encoder; mu_c, S_c on the unit sphere.
        z, y = self.features(loader, ctx, "Z")
        old, self.memory = self.memory, self.memory.add(z, y)

        # Stage 2: text moves, vision is frozen; old classes are drawn from N(mu_c, S_c) [P].
        align_text(config.stage2, self.texts, z, y, old, s, class_cross_entropy, ctx.at(stage=2), self.text_prior())
        self.cache_texts()

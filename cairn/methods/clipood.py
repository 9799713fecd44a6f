"""CLIPood: the whole vision tower is tuned against fixed class texts, with margins between them, and its weights are averaged.

Source: Shu et al., CLIPood: Generalizing CLIP to Out-of-Distributions (ICML 2023, arXiv 2302.00864), the parts on margin
metric softmax and on Beta moving average [P]. The paper tunes once, on one set of classes. Task after task it is ours [I]:
every task starts from the average that the one before ended with, which counts as its pretrained model. Ours too are which
classes stand in the softmax, epochs in place of a number of iterations, and the form on precomputed embeddings.

Letters: z = f(x)/|f(x)| unit image; t_c unit text of class c; s scale; lambda margin; theta_t weights after step t of T.

    loss    -log softmax_c(s (z . t_c + lambda (1 - t_y . t_c)))_y
    weights sum_t a_t theta_t / sum_t a_t, a_t the density of Beta(beta, beta) at (t + .5) / (T + 1)
"""

from __future__ import annotations

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cairn.maths.losses import class_cross_entropy
from cairn.methods.parts.fixed_text_head import FixedTextHead
from cairn.methods.parts.stages import VisionStage
from cairn.methods.protocol import Card
from cairn.settings import Settings
from cairn.towers.tuning import Full
from cairn.training.fit import Schedule
from cairn.types import Features, Labels


class MarginStage(VisionStage):
    """Stage 1 with a margin between the class texts."""

    margin: float = Field(
        default=0.3, ge=0, description="lambda of the margin that grows with the distance of the class texts [P: .3]"
    )


class ClipoodConfig(Settings):
    """lambda = .3, beta = .5, AdamW at 5e-6 and batches of 36 as the paper has them."""

    stage1: MarginStage = Field(default=MarginStage(tuning=Full(), schedule=Schedule(epochs=2, batch=36, lr=Full().lr)))

    @classmethod
    def embedding(cls) -> ClipoodConfig:
        """The form for precomputed embeddings: a linear adapter, under the same loss and average."""
        return cls(stage1=MarginStage.model_validate(dict(VisionStage.embedding()) | {"average": 0.5}))


class CLIPood(FixedTextHead):
    """argmax_c s cos(f_b(x), t_c), f_b the average over its tuning on task b."""

    card = Card(
        title="CLIPood: margins between class texts, averaged weights",
        source="Shu et al. 2023",
        citation="Shu et al. CLIPood: Generalizing CLIP to Out-of-Distributions. ICML 2023. arXiv 2302.00864.",
        config=ClipoodConfig,
        stages=("stage 1: vision against class texts, with margins; the weights end as their Beta average",),
        trains="vision",
        keeps="nothing",
        needs="images; texts help",
        passes="one per image and epoch, with gradients",
        text=True,
        moves=True,
        quick={"stage1.schedule.epochs": 1, "stage1.schedule.batch": 8, "stage1.schedule.lr": 1e-3},
    )

    def loss(self, z: Features, T: Float[Tensor, "k d"], y: Labels, s: float) -> Tensor:
        return margin_metric_softmax(z, T, y, s, self.config.stage1.margin)


def margin_metric_softmax(z: Features, T: Float[Tensor, "k d"], y: Labels, s: float, margin: float) -> Tensor:
    """Cross entropy in which a wrong class must be further behind, the less its text is like the right one.

    Mean over rows i of -log softmax_c(s (z_i . t_c + margin (1 - t_{y_i} . t_c)))_{y_i}. What is the same for all classes
    cancels, so the images are moved instead, to z_i - margin t_{y_i}; a margin of 0 leaves `class_cross_entropy`.
    Source: the margin metric softmax of CLIPood (Shu et al. 2023).
    """
    return class_cross_entropy(z - margin * T[y], T, y, s)

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

from pydantic import Field

from cairn.config import Settings
from cairn.methods.parts.fixed_text_head import FixedTextHead
from cairn.methods.parts.stages import VisionStage
from cairn.methods.protocol import Card
from cairn.towers.tuning import Full
from cairn.training.schedule import Schedule


class ClipoodConfig(Settings):
    """lambda = .3, beta = .5, AdamW at 5e-6 and batches of 36 as the paper has them."""

    stage1: VisionStage = Field(
        default=VisionStage(tuning=Full(), margin=0.3, schedule=Schedule(epochs=2, batch=36, lr=Full().lr))
    )

    @classmethod
    def embedding(cls) -> ClipoodConfig:
        """The form for precomputed embeddings: a linear adapter, under the same loss and average."""
        return cls(stage1=VisionStage.embedding().model_copy(update={"margin": 0.3, "average": 0.5}))


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

"""Fine-tuning without memory: stage 1 alone, task after task. What comes of keeping nothing.

Source: the field's `finetune` baseline, in the form of DMC's stage 1.
"""

from __future__ import annotations

from pydantic import Field

from cairn.methods.parts.fixed_text_head import FixedTextHead
from cairn.methods.parts.stages import BOUND, VisionStage
from cairn.methods.protocol import Card
from cairn.settings import Settings


class FinetuneConfig(Settings):
    """As joint training has it, with every class seen in the softmax: the plain thing to do."""

    stage1: VisionStage = Field(default=BOUND)

    @classmethod
    def embedding(cls) -> FinetuneConfig:
        return cls(stage1=VisionStage.embedding().model_copy(update={"classes": "seen"}))


class FineTune(FixedTextHead):
    """argmax_c s cos(f_b(x), t_c), f_b trained on one task after the other."""

    card = Card(
        title="Fine-tuning without memory",
        source="the field's baseline",
        citation="The plain sequential fine-tuning baseline of the class-incremental literature.",
        config=FinetuneConfig,
        stages=("stage 1: vision against class texts",),
        trains="vision",
        keeps="nothing",
        needs="images; texts help",
        passes="one per image and epoch, with gradients",
        text=True,
        moves=True,
        former={"stage1": {"margin": 0.0}},
        quick={"stage1.schedule.epochs": 1, "stage1.schedule.batch": 8, "stage1.schedule.lr": 1e-3},
    )

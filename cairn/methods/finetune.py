"""Fine-tuning without memory: stage 1 alone, task after task. What comes of keeping nothing.

Source: the field's `finetune` baseline, in the form of DMC's stage 1.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from cairn.methods.fixed_text_head import FixedTextHead
from cairn.methods.stages import BOUND, VisionStage


class Config(BaseModel):
    """As joint training has it, with every class seen in the softmax: the plain thing to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage1: VisionStage = Field(BOUND)

    @classmethod
    def embedding(cls) -> Config:
        return cls(stage1=VisionStage.embedding().model_copy(update={"classes": "seen"}))


class FineTune(FixedTextHead):
    """argmax_c s cos(f_b(x), t_c), f_b trained on one task after the other."""

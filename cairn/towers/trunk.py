"""The trunk of an image tower: its parts below the first one that is trained. What they make of an image is the same after every
task, so that it can be computed once, and a pass go on from there.

Parts are numbered from below: 0 the patches with their norm, 1..L the blocks, L + 1 the norm behind them, L + 2 the projection.
With y_p = part_p(y_{p-1}) and parts 0..t-1 standing still, the pass from y_{t-1} does the very operations of the whole pass behind
part t - 1: on a batch of the same images it gives the same, to the bit.

Source: ours; exact because nothing above a part reaches back into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

LEAST = 2
"""Parts from which on a trunk is worth keeping: the patches alone are hardly any work."""


def frozen_parts(vision_model: CLIPVisionModel, projection: nn.Module) -> int:
    """How many parts stand below the first one that has something to train."""
    found = 0
    for part in _parts(vision_model, projection):
        if any(p.requires_grad for module in part for p in module.parameters()):
            break
        found += 1
    return found


def passed(
    vision_model: CLIPVisionModel, projection: nn.Module, x: Tensor, first: int = 0, end: int | None = None
) -> Tensor:
    """What parts `first` to `end` - 1 (all that follow if None) make of x: pixels where `first` is 0, else what the part before
    it made."""
    last = len(vision_model.encoder.layers)
    for number, part in enumerate(_parts(vision_model, projection)[first:end], start=first):
        for module in part:
            x = module(x, None) if 1 <= number <= last else module(x)
        if number == last:
            x = x[:, 0, :]
    return x


def _parts(vision_model: CLIPVisionModel, projection: nn.Module) -> list[tuple[nn.Module, ...]]:
    blocks = cast("list[nn.Module]", list(vision_model.encoder.layers))
    return [
        (vision_model.embeddings, vision_model.pre_layrnorm),
        *((block,) for block in blocks),
        (vision_model.post_layernorm,),
        (projection,),
    ]

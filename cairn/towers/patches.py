"""An image's embedding and those of its patches, from one pass of the vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cairn.towers.tokens import first_patch
from cairn.types import Attention, Features, Pixels

if TYPE_CHECKING:
    from transformers import CLIPVisionModel
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer


def embedded_tokens(
    vision_model: CLIPVisionModel, projection: nn.Module, pixels: Pixels, attention: Attention = "native"
) -> tuple[Features, Float[Tensor, "n p d"]]:
    """The image's embedding and every patch token through the final norm and the projection, none normalised.

    native: tokens as the last block leaves them.
    value: the last block is run once more for the patches, with softmax(v v^T / sqrt(w)) v in place of softmax(q k^T /
    sqrt(w)) v, head by head (w the width of a head). The last block's queries and keys serve the class token; by its
    values a patch attends to patches like itself, and its embedding stays local. The image's embedding is the same.

    Source: value-value attention in dense prediction with CLIP (Li et al.
    2023, CLIP Surgery). Ours: residual and MLP of the block are kept.
    """
    first = first_patch(vision_model)
    if attention == "native":
        seen = vision_model(pixel_values=pixels)
        patches = projection(vision_model.post_layernorm(seen.last_hidden_state[:, first:]))
        return projection(seen.pooler_output), patches
    block, entered = cast("CLIPEncoderLayer", vision_model.encoder.layers[-1]), []
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        seen = vision_model(pixel_values=pixels)
    finally:
        hook.remove()
    patches = projection(vision_model.post_layernorm(_by_values(block, entered[0])[:, first:]))
    return projection(seen.pooler_output), patches


def _by_values(block: CLIPEncoderLayer, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
    attention = block.self_attn
    v = attention.v_proj(block.layer_norm1(x)).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    mixed = scaled_dot_product_attention(v, v, v, scale=attention.scale).transpose(1, 2).flatten(2)
    x = x + attention.out_proj(mixed)
    return x + block.mlp(block.layer_norm2(x))

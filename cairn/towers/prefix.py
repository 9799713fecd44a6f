"""One pass of CLIP's text tower over prompts that begin alike: what they share is computed once.

The tower is causal: a token sees what stands before it and nothing after. So prompts are the leaves of a tree of segments,
[start][shared] at the root, [task] below it, [class][name.][end] at the leaves, and each segment is run once. In every
block a segment i, with the segments j and k above it, attends to those in full and to itself causally,

    A_i = softmax(Q_i [K_j; K_k; K_i]^T / sqrt(h)) [V_j; V_k; V_i],    h the width of a head,

and everything else in a block acts token by token. Output and gradient are those of the prompts run one by one.

Tokens run: N = 1 + shared + t task + sum over the k classes of (per_class + name + end), t tasks.

Source: ours; exact because the tower is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer


@dataclass(frozen=True)
class Level:
    """n segments that begin at one position, the longest of `length` tokens.

    `rows` are their tokens among the N of the pass; `slots` tell where in n x length each lies, None: as they come.
    On the m-th level above, segment i continues segment `above[m][i]`; None: there is but one.
    """

    rows: slice
    n: int
    length: int
    slots: Int[Tensor, " r"] | None
    above: tuple[Int[Tensor, " n"] | None, ...]
    visible: Bool[Tensor, "length s"]

    def padded(self, x: Float[Tensor, "N a h"]) -> Float[Tensor, "n a length h"]:
        """This level's segments by head, zero behind the last token: no token looks there."""
        x = x[self.rows]
        if self.slots is not None:
            x = x.new_zeros(self.n * self.length, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (self.n, self.length)).transpose(1, 2)

    def packed(self, x: Float[Tensor, "n a length h"]) -> Float[Tensor, "r w"]:
        """The inverse of `padded`, heads side by side."""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)

    def continued(self, held: Sequence[Float[Tensor, "_ a _ h"]]) -> Float[Tensor, "n a s h"]:
        """What stands above each segment, from the root down, and the segment last."""
        *higher, own = held
        parts = [
            x.expand(self.n, -1, -1, -1) if segment is None else x.index_select(0, segment)
            for x, segment in zip(higher, self.above, strict=True)
        ]
        return torch.cat([*parts, own], dim=2)


@dataclass(frozen=True)
class PromptTree:
    """How N tokens make k prompts: start, shared block, task blocks, class blocks, then every name with its end."""

    levels: tuple[Level, ...]
    positions: Int[Tensor, " N"]
    ends: Int[Tensor, " k"]


def prompt_tree(
    shared: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int], device: torch.device
) -> PromptTree:
    """The tree of sum(sizes) prompts, from the lengths of the blocks, the classes per task and the tokens per name.

    A name's tokens include its end. An empty task level is left out; the block of an only task belongs to the root.
    """
    if len(sizes) == 1:
        shared, task = shared + task, 0
    t, k, root, longest = len(sizes), len(names), 1 + shared, per_class + max(names)
    with device:
        lengths = torch.tensor(names)
        named = torch.arange(longest - per_class).expand(k, -1)
        slots = torch.arange(k * longest).view(k, longest)
        slots = torch.cat([slots[:, :per_class].flatten(), slots[:, per_class:][named < lengths[:, None]]])
        levels = [_level(0, 0, 1, root, torch.arange(root), ())]
        if task:
            levels.append(_level(root, root, t, task, torch.arange(t * task), (None,)))
        above = (None, torch.arange(t).repeat_interleave(torch.tensor(sizes)))[: len(levels)]
        levels.append(_level(root + t * task, root + task, k, longest, slots, above))
        positions = [torch.arange(root), root + torch.arange(task).repeat(t), root + task + slots % longest]
        ends = root + t * task + k * per_class + lengths.cumsum(0) - 1
        return PromptTree(tuple(levels), torch.cat(positions), ends)


def _level(row: int, begin: int, n: int, length: int, slots: Int[Tensor, " r"], above: tuple) -> Level:
    in_order = torch.equal(slots, torch.arange(n * length, device=slots.device))
    visible = torch.ones(length, begin + length, dtype=torch.bool).tril(begin)
    return Level(slice(row, row + len(slots)), n, length, None if in_order else slots, above, visible)


def last_hidden(tower: CLIPTextModel, tokens: Float[Tensor, "N w"], tree: PromptTree) -> Float[Tensor, "k w"]:
    """The last block's output at the prompts' ends, from token embeddings without positions, in the tree's order."""
    hidden = tokens + tower.embeddings.position_embedding.weight[tree.positions]
    *blocks, last = cast(list[CLIPEncoderLayer], list(tower.encoder.layers))
    for block in blocks:
        mixed = _attended(block.self_attn, block.layer_norm1(hidden), tree.levels)
        hidden = _passed_on(block, hidden, mixed)
    mixed = _attended(last.self_attn, last.layer_norm1(hidden), tree.levels)
    return _passed_on(last, hidden[tree.ends], mixed[tree.ends])  # nothing reads the other tokens any more


def _attended(attention: CLIPAttention, x: Float[Tensor, "N w"], levels: Sequence[Level]) -> Float[Tensor, "N w"]:
    q, k, v = (
        projection(x).unflatten(-1, (attention.num_heads, -1))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys, values, rows = [], [], []
    for level in levels:
        keys.append(level.padded(k))
        values.append(level.padded(v))
        mixed = scaled_dot_product_attention(
            level.padded(q),
            level.continued(keys),
            level.continued(values),
            attn_mask=level.visible,
            scale=attention.scale,
        )
        rows.append(level.packed(mixed))
    return torch.cat(rows)


def _passed_on(block: CLIPEncoderLayer, x: Float[Tensor, "m w"], mixed: Float[Tensor, "m w"]) -> Float[Tensor, "m w"]:
    x = x + block.self_attn.out_proj(mixed)
    return x + block.mlp(block.layer_norm2(x))

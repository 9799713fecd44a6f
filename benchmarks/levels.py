"""The pass over prompts that begin alike as it was before it became one attention per block: the plain form of `prompts.py`.

Segments attend level by level, padded and gathered, through the layers of transformers (commit 4a867b7 replaced it). Values and
gradients are those of `cairn.towers.prefix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from cairn.towers.clip import ClipTowers


class LevelTowers(ClipTowers):
    """The same towers with that pass."""

    def __init__(self, towers: ClipTowers):
        vars(self).update(vars(towers))

    def prompt_tree(self, shared: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int]) -> Any:
        return level_tree(shared, task, per_class, sizes, names)

    def encoded_tree(self, tokens: Tensor, tree: Any) -> Tensor:
        tower = self._model.text_model
        return self._model.text_projection(tower.final_layer_norm(last_hidden(tower, tokens, tree)))


@dataclass(frozen=True)
class Level:
    """n segments that begin at one position, the longest of `length` tokens.

    `rows` are their tokens among the N of the pass; `slots` tell where in n x length each lies, None: as they come.
    On the m-th level above, segment i continues segment `above[m][i]`; None: there is but one.
    """

    rows: slice
    n: int
    length: int
    slots: Tensor | None
    above: tuple[Tensor | None, ...]
    visible: Tensor

    def padded(self, x: Tensor) -> Tensor:
        """This level's segments by head, zero behind the last token: no token looks there."""
        x = x[self.rows]
        if self.slots is not None:
            x = x.new_zeros(self.n * self.length, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (self.n, self.length)).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """The inverse of `padded`, heads side by side."""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)

    def continued(self, held: Sequence[Tensor]) -> Tensor:
        """What stands above each segment, from the root down, and the segment last."""
        *higher, own = held
        parts = [
            x.expand(self.n, -1, -1, -1) if segment is None else x.index_select(0, segment)
            for x, segment in zip(higher, self.above, strict=True)
        ]
        return torch.cat([*parts, own], dim=2)


@dataclass(frozen=True)
class LevelTree:
    """How N tokens make k prompts: start, shared block, task blocks, class blocks, then every name with its end."""

    levels: tuple[Level, ...]
    positions: Tensor
    ends: Tensor


def level_tree(shared: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int]) -> LevelTree:
    """As `cairn.towers.prefix.prompt_tree`."""
    if len(sizes) == 1:
        shared, task = shared + task, 0
    t, k, root, longest = len(sizes), len(names), 1 + shared, per_class + max(names)
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
    return LevelTree(tuple(levels), torch.cat(positions), ends)


def _level(row: int, begin: int, n: int, length: int, slots: Tensor, above: tuple[Tensor | None, ...]) -> Level:
    in_order = torch.equal(slots, torch.arange(n * length))
    visible = torch.ones(length, begin + length, dtype=torch.bool).tril(begin)
    return Level(slice(row, row + len(slots)), n, length, None if in_order else slots, above, visible)


def last_hidden(tower: CLIPTextModel, tokens: Tensor, tree: LevelTree) -> Tensor:
    """The last block's output at the prompts' ends, from token embeddings without positions, in the tree's order."""
    hidden = tokens + tower.embeddings.position_embedding.weight[tree.positions]
    *blocks, last = cast(list[CLIPEncoderLayer], list(tower.encoder.layers))
    for block in blocks:
        mixed = _attended(block.self_attn, block.layer_norm1(hidden), tree.levels)
        hidden = _passed_on(block, hidden, mixed)
    mixed = _attended(last.self_attn, last.layer_norm1(hidden), tree.levels)
    return _passed_on(last, hidden[tree.ends], mixed[tree.ends])  # nothing reads the other tokens any more


def _attended(attention: CLIPAttention, x: Tensor, levels: Sequence[Level]) -> Tensor:
    q, k, v = (
        projection(x).unflatten(-1, (attention.num_heads, -1))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys, values, rows = [], [], []
    for level in levels:
        keys.append(level.padded(k))
        values.append(level.padded(v))
        own, others = level.continued(keys), level.continued(values)
        scale = attention.scale
        mixed = scaled_dot_product_attention(level.padded(q), own, others, attn_mask=level.visible, scale=scale)
        rows.append(level.packed(mixed))
    return torch.cat(rows)


def _passed_on(block: CLIPEncoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + block.self_attn.out_proj(mixed)
    return x + block.mlp(block.layer_norm2(x))

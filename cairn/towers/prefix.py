"""One pass of CLIP's text tower over prompts that begin alike: what they share is computed once.

The tower is causal: a token sees what stands before it and nothing after. So prompts are the leaves of a tree of segments,
[start][shared] at the root, [task] below it, [class][name.][end] at the leaves, and each segment is run once. In every
block a segment i, with the segments j and k above it, attends to those in full and to itself causally,

    A_i = softmax(Q_i [K_j; K_k; K_i]^T / sqrt(h)) [V_j; V_k; V_i],    h the width of a head,

and everything else in a block acts token by token. Output and gradient are those of the prompts run one by one.

Tokens run: N = 1 + shared + t task + sum over the k classes of (per_class + name + end), t tasks.

The weights stand still, so that a step is bound by the number of its operations where products are fast. All segments attend
in one operation: each is cut into pieces as long as the longest leaf, and every piece looks at the root, a task's block and
itself, of which a mask leaves what is above it. Queries, keys and values are one product; quick GELU, x sigmoid(c x), is
silu(c x) / c, with both c in the weights around it. On a processor, where products are nearly all of the time, large weights
are kept in the order in which the product reads them.

Source: ours; exact because the tower is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import CLIPTextModel
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

SLOPE = 1.702
"""c of quick GELU."""

LARGE = 2**18
"""Numbers from which on a weight is worth an order of its own: a product of fewer costs less than the call."""

ROWS = 64
"""For which a weight is put in order; the product of 20 rows or of many is as fast."""


@dataclass(frozen=True)
class PromptTree:
    """How N tokens make k prompts: start, shared block, task blocks, class blocks, then every name with its end.

    n pieces of L places, the last k of them the leaves, attend to s = root + task + L places each: those of the root, of a
    task's block, and their own. Behind the last token of a piece stands any other, at which nothing looks.
    """

    positions: Int[Tensor, " N"]
    ends: Int[Tensor, " k"]
    root: int
    task: int
    pieces: Int[Tensor, "n L"]
    """The token at each place."""
    places: Int[Tensor, " N"]
    """The inverse: where among n L each token stands."""
    leaf_places: Int[Tensor, " l"]
    """The same of the leaves' tokens, among the k L of theirs."""
    seen: Int[Tensor, "n s"]
    """The tokens that each piece attends to."""
    mask: Float[Tensor, "n 1 L s"]
    """0 where a place is seen, -inf elsewhere."""
    last: Float[Tensor, "k 1 1 s"]
    """The mask's rows for the ends of prompts."""
    members: Float[Tensor, "t n"]
    """1 where a piece attends to that task's block."""


def prompt_tree(
    shared: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int], device: torch.device
) -> PromptTree:
    """The tree of sum(sizes) prompts, from the lengths of the blocks, the classes per task and the tokens per name.

    A name's tokens include its end. An empty task level is left out; the block of an only task belongs to the root.
    """
    if len(sizes) == 1:
        shared, task = shared + task, 0
    t, k, root, L = len(sizes) if task else 0, len(names), 1 + shared, per_class + max(names)
    above = root + t * task
    parts = _pieces(root, task, per_class, sizes if task else [k], names, L)
    lengths, owner, level = (torch.tensor(column) for column in zip(*((len(p[0]), *p[1:]) for p in parts), strict=True))
    pieces = torch.tensor([[*tokens, *[0] * (L - len(tokens))] for tokens, _, _ in parts])
    real = torch.arange(L) < lengths[:, None]
    places = torch.empty(above + k * per_class + sum(names), dtype=torch.int64)
    places[pieces[real]] = real.flatten().nonzero()[:, 0]
    behind = [torch.arange(per_class).repeat(k), *(per_class + torch.arange(length) for length in names)]
    positions = torch.cat(
        [torch.arange(root), root + torch.arange(task).repeat(t), *(root + task + own for own in behind)]
    )
    at, deep = torch.where(real, positions[pieces], len(places))[:, :, None], level[:, None, None]
    block = root + torch.arange(task)
    causal = torch.ones(L, L, dtype=torch.bool).tril() & real[:, None, :]
    visible = torch.cat([torch.arange(root) <= at, (deep > 0) & (block <= at), (deep == 2) & causal], 2)
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None]
    tensors = {
        "positions": positions,
        "ends": above + k * per_class + torch.tensor(names).cumsum(0) - 1,
        "pieces": pieces,
        "places": places,
        "leaf_places": places[above:] - (len(parts) - k) * L,
        "seen": torch.cat([torch.arange(root).expand(len(parts), -1), block + owner[:, None] * task, pieces], 1),
        "mask": mask,
        "last": mask[torch.arange(len(parts) - k, len(parts)), :, lengths[-k:] - 1][:, :, None],
        "members": ((torch.arange(t)[:, None] == owner) & (level > 0)).float(),
    }
    return PromptTree(root=root, task=task, **{name: tensor.to(device) for name, tensor in tensors.items()})


def _pieces(
    root: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int], longest: int
) -> list[tuple[Sequence[int], int, int]]:
    """The tokens of each piece, the task whose block stands above or in it, and its level: 0 root, 1 task, 2 leaf."""
    tasks = len(sizes) if task else 0
    above = root + tasks * task
    parts: list[tuple[Sequence[int], int, int]] = [
        (range(i, min(i + longest, root)), 0, 0) for i in range(0, root, longest)
    ]
    for j in range(tasks):
        begin, end = root + j * task, root + (j + 1) * task
        parts += [(range(i, min(i + longest, end)), j, 1) for i in range(begin, end, longest)]
    whose = [j for j, size in enumerate(sizes) for _ in range(size)]
    name = above + len(names) * per_class
    for c, (j, length) in enumerate(zip(whose, names, strict=True)):
        own = range(above + c * per_class, above + (c + 1) * per_class)
        parts.append(([*own, *range(name, name := name + length)], j, 2))
    return parts


class FrozenLinear:
    """x W^T + b, W and b standing still: neither has a gradient.

    On a processor oneDNN keeps W, and W^T for the gradient, in the order in which its product reads them. A product of
    other libraries copies them into such an order in every call.
    """

    def __init__(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"], dtype: torch.dtype):
        weight, self.bias = weight.detach().to(dtype), bias.detach().to(dtype)
        on_processor = dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.ordered = on_processor and weight.numel() >= LARGE
        self.weights = tuple(map(_ordered, (weight, weight.T.contiguous()))) if self.ordered else (weight,)

    @property
    def dtype(self) -> torch.dtype:
        return self.bias.dtype

    def __call__(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return cast(Tensor, _Ordered.apply(x, self)) if self.ordered else linear(x, self.weights[0], self.bias)


class FrozenBlock(NamedTuple):
    """A block whose weights stand still, in the precision it computes in."""

    block: CLIPEncoderLayer
    inputs: tuple[FrozenLinear, ...]
    """Queries, keys and values in one product; in two where only some tokens have queries."""
    out: FrozenLinear
    up: FrozenLinear
    down: FrozenLinear

    @classmethod
    def of(cls, block: CLIPEncoderLayer, dtype: torch.dtype, *, last: bool = False) -> FrozenBlock:
        attention, mlp = block.self_attn, block.mlp
        three = attention.q_proj, attention.k_proj, attention.v_proj
        qkv = torch.cat([part.weight for part in three]), torch.cat([part.bias for part in three])
        sizes = [len(attention.q_proj.weight), 2 * len(attention.q_proj.weight)] if last else [len(qkv[0])]
        c = SLOPE if isinstance(mlp.activation_fn, QuickGELUActivation) else 1.0
        return cls(
            block,
            tuple(FrozenLinear(w, b, dtype) for w, b in zip(*(whole.split(sizes) for whole in qkv), strict=True)),
            out=FrozenLinear(attention.out_proj.weight, attention.out_proj.bias, dtype),
            up=FrozenLinear(c * mlp.fc1.weight, c * mlp.fc1.bias, dtype),
            down=FrozenLinear(mlp.fc2.weight / c, mlp.fc2.bias, dtype),
        )

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        own = self.block.mlp.activation_fn
        return silu if isinstance(own, QuickGELUActivation) else own

    def normed(self, x: Float[Tensor, "m w"]) -> Float[Tensor, "m w"]:
        return self.block.layer_norm1(x).to(self.out.dtype)

    def attended(
        self, q: Float[Tensor, "n L w"], kv: Float[Tensor, "n s w2"], mask: Float[Tensor, "n 1 L s"]
    ) -> Float[Tensor, "r w"]:
        """softmax(q k^T / sqrt(h) + mask) v for every head, those side by side again, piece after piece."""
        attention = self.block.self_attn
        q = q.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scale)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def passed_on(self, x: Float[Tensor, "m w"], mixed: Float[Tensor, "m w"]) -> Float[Tensor, "m w"]:
        x = x + self.out(mixed)
        normed = self.block.layer_norm2(x).to(self.out.dtype)
        return x + self.down(self.activation(self.up(normed)))


def last_hidden(
    tower: CLIPTextModel, blocks: Sequence[FrozenBlock], tokens: Float[Tensor, "N w"], tree: PromptTree
) -> Float[Tensor, "k w"]:
    """The last block's output at the prompts' ends, from token embeddings without positions, in the tree's order."""
    x = tokens + tower.embeddings.position_embedding.weight[tree.positions]
    *earlier, last = blocks
    w, mask = x.shape[1], tree.mask.to(last.out.dtype)
    for own in earlier:
        (qkv,) = own.inputs
        q, kv = qkv(own.normed(x)).split([w, 2 * w], 1)
        q = cast(Tensor, _Queries.apply(q, tree)).unflatten(0, tree.pieces.shape)
        mixed = own.attended(q, cast(Tensor, _Seen.apply(kv, tree, len(tree.seen))), mask)
        x = own.passed_on(x, cast(Tensor, _Back.apply(mixed, tree)))
    # Of the last block nothing but the ends is read
    (queries, keys_and_values), k, ends = last.inputs, len(tree.ends), x.index_select(0, tree.ends)
    q, kv = queries(last.normed(ends))[:, None], keys_and_values(last.normed(x))
    return last.passed_on(ends, last.attended(q, cast(Tensor, _Seen.apply(kv, tree, k)), tree.last.to(mask)))


class _Queries(Function):
    """Each piece's tokens: x[pieces]. What stands behind a piece's last token has no gradient, as nothing reads its answer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tree: PromptTree) -> Tensor:
        ctx.tree = tree
        return x.index_select(0, tree.pieces.flatten())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.index_select(0, ctx.tree.places), None


class _Back(Function):
    """The tokens' rows among those of all places: x[places]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tree: PromptTree) -> Tensor:
        ctx.tree, ctx.rows = tree, len(x)
        return x.index_select(0, tree.places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = gradient.new_zeros(ctx.rows, gradient.shape[1])
        return whole.index_copy_(0, ctx.tree.places, gradient), None


class _Seen(Function):
    """The tokens that the last n pieces attend to: x[seen]. Gradients of what several see are summed by products, in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tree: PromptTree, n: int) -> Tensor:
        ctx.tree, ctx.n = tree, n
        return x.index_select(0, tree.seen[-n:].flatten()).unflatten(0, (n, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tree, k = ctx.tree, len(ctx.tree.ends)
        root, block, own = gradient.split([tree.root, tree.task, gradient.shape[1] - tree.root - tree.task], 1)
        parts = [root.sum(0)]
        if tree.task:
            shared = tree.members[:, -ctx.n :].to(gradient.dtype) @ block.flatten(1)
            parts.append(shared.view(-1, gradient.shape[2]))
        # The places of leaves are the last ones; tokens above see themselves among those of their level
        leaves = own[-k:].flatten(0, 1)
        parts.append(leaves.index_select(0, tree.leaf_places))
        return torch.cat(parts), None, None


class _Ordered(Function):
    """The product with weights in oneDNN's order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: FrozenLinear) -> Tensor:
        ctx.own = own
        return _product(x, own.weights[0], own.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _product(gradient, ctx.own.weights[1], None), None


def _ordered(weight: Float[Tensor, "o i"]) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def _product(x: Float[Tensor, "... i"], weight: Tensor, bias: Float[Tensor, " o"] | None) -> Float[Tensor, "... o"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""Patches of an image against descriptions of classes: which patches count, and how well they can be transported.

Letters: p unit patches (n x p x d), D unit description tokens of k classes (k x L x d) with weights b (k x L, rows sum
to 1), cos = p D^T their cosines, K patches chosen, P transport plan (L x K), S local score (n x k), v local feature
(n x d), m classes chosen per image.

A class with fewer tokens than another is padded by copies of one of its own that share its weight: an atom split in two
leaves selection and transport as they are. So no mask is needed anywhere.

The largest thing held is a chunk of cosines (images x patches x classes x L); chosen patches are never gathered at width
d, only their cosines are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cairn.maths.transport import sinkhorn_kernel

CHUNK_VALUES = 2**23
"""Cosines computed at once: 32 MiB in float32, and about four times that while they are ranked and transported."""


class Alignment(NamedTuple):
    """How one chunk of images meets one chunk of classes."""

    score: Float[Tensor, "n k"]
    """S = sum_il P_il cos_il."""
    chosen: Int[Tensor, "n k K"]
    """Patch numbers, most alike first."""
    plan: Float[Tensor, "n k L K"]
    """P: rows are the class's tokens, columns the chosen patches; sums b and 1/K."""
    share: Float[Tensor, "n k K"]
    """sum_l P_li max(cos_li, 0), scaled to sum 1 over i: the part of each patch in all transported likeness; 1/K where
    nothing is alike."""


def padded_tokens(tokens: Sequence[Float[Tensor, "_ d"]]) -> tuple[Float[Tensor, "k L d"], Float[Tensor, "k L"]]:
    """Token sets of k classes as one tensor with weights, L the largest set. Raises ValueError for an empty set."""
    L = max(map(len, tokens), default=0)
    rows, weights = [], []
    for c, own in enumerate(tokens):
        size = len(own)
        if size == 0:
            raise ValueError(f"class {c} has no description token")
        copies = L - size
        rows.append(torch.cat([own, own[-1:].expand(copies, -1)]))
        weight = own.new_full((L,), 1 / size, dtype=torch.float32)
        weight[size - 1 :] = 1 / (size * (copies + 1))
        weights.append(weight)
    return torch.stack(rows), torch.stack(weights)


def aligned(
    cos: Float[Tensor, "n k L p"],
    b: Float[Tensor, "n k L"],
    *,
    patches: int | None = 16,
    guide: Literal["max", "mean"] = "max",
    transport: bool = True,
    eps: float = 0.1,
    iterations: int = 100,
) -> Alignment:
    """Choose and transport, given all cosines.

    g_i = max_l cos_li, or sum_l b_l cos_li;  chosen = the K patches of largest g
    P = entropic plan of the cost 1 - cos between the chosen patches (uniform) and the tokens (b);  S = sum_li P_li cos_li
    transport=False: every chosen patch goes to its best token, P_li = 1/K at argmax_l cos_li: the mean of maxima.

    Sweeps are counted, not stopped early: a problem's plan then does not depend on which others share its batch.
    patches None: all of them. P is a constant, S is differentiable in cos. With a single token or a single patch the plan
    is forced, and S the plain mean.

    Source: SPA (arXiv 2605.13835) for selection and transport [P]; uniform marginals, the cost and eps [I] (docs/methods.md).
    """
    K = cos.shape[-1] if patches is None else min(patches, cos.shape[-1])
    ranked = cos.amax(-2) if guide == "max" else (cos * b[..., None]).sum(-2)
    chosen = ranked.topk(K, dim=-1).indices
    kept = cos.gather(-1, chosen[..., None, :].expand(*cos.shape[:-1], K)).float()
    with torch.no_grad():
        if transport:
            P = sinkhorn_kernel(1 - kept, a=b.float(), eps=eps, iterations=iterations, tolerance=0.0).P
        else:
            P = torch.zeros_like(kept).scatter_(-2, kept.argmax(-2, keepdim=True), 1 / K)
        likeness = (P * kept.clamp_min(0)).sum(-2)
        total = likeness.sum(-1, keepdim=True)
        share = torch.where(total > 0, likeness / total, 1 / K)
    return Alignment((P * kept).sum((-2, -1)), chosen, P, share)


def local_scores(
    p: Float[Tensor, "n p d"],
    D: Float[Tensor, "k L d"],
    b: Float[Tensor, "k L"],
    candidates: Int[Tensor, "n m"] | None = None,
    *,
    values: int = CHUNK_VALUES,
    **how: Any,
) -> Float[Tensor, "n k"]:
    """S of every image and class, in chunks of at most about `values` cosines; `how` is passed to `aligned`.

    candidates: only these classes are aligned, image by image; the others get the least score among them, so that they
    neither gain nor lose against the weakest of those that were looked at.
    """
    n, k, m = len(p), len(D), len(D) if candidates is None else candidates.shape[1]
    S = torch.empty(n, m, device=p.device)
    for rows, columns, found in _chunks(p, D, b, candidates, values, how):
        S[rows, columns] = found.score
    if candidates is None:
        return S
    return S.amin(1, keepdim=True).expand(n, k).scatter(1, candidates, S)


def local_features(
    p: Float[Tensor, "n p d"],
    D: Float[Tensor, "k L d"],
    b: Float[Tensor, "k L"],
    candidates: Int[Tensor, "n m"],
    prior: Float[Tensor, "n m"],
    *,
    values: int = CHUNK_VALUES,
    **how: Any,
) -> Float[Tensor, "n d"]:
    """What the patches that count look like, together: one unit vector per image, in chunks as `local_scores`.

    v = unit(sum_i w_i p_i),  w_i = sum_c prior_c share_ci over the image's candidates c, share as in `Alignment`
    `prior` holds how likely each candidate is, rows sum to 1. A constant: no gradient flows through it.

    Source: ours; the barycentric reading of a transport plan, after Ferradans et al. 2014.
    """
    with torch.no_grad():
        w = p.new_zeros(p.shape[:2])
        for rows, columns, found in _chunks(p, D, b, candidates, values, how):
            weighted = prior[rows, columns, None] * found.share
            w[rows].scatter_add_(1, found.chosen.flatten(1), weighted.flatten(1).to(w))
        return normalize((w[:, None] @ p)[:, 0], dim=-1)


def _chunks(
    p: Float[Tensor, "n p d"],
    D: Float[Tensor, "k L d"],
    b: Float[Tensor, "k L"],
    candidates: Int[Tensor, "n m"] | None,
    values: int,
    how: dict[str, Any],
) -> Iterator[tuple[slice, slice, Alignment]]:
    """Every image with every class, or with its candidates: which rows and columns, and how they meet."""
    n, m = len(p), len(D) if candidates is None else candidates.shape[1]
    per_class = p.shape[1] * D.shape[1]
    height = max(1, values // (per_class * m))
    width = m if height > 1 else max(1, values // per_class)
    for i in range(0, n, height):
        rows = slice(i, i + height)
        x = p[rows].mT
        for j in range(0, m, width):
            columns = slice(j, j + width)
            if candidates is None:
                cos = (D[columns].flatten(0, 1) @ x).unflatten(1, D[columns].shape[:2])
                weights = b[columns].expand(len(cos), -1, -1)
            else:
                picked = candidates[rows, columns]
                cos = (D[picked].flatten(1, 2) @ x).unflatten(1, (picked.shape[1], D.shape[1]))
                weights = b[picked]
            yield rows, columns, aligned(cos, weights, **how)

"""Fusion of old and new weights: what changed much is the new weights', what hardly changed stays.

Letters: W' old weights, W new ones (both d x d), B an orthonormal basis taken from W'.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Basis = Literal["svd", "qr", "plain"]
Mask = Literal["clipped", "ratio"]


def fused(
    old: Float[Tensor, "d d"],
    new: Float[Tensor, "d d"],
    constant: float,
    mask: Mask = "clipped",
    basis: Basis = "svd",
) -> Float[Tensor, "d d"]:
    """Old and new weights, mixed entry by entry in the orthonormal basis B of the old ones.

    R = B^T old,  R' = B^T new,  D = |R' - R|;  B (R + M (R' - R)) with
    M = min(1, D / max D + constant)  (clipped)  or  M = D / (D + constant mean D)  (ratio).
    B: the left singular vectors of old (svd), Q of old = Q R (qr), or I (plain). The sign of a column of B makes no difference,
    since M depends on the size of changes alone. Where singular values of `old` are equal, as near the identity, their vectors are
    an arbitrary basis of the same space, and the result of svd is then as arbitrary; that of qr is not. Float64 inside.

    Source: decomposed parameter fusion of RAPF (Huang et al. 2024) for svd, CalFuse (Guo et al. 2025) for qr.
    """
    W = old.double()
    match basis:
        case "svd":
            B = torch.linalg.svd(W).U
        case "qr":
            B = torch.linalg.qr(W).Q
        case "plain":
            B = torch.eye(len(W), dtype=W.dtype)
    R, change = B.T @ W, B.T @ (new - old).double()
    D = change.abs()
    tiny = torch.finfo(D.dtype).tiny
    if mask == "clipped":
        M = (D / D.max().clamp(min=tiny) + constant).clamp(max=1)
    else:
        M = D / (D + constant * D.mean()).clamp(min=tiny)
    return (B @ (R + M * change)).to(old.dtype)

"""Rows that stand for classes."""

from __future__ import annotations

import torch
from torch import Tensor


def without(x: Tensor, c: int, dim: int = 0) -> Tensor:
    """x less what stands at c of its dimension `dim`: less row c, or with dim = 1 less column c. A copy."""
    return torch.cat([x.narrow(dim, 0, c), x.narrow(dim, c + 1, x.shape[dim] - c - 1)], dim)

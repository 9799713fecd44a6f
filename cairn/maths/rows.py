"""Rows that stand for classes."""

from __future__ import annotations

import torch
from torch import Tensor


def without(x: Tensor, c: int, dim: int = 0) -> Tensor:
    """x less what stands at c of its dimension `dim`, if it reaches that far: less row c, or with dim = 1 less column c."""
    kept = [i for i in range(x.shape[dim]) if i != c]
    return x.index_select(dim, torch.tensor(kept, dtype=torch.int64, device=x.device))


def replaced(x: Tensor, c: int, row: Tensor) -> Tensor:
    """x with `row`, of one row or as a vector, in the place of row c."""
    return torch.cat([x[:c], row.reshape(1, -1).to(x), x[c + 1 :]])


def merged(x: Tensor, c: int, other: int, dim: int = 0) -> Tensor:
    """x with what stands at `other` of its dimension `dim` added to what stands at c < other, and gone."""
    added = x.index_add(dim, torch.tensor([c], device=x.device), x.narrow(dim, other, 1))
    return without(added, other, dim)

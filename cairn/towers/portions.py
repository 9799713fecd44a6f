"""Passes without gradients in portions that the memory of a device holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from cairn.errors import OutOfMemory

Made = TypeVar("Made", bound=Tensor | tuple[Tensor, ...])


class Portions:
    """Makes something of rows, each of which is made alone: where the device's memory does not hold all at once, half of them at a
    time, or half of that. What is made is that of one pass, up to rounding; how many rows fitted is kept for later passes."""

    def __init__(self):
        self.most: int | None = None

    def __call__(self, make: Callable[[Tensor], Made], rows: Tensor) -> Made:
        """Raises OutOfMemory where a single row is too much."""
        while self.most is None or len(rows) <= self.most:
            made = _tried(make, rows)
            if made is not None:
                return made
            if len(rows) < 2:
                raise OutOfMemory(
                    f"{rows.device}: its memory does not hold a pass of one image; free some of it, or give --precision bfloat16, "
                    "smaller --towers or --device cpu"
                )
            self.most = -(-len(rows) // 2)
            if rows.is_cuda:
                torch.cuda.empty_cache()
        parts: list[Any] = [self(make, part) for part in rows.split(self.most)]
        if isinstance(parts[0], Tensor):
            return cast("Made", torch.cat(parts))
        return cast("Made", tuple(torch.cat(column) for column in zip(*parts, strict=True)))


def _tried(make: Callable[[Tensor], Made], rows: Tensor) -> Made | None:
    """None where memory did not do: the error, which holds what the pass had made so far, is gone then."""
    try:
        return make(rows)
    except torch.OutOfMemoryError:
        return None

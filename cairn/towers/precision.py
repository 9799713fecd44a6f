"""Which arithmetic a device has: found by a moment's measurement, not by what it says of itself."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from cairn.types import Precision

Asked: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""`auto`: bfloat16 where it pays, float32 elsewhere."""

PAYS = 0.8
"""Share of the time of float32 up to which `auto` takes bfloat16."""

SLOWER = 2.0
"""How much longer than float32 bfloat16 may take before float32 is taken in its place."""

REPEATS = 5
_ROWS, _WIDTH = 64, 768
"""Of the product that is timed: that of a ViT-B with a quarter of an image's tokens, some ms where it is slow."""


def usable_precision(asked: Asked, device: torch.device) -> tuple[Precision, tuple[str, ...]]:
    """The precision to compute in and, where it is not the one asked for, why."""
    if asked == "auto":
        share = bfloat16_slowdown(device.type)
        found: Precision = "bfloat16" if share <= PAYS else "float32"
        return found, (
            f"precision auto: {found}, for bfloat16 takes {share:.1f} times as long as float32 on this {device.type}",
        )
    if asked != "bfloat16" or (factor := bfloat16_slowdown(device.type)) <= SLOWER:
        return asked, ()
    return "float32", (
        f"precision bfloat16 takes {factor:.0f} times as long as float32 on this {device.type}, which has no arithmetic for "
        "it: float32 is used",
    )


@cache
def bfloat16_slowdown(device: str) -> float:
    """Time of a matrix product in bfloat16 over that in float32, each the least of several. Once per process."""
    return _seconds(torch.bfloat16, device) / _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: str) -> float:
    x = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
    w = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    found = []
    for _ in range(REPEATS + 1):  # the first prepares
        began = time.perf_counter()
        _wait_for((x @ w)[0, 0])
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _wait_for(value: Tensor) -> None:
    """Accelerators return before they are done."""
    value.item()

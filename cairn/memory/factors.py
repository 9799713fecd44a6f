"""Factors of a memory's covariances, kept between draws: training asks for the same ones at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cairn.maths.gaussian import Halved

Factors = tuple[Tensor, ...]
"""As the kind of covariance makes them, stacked: of a full one the triangles and what was added to each."""

Key = tuple[tuple[int, ...], torch.device]


class KeptFactors:
    """Up to `limit` bytes; what is beyond is made again for every draw. With `halved`, triangles are kept in half precision."""

    def __init__(self):
        self._kept: dict[Key, tuple[Factors, Halved | None]] = {}
        self._bytes = 0

    def of(self, key: Key, make: Callable[[], Factors], limit: int, *, halved: bool) -> Factors:
        """Those of `key`, which `make` makes. Whether they were kept or not changes nothing in them."""
        if key not in self._kept:
            factors, small = make(), None
            if halved:
                small, factors = Halved.of(factors[0]), factors[1:]
            size = sum(tensor.nbytes for tensor in (*factors, *(small or ())))
            if self._bytes + size > limit:
                return factors if small is None else (small.whole(), *factors)
            self._kept[key] = factors, small
            self._bytes += size
        factors, small = self._kept[key]
        return factors if small is None else (small.whole(), *factors)

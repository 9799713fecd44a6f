"""Frequent and rare classes apart. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Frequency = Literal["head", "medium", "tail"]
HEAD, TAIL = 100, 20
"""Classes of at least so many training images are head, of fewer than so many tail. Source: Liu et al. 2019, Large-Scale
Long-Tailed Recognition."""


class ByFrequency(NamedTuple):
    """A value per class, averaged over frequent and over rare classes."""

    means: dict[Frequency, float]
    terciles: bool
    """Whether groups are thirds of the classes, because one of head, medium and tail would be empty."""


def by_frequency(values: Sequence[float], images: Sequence[int]) -> ByFrequency | None:
    """Mean over the classes of each group, by their training images. None where all classes have as many, or fewer than
    three there are."""
    k = len(images)
    if k < 3 or len(set(images)) == 1:
        return None
    groups: dict[Frequency, list[int]] = {
        "head": [c for c in range(k) if images[c] >= HEAD],
        "medium": [c for c in range(k) if TAIL <= images[c] < HEAD],
        "tail": [c for c in range(k) if images[c] < TAIL],
    }
    terciles = not all(groups.values())
    if terciles:
        falling = sorted(range(k), key=lambda c: -images[c])
        first, second = -(-k // 3), -(-k // 3) + -(-(k - 1) // 3)
        groups = {"head": falling[:first], "medium": falling[first:second], "tail": falling[second:]}
    return ByFrequency({name: sum(values[c] for c in own) / len(own) for name, own in groups.items()}, terciles)

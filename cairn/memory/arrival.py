"""Labelled features as a memory takes them: classes are numbered in order of arrival."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from cairn.errors import DataError
from cairn.types import Features, Labels


def rows_by_class(features: Features, labels: Labels, dim: int, classes: int) -> dict[int, Int[Tensor, " m"]]:
    """The rows of each class present, in order, for a memory of width `dim` that holds `classes` of them.

    Raises DataError where shapes disagree or new labels leave a gap.
    """
    if features.ndim != 2 or features.shape[1] != dim or labels.shape != features.shape[:1]:
        raise DataError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)}: "
            f"a memory of width {dim} takes (n, {dim}) and (n,)"
        )
    # Sorted once: a mask per class would be quadratic in the number of classes
    labels = labels.detach().cpu()
    seen, sizes = labels.unique(return_counts=True)
    numbers = seen.tolist()
    if numbers and (numbers[0] < 0 or not {*range(classes, numbers[-1] + 1)} <= {*numbers}):
        raise DataError(
            f"labels {numbers[:8]}: classes are numbered in order of arrival, "
            f"so after {classes} classes the new ones start at {classes} and leave no gap"
        )
    rows = torch.argsort(labels, stable=True).split(sizes.tolist()) if numbers else ()
    return dict(zip(numbers, rows, strict=True))

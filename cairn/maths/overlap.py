"""How well regions of images are found: intersection over union, from one confusion matrix of all pixels."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate


def pixel_classes(q: Float[Tensor, "n c g g"], height: int, width: int) -> Int[Tensor, "n h w"]:
    """Of each pixel the likeliest class, the probabilities of patches brought to that size bilinearly."""
    return interpolate(q, size=(height, width), mode="bilinear").argmax(1)


def confusion(truth: Int[Tensor, " n"], found: Int[Tensor, " n"], classes: int) -> Int[Tensor, "c c"]:
    """How many pixels of class i were taken for class j."""
    return torch.bincount(truth * classes + found, minlength=classes**2).view(classes, classes)


def overlaps(counts: Int[Tensor, "c c"]) -> list[float | None]:
    """IoU_c = TP / (TP + FP + FN) of each class; None for one that no pixel shows.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge (2015), section 4.3.
    """
    right, shown, taken = counts.diag(), counts.sum(1), counts.sum(0)
    both = (shown + taken - right).tolist()
    return [r / n if s else None for r, n, s in zip(right.tolist(), both, shown.tolist(), strict=True)]

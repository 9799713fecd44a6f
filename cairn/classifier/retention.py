"""What becomes of old classes, seen on draws from what a method keeps of them."""

from __future__ import annotations

import numpy as np
import torch

from cairn.classifier.estimate import confusion_counts
from cairn.classifier.novelty import gaussians_of
from cairn.methods.protocol import GaussianScoring, Method
from cairn.training.context import Seeds

DRAWS = 4096
"""Of all old classes together, about."""

PER_CLASS = 200
"""Draws at most."""


@torch.no_grad()
def drawn_shares(method: Method | None, seed: int) -> np.ndarray | None:
    """The shares of draws from each class that are taken for each class, (k, k). The random numbers are the same each time.

    None where the method keeps nothing to draw from, or knows no class by more than one image.
    """
    if not isinstance(method, GaussianScoring) or not method.memory.classes:
        return None
    known = gaussians_of(method)
    if known is not None and not known.scatter.trace() > 0:
        return None
    k = method.memory.classes
    per_class = min(PER_CLASS, max(2, DRAWS // k))
    drawn = method.memory.draw(per_class, Seeds(seed).generator("retention"), range(k))[0]
    taken = method.row_scores(method.on_sphere(drawn)).argmax(1)
    return confusion_counts(taken.cpu().numpy(), np.repeat(np.arange(k), per_class), k) / per_class

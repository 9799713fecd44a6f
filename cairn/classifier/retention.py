"""What becomes of old classes, seen on draws from what a method keeps of them."""

from __future__ import annotations

import numpy as np
import torch

from cairn.classifier.estimate import confusion_counts
from cairn.methods.protocol import GaussianScoring, Method
from cairn.training.seeds import Seeds

DRAWS = 4096
"""Of all old classes together, about."""

PER_CLASS = 200
"""Draws at most."""


@torch.no_grad()
def drawn_shares(method: Method | None, seed: int) -> np.ndarray | None:
    """The shares of draws from each class that are taken for each class, (k, k). Each class has random numbers of its own, so that
    those of two learners differ by what was learned alone.

    None where the method keeps nothing to draw from.
    """
    if not isinstance(method, GaussianScoring) or not method.memory.classes:
        return None
    k = method.memory.classes
    per_class, seeds = min(PER_CLASS, max(2, DRAWS // k)), Seeds(seed)
    drawn = [method.memory.draw(per_class, seeds.at(c=c).generator("retention"), [c])[0] for c in range(k)]
    taken = method.row_scores(method.on_sphere(torch.cat(drawn))).argmax(1)
    return confusion_counts(taken.cpu().numpy(), np.repeat(np.arange(k), per_class), k) / per_class

"""What old classes lose to a task, seen on draws from what a method keeps of them."""

from __future__ import annotations

import numpy as np
import torch

from cairn.classifier.estimate import confusion_counts
from cairn.methods.protocol import GaussianScoring, Method
from cairn.training.seeds import Seeds
from cairn.types import Features

DRAWS = 4096
"""Of all old classes together, about."""

PER_CLASS = 200
"""Draws at most."""


@torch.no_grad()
def drawn_shares(before: Method | None, after: Method, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """For the k classes that `before` knows, the shares of draws that it takes for each class (k, k), and that `after`, which
    learned K - k more, does (k, K). Where the image side moved each draws its own, otherwise both score the same draws.

    None where the method keeps nothing to draw from.
    """
    if not isinstance(before, GaussianScoring) or not isinstance(after, GaussianScoring) or not before.memory.classes:
        return None
    k = before.memory.classes
    rows = _drawn(before, k, seed)
    found = rows if before.encoder == after.encoder else _drawn(after, k, seed)
    return _shares(before, rows, k), _shares(after, found, k)


def _drawn(method: GaussianScoring, k: int, seed: int) -> Features:
    per_class = min(PER_CLASS, max(2, DRAWS // k))
    return method.on_sphere(method.memory.draw(per_class, Seeds(seed).generator("retention"), range(k))[0])


def _shares(method: GaussianScoring, rows: Features, k: int) -> np.ndarray:
    scores, per_class = method.row_scores(rows), len(rows) // k
    labels = np.repeat(np.arange(k), per_class)
    return confusion_counts(scores.argmax(1).cpu().numpy(), labels, scores.shape[1])[:k] / per_class

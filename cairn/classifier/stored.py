"""A method from a state: of another method in memory, or from a file, which may hold anything and is tried before it is
trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cairn.data.task import Task
from cairn.errors import ResultError
from cairn.methods.protocol import KeepsImages, Method
from cairn.types import State

LARGE = 1e6
"""Where embeddings are given there is no item like another: one far beyond any, so that what is finite of it is of all."""


def copied(build: Callable[[], Method], state: State, tasks: Sequence[Task]) -> Method:
    """A fresh method of `build` with what another one has learned of `tasks`."""
    method = build()
    method.load_state_dict(state)
    if isinstance(method, KeepsImages):
        method.attach_images(tasks)
    return method


def restore_checked(method: Method, state: State, folder: Path, classes: int) -> None:
    """A stored state into a fresh method. Raises ResultError if it does not fit, or an item does not get one finite score for
    each of `classes`."""
    try:
        method.load_state_dict(state)
        if not classes:
            return
        towers = method.towers
        item = Image.new("RGB", (8, 8)) if towers.has_images else np.full(towers.dim, LARGE, dtype=np.float32)
        with torch.no_grad():
            scores = method.scores(method.embed(towers.pixels(towers.prepare(item)[None])))
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ResultError(f"'{folder}': the state does not fit the method: {reason}; learn again") from None
    if scores.shape != (1, classes) or not torch.isfinite(scores).all():
        raise ResultError(
            f"'{folder}': the state does not fit the method: an item gets {scores.shape[-1]} scores for {classes} classes, or "
            "one that is not finite; learn again"
        )

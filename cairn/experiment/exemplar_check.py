"""Whether a method keeps what it says it does not: single images, or rows made of one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cairn.data.images import Subset
from cairn.data.task import Task
from cairn.errors import ExemplarsKept
from cairn.methods.protocol import Method
from cairn.towers.protocol import Towers
from cairn.training.context import Log

LOOKED_FOR = 8
"""Classes of a task of which an image is looked for among the numbers that a method holds."""


def looked_for(task: Task, towers: Towers) -> list[Tensor]:
    """Some of the task's images as they are prepared for the tower, each of a class with another one that differs: where
    all are alike, their mean is one of them."""
    found = []
    for label in np.unique(task.train.labels)[:LOOKED_FOR]:
        first, *others = np.flatnonzero(task.train.labels == label)
        image = towers.prepare(task.train[int(first)])
        if others and not _holds(towers.prepare(task.train[int(others[-1])]), image):
            found.append(image)
    hidden = task.unlabelled
    if hidden is not None and len(hidden) > 1:
        some = [towers.prepare(hidden[i]) for i in range(min(LOOKED_FOR, len(hidden)))]
        found += [image for image in some[1:] if not _holds(some[0], image)]
    return found


ROUNDING = 1e-3
"""Of an image's norm: what storing it in half precision, or embedding it in another batch, may change."""


def refuse_exemplars(method: Method, task: Task, images: Sequence[Tensor]) -> None:
    """Raises ExemplarsKept if the method, after learning the task, holds its collection of images, or one of `images` as a
    row of some tensor, up to rounding. What it was built with, towers and log, is not searched."""
    own = {id(part): part for part in _parts(task)}
    for held in _reachable(method):
        if id(held) in own:
            raise ExemplarsKept(_message(method, f"the {type(held).__name__} of task {task.index}"))
        if isinstance(held, (Tensor, np.ndarray)) and any(_holds(torch.as_tensor(held), image) for image in images):
            raise ExemplarsKept(_message(method, f"an image of task {task.index}"))


def _message(method: Method, what: str) -> str:
    return (
        f"method {type(method).__name__} holds {what} after learning it, so it is not exemplar-free; "
        "declare keeps='images', 'buffer' or 'exemplars' on its card"
    )


def _parts(task: Task) -> Iterator[Any]:
    """The task and its collections of images, whatever they are wrapped in."""
    yield task
    for collection in (task.train, task.unlabelled):
        images: Any = collection
        while images is not None:
            yield images
            images = images.source if isinstance(images, Subset) else None


def _reachable(method: Method) -> Iterator[Any]:
    """Everything that the method's attributes lead to."""
    seen, left = {id(method.__dict__), id(method.towers)}, list(method.__dict__.values())
    while left:
        held = left.pop()
        if id(held) in seen or isinstance(held, (type, ModuleType, Log, str, bytes, int, float)):
            continue
        seen.add(id(held))
        yield held
        if isinstance(held, FunctionType):  # not its module
            left += [cell.cell_contents for cell in held.__closure__ or ()] + list(held.__defaults__ or ())
        else:
            left += gc.get_referents(held)


def _holds(values: Tensor, image: Tensor) -> bool:
    """Whether the image stands in the tensor, whole and up to rounding, as one entry of its leading dimensions."""
    size = image.numel()
    if values.numel() < size or values.shape[-1] not in (size, image.shape[-1]) or values.numel() % size:
        return False
    row = image.detach().cpu().reshape(1, size).float()
    rows = values.detach().cpu().reshape(-1, size).float()
    return bool(((rows - row).norm(dim=1) <= ROUNDING * row.norm()).any())

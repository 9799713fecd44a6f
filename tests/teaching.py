"""What tests of several methods do alike: teach a method task after task, stack rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from cairn.data.images import Images
from cairn.data.stream import Task
from cairn.methods.protocol import Method
from cairn.training.context import Context
from cairn.training.seeds import Seeds

Taught = TypeVar("Taught", bound=Method)


def taught(method: Taught, tasks: Iterable[Task]) -> Taught:
    """The method after these tasks, with seed 1."""
    for task in tasks:
        method.learn(task, Context(Seeds(1)))
    return method


def rows(images: Images) -> Tensor:
    """All of them, one below the other."""
    return torch.stack([torch.as_tensor(images[i]) for i in range(len(images))])

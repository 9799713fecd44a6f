"""The types that cross module borders: shapes of tensors, what towers declare, and the state of a learner.

Letters: n rows, d width, k classes, m prompts, p patches, t tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

Pixels: TypeAlias = Real[Tensor, "n ..."]
"""What an image tower takes: (n, 3, h, w), or (n, d) where the embeddings were computed beforehand, or whole numbers (n, 2),
the places of embeddings in a store (`cairn.towers.cached`), or what the first blocks made of images (`cairn.towers.trunk`)."""

Features: TypeAlias = Float[Tensor, "n d"]
Labels: TypeAlias = Int[Tensor, " n"]
"""Class ids in order of arrival, 0..k-1."""

Scores: TypeAlias = Float[Tensor, "n k"]
"""One column per class seen; higher is likelier."""

Attention: TypeAlias = Literal["native", "value"]
"""How patches look at one another in the last block: as the tower was trained, or by what they are (values)."""

Precision: TypeAlias = Literal["float32", "bfloat16"]
"""Arithmetic inside the towers."""

State: TypeAlias = dict[str, Tensor]
"""Of a learner: one flat dictionary, what safetensors can hold and nothing it cannot."""


def flattened(parts: Mapping[str, State]) -> State:
    """{'image': {'a': t}} to {'image.a': t}."""
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def part(state: State, name: str) -> State:
    """The inverse, for one part."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def words(names: Sequence[str]) -> Tensor:
    """Strings as a uint8 tensor of their JSON."""
    return torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8)


def spelled(tensor: Tensor) -> list[str]:
    """The inverse of `words`."""
    return json.loads(bytes(tensor.tolist()))

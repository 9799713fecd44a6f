"""The state of a learner as one flat dictionary of tensors: what safetensors can hold, and nothing it cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cairn.types import State as State


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

"""Every random choice is derived from (seed, purpose, place): no hidden state, so nothing to save."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seeds:
    """A node in the tree of seeds. Equal paths give equal generators, whatever was drawn before."""

    seed: int
    path: tuple[str, ...] = ()

    def at(self, **place: int | str) -> Seeds:
        """The node below, e.g. `seeds.at(task=3, stage=1)`; keyword order does not matter."""
        return Seeds(self.seed, (*self.path, *(f"{key}={place[key]}" for key in sorted(place))))

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for one purpose at this node."""
        name = "/".join((str(self.seed), *self.path, purpose))
        value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return torch.Generator(device).manual_seed(value % 2**63)

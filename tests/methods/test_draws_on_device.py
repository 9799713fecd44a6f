"""Methods with batches of their own have them on the device of training. That is `meta` here, where nothing is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.replay import ReplayBatches
from cairn.methods import mccl, rapf, slca, spa

DIM, OLD, PER_CLASS, BATCH = 6, 4, 5, 8


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(number: int, seed: int) -> torch.Tensor:
    return unit(torch.randn(number, DIM, generator=rng(seed)))


MEMORY = GaussianMemory(DIM).add(rows(48, 1), torch.arange(OLD).repeat(12))
X, Y = rows(40, 2), torch.arange(OLD, OLD + 2).repeat(20)


def of_slca(device: torch.device):
    return slca._Draws(MEMORY, torch.zeros(OLD, DIM), PER_CLASS, BATCH, device)


def of_spa(device: torch.device):
    return spa._Batches(
        X.to(device), torch.zeros(40, 6, device=device), Y.to(device), MEMORY, BATCH, PER_CLASS, lambda z: z
    )


def of_mccl(device: torch.device):
    config = mccl.MCCLConfig()
    return mccl._Batches(X, Y, rows(30, 3).view(10, 3, DIM), 10, MEMORY, config, device)


def of_rapf(device: torch.device):
    plain = ReplayBatches(X, Y, MEMORY, batch=BATCH, real_share=None, device=device)
    pairs = torch.tensor([[0, 4], [0, 5], [2, 4]])
    return rapf._WithPairs(plain, MEMORY, pairs, 2, 2, lambda z: z)


def dense(tree: Any) -> list[torch.Tensor]:
    return [part for part in tree_flatten(tree)[0] if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("made", [of_slca, of_spa, of_mccl, of_rapf])
def test_batches_lie_on_the_device_and_are_those_of_a_processor(made):
    there = [dense(batch) for epoch in made(torch.device("meta")).epochs([rng(), rng(1)]) for batch in epoch]
    plain = [dense(batch) for epoch in made(torch.device("cpu")).epochs([rng(), rng(1)]) for batch in epoch]
    random = 1 if made is of_mccl else 0  # its numbers of the loss are drawn step by step
    assert [len([part for part in parts if part.device.type != "meta"]) for parts in there] == [random] * len(there)
    assert [[part.shape for part in parts] for parts in there] == [[part.shape for part in parts] for parts in plain]

"""A frozen random layer that widens embeddings, after which a linear head can tell more apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.maths.similarity import unit
from cairn.training.context import Seeds
from cairn.types import Features


class RandomFeatures:
    """h = relu(z V), z the unit embedding (d), V (d x m) normal with variance 1; m = 0: h = z.

    V is drawn from `seed`, which is all that has to be stored of it.
    Source: RanPAC (McDonnell et al. 2023), section 4; ACIL's buffer layer (Zhuang et al. 2022), section III.
    """

    def __init__(self, d: int, m: int, seed: int):
        self.V = torch.randn(d, m, generator=Seeds(seed).generator("random-features")) if m else None
        self.width, self.seed = m or d, seed

    def __call__(self, features: Features) -> Float[Tensor, "n m"]:
        z = unit(features)
        return z if self.V is None else torch.relu(z @ self.V.to(z.device))

"""Cosines and scores. Letters: n rows, k classes, d width; s the scale on cosines."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """x / |x|, row by row; a row of zeros stays zero."""
    return normalize(x, dim=-1)


def cosines(x: Float[Tensor, "n d"], t: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
    """cos(x_i, t_c) in [-1, 1]."""
    return unit(x) @ unit(t).T

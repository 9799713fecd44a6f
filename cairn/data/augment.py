"""Altered copies of images as a camera might have taken them: nearer, mirrored, in other light; and of embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from cairn.types import Pixels

CHANCES = 6
"""Numbers in [0, 1) that decide what becomes of one image."""

SMALLEST = 0.5
"""Share of the area that is left at least."""

LIGHT = 0.4
"""Contrast lies within 1 +- LIGHT, brightness moves by up to LIGHT standard deviations of the tower's pixels."""


def view(pixels: Pixels, chances: Float[Tensor, "n six"]) -> Pixels:
    """Each image cropped to a rectangle of its own shape, mirrored or not, with other contrast and brightness.

    `chances` are uniform in [0, 1): area, place across, place down, mirrored, contrast, brightness. Nothing else decides.
    """
    u = chances.to(pixels.device, pixels.dtype)
    side = (SMALLEST + (1 - SMALLEST) * u[:, 0]).sqrt()
    across, down = ((1 - side) * (2 * place - 1) for place in (u[:, 1], u[:, 2]))
    mirrored = torch.where(u[:, 3] < 0.5, 1.0, -1.0)
    nought = torch.zeros_like(side)
    rows = (torch.stack([mirrored * side, nought, across], 1), torch.stack([nought, side, down], 1))
    grid = affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    cropped = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast, brightness = (1 + LIGHT * (2 * u[:, 4] - 1), LIGHT * (2 * u[:, 5] - 1))
    mean = cropped.mean((1, 2, 3))
    return cropped * contrast[:, None, None, None] + ((1 - contrast) * mean + brightness)[:, None, None, None]


def noisy(x: Float[Tensor, "n d"], noise: float, rng: torch.Generator) -> Float[Tensor, "n d"]:
    """x + e, e normal with standard deviation noise |x| / sqrt(d) in every direction."""
    return x + noise * x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5 * torch.randn(x.shape, generator=rng)

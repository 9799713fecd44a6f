"""Altered copies of images as a camera might have taken them: nearer, mirrored, in other light; and of embeddings."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from cairn.types import Pixels

CHANCES = 6
"""Numbers in [0, 1) that decide what becomes of one image."""

SMALLEST = 0.5
"""Share of the area that is left at least."""

LIGHT = 0.4
"""Contrast lies within 1 +- LIGHT, brightness moves by up to LIGHT standard deviations of the tower's pixels."""


STRONG_CHANCES = 11
"""Numbers in [0, 1) that decide what becomes of one image in a strong view."""

STRONG_LIGHT, COLOUR, JITTERED, GREY, BLURRED = 0.5, 0.25, 0.8, 0.2, 0.5
"""Contrast and brightness as LIGHT, gain and shift of each channel; the shares of images whose light and colour change, that lose
their colour, and that are blurred."""


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


def strong_view(pixels: Pixels, chances: Float[Tensor, "n eleven"]) -> Pixels:
    """Each image in other light and colours, some in grey, some blurred; every point stays where it is.

    `chances` are uniform in [0, 1): contrast, brightness, gain and shift of each channel, whether these, grey, blur. Nothing else
    decides. Source: the strong view of UniMatch (Yang et al. 2023), whose jitter is of saturation and hue.
    """
    u = chances.to(pixels.device, pixels.dtype)
    contrast, brightness = (1 + STRONG_LIGHT * (2 * u[:, 0] - 1), STRONG_LIGHT * (2 * u[:, 1] - 1))
    gain, shift = (1 + COLOUR * (2 * u[:, 2:5] - 1), COLOUR * (2 * u[:, 5:8] - 1))
    mean = pixels.mean((1, 2, 3))[:, None, None, None]
    lit = (pixels - mean) * contrast[:, None, None, None] + mean + brightness[:, None, None, None]
    lit = lit * gain[:, :, None, None] + shift[:, :, None, None]
    found = _where(u[:, 8] < JITTERED, lit, pixels)
    found = _where(u[:, 9] < GREY, found.mean(1, keepdim=True).expand_as(found), found)
    row = pixels.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row).expand(3, 1, 5, 5)
    blurred = conv2d(pad(found, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    return _where(u[:, 10] < BLURRED, blurred, found)


def _where(chosen: Tensor, one: Pixels, other: Pixels) -> Pixels:
    return torch.where(chosen[:, None, None, None], one, other)

"""The arc-cosine kernel against values known by hand and against the random features it is the limit of."""

from __future__ import annotations

import math

import pytest
import torch

from cairn.maths.kernels import arc_cosine
from cairn.methods.parts.random_features import RandomFeatures


@pytest.mark.parametrize(
    ("angle", "value"),
    [(0.0, 1.0), (math.pi / 2, 1 / math.pi), (math.pi, 0.0), (math.pi / 3, (3**0.5 / 2 + math.pi / 3) / math.pi)],
)
def test_it_is_known_at_some_angles_whatever_the_lengths(angle, value):
    x, y = torch.tensor([[3.0, 0.0]]), 0.2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert arc_cosine(x, y).item() == pytest.approx(value, abs=1e-6)


def test_it_is_what_random_features_tend_to():
    """E relu(v.x) relu(v.y) = k / 2: with 200,000 of them to three parts in a thousand."""
    z, m = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), 200_000
    h = RandomFeatures(5, m, seed=1)(z).double()
    torch.testing.assert_close(2 * h @ h.T / m, arc_cosine(z, z), atol=1e-2, rtol=0)

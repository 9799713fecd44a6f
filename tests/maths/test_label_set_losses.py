"""Losses of label sets, against a triple loop and torch's own."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from cairn.maths.label_set_losses import balanced_focal, balanced_weights, prior_shift


def table():
    rng = torch.Generator().manual_seed(4)
    Y = (torch.rand(30, 5, generator=rng) < torch.tensor([0.8, 0.5, 0.3, 0.1, 0.05])).double()
    Y[0], Y[1] = 0, 1
    return torch.randn(30, 5, generator=rng, dtype=torch.float64) * 3, Y


def sigma(v):
    return 1 / (1 + math.exp(-v))


def test_it_is_the_loop():
    u, Y = table()
    counts, N = Y.sum(0), len(Y)
    floor, slope, middle, strength, scale = 0.1, 10.0, 0.3, 0.05, 2.0
    total = 0.0
    for i in range(N):
        drawn = sum(float(Y[i, j] / counts[j]) for j in range(5))
        for c in range(5):
            r = 1 / float(counts[c]) / drawn if drawn else math.inf
            w = floor + (1.0 if math.isinf(r) else sigma(slope * (r - middle)))
            nu = -strength * math.log(max(N / float(counts[c]) - 1, 1 / N)) / scale
            v = float(u[i, c]) + nu
            if Y[i, c]:
                loss = 2 * (1 - sigma(v)) ** 2 * -math.log(sigma(v))
            else:
                loss = 2 * (1 - sigma(-scale * v)) ** 2 * -math.log(sigma(-scale * v)) / scale
            total += w * loss
    found = balanced_focal(
        u, Y, balanced_weights(Y, counts, floor, slope, middle), prior_shift(counts, N, strength, scale), scale
    )
    assert float(found) == pytest.approx(total / N / 5, rel=1e-10)


def test_an_image_that_shows_nothing_weighs_floor_plus_one():
    _, Y = table()
    weights = balanced_weights(Y, Y.sum(0), 0.1, 10.0, 0.3)
    assert weights[0].tolist() == pytest.approx([1.1] * 5)


def test_of_an_image_of_one_class_alone_that_class_is_drawn_for_its_own_sake():
    Y = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    weights = balanced_weights(Y, torch.tensor([10.0, 2, 2]), 0.0, 10.0, 0.3)
    assert float(weights[0, 0]) == pytest.approx(sigma(10 * (1 - 0.3)), rel=1e-5)


def test_a_class_in_every_image_and_a_rare_one_have_finite_shifts():
    shift = prior_shift(torch.tensor([10.0, 5.0, 1.0]), 10, 0.05, 2.0)
    assert shift.tolist() == pytest.approx([0.025 * math.log(10), 0, -0.025 * math.log(9)], abs=1e-7)


def test_without_weights_shift_and_scale_it_is_the_focal_loss():
    u, Y = table()
    p = torch.where(Y > 0, u.sigmoid(), 1 - u.sigmoid())
    plain = binary_cross_entropy_with_logits(u, Y, reduction="none")
    expected = (2 * (1 - p) ** 2 * plain).mean()
    found = balanced_focal(u, Y, torch.ones_like(u), torch.zeros(5, dtype=u.dtype), 1.0)
    torch.testing.assert_close(found, expected)

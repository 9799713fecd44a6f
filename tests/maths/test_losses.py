"""Losses against the sums they stand for."""

from __future__ import annotations

import math

import torch

from cairn.maths.losses import class_cross_entropy, text_anchor_contrast
from cairn.maths.similarity import cosines, unit


def clustered(n=12, k=3, d=8, seed=0):
    """Unit rows in correlated clusters, unit texts near them, labels."""
    rng = torch.Generator().manual_seed(seed)
    T = unit(torch.randn(k, d, generator=rng, dtype=torch.float64))
    y = torch.arange(n) % k
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    z = unit(T[y] + 0.5 * torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing.T)
    return z, T, y


def test_class_cross_entropy_is_the_written_sum():
    z, T, y = clustered()
    s = 7.0
    total = 0.0
    for i in range(len(z)):
        logits = [s * sum(a * b for a, b in zip(z[i].tolist(), t.tolist(), strict=True)) for t in T]
        total -= logits[y[i]] - math.log(sum(math.exp(value) for value in logits))
    assert math.isclose(class_cross_entropy(z, T, y, s).item(), total / len(z), rel_tol=1e-12)


def test_text_anchor_contrast_is_the_written_sum_over_the_images_of_the_batch():
    z, T, y = clustered()
    y = torch.where(y == 2, 1, y)  # a class that the batch does not hold must not count
    s, total = 7.0, 0.0
    for i in range(len(z)):
        weights = [math.exp(s * float(T[y[i]] @ z[j])) for j in range(len(z))]
        total -= math.log(weights[i] / sum(weights))
    assert math.isclose(text_anchor_contrast(z, T, y, s).item(), total / len(z), rel_tol=1e-12)


def test_gradients_are_exact():
    z, T, y = clustered(n=6)
    for loss in (class_cross_entropy, text_anchor_contrast):
        assert torch.autograd.gradcheck(lambda z, T: loss(z, T, y, 3.0), (z.requires_grad_(), T.requires_grad_()))  # noqa: B023


def test_cosines_ignore_length_and_survive_zero():
    z, T, _ = clustered()
    torch.testing.assert_close(cosines(3 * z, 0.1 * T), z @ T.T)
    assert torch.equal(unit(torch.zeros(1, 4)), torch.zeros(1, 4))

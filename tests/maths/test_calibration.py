"""Temperature scaling against a minimiser of the plain loss, and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cairn.maths.calibration import INVERSE_TEMPERATURES, best_temperature, log_probabilities, loss_curves


def scored(n=400, k=7, sharpness=1.0, seed=0):
    """Scores whose softmax at T = sharpness gives the very probabilities that labels were drawn from."""
    rng = np.random.default_rng(seed)
    logits = 2.5 * rng.normal(size=(n, k)) @ (np.eye(k) + 0.4 * rng.normal(size=(k, k)))
    p = np.exp(log_softmax(logits, axis=1))
    labels = np.array([rng.choice(k, p=row) for row in p])
    return torch.from_numpy(sharpness * logits), torch.from_numpy(labels)


def plain_loss(s, y, b):
    return -log_softmax(b * s.numpy(), axis=1)[np.arange(len(y)), y.numpy()].sum()


def test_curves_are_the_losses_at_each_temperature():
    s, y = scored(n=20)
    L, R = loss_curves(s, y)
    runner_up = s.argsort(1)[:, -2]
    for i in (0, 57, 80, 100, 160):
        b = INVERSE_TEMPERATURES[i].item()
        assert L[i].item() == pytest.approx(plain_loss(s, y, b), rel=1e-9)
        assert R[i].item() == pytest.approx(plain_loss(s, runner_up, b), rel=1e-9)


def test_curves_of_parts_add_up():
    s, y = scored(n=50)
    for whole, one, other in zip(
        loss_curves(s, y), loss_curves(s[:13], y[:13]), loss_curves(s[13:], y[13:]), strict=True
    ):
        torch.testing.assert_close(whole, one + other)


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 37.0])
def test_temperature_is_that_of_the_smallest_loss(sharpness):
    s, y = scored(sharpness=sharpness)
    L, _ = loss_curves(s, y)
    found = minimize_scalar(lambda b: plain_loss(s, y, np.exp(b)), bounds=(-9, 9), method="bounded")
    assert best_temperature(L, torch.zeros_like(L), len(y)) == pytest.approx(np.exp(-found.x), rel=0.01)


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 37.0])
def test_temperature_finds_the_truth_that_labels_were_drawn_from(sharpness):
    s, y = scored(n=4000, sharpness=sharpness)
    assert best_temperature(*loss_curves(s, y), len(y)) == pytest.approx(sharpness, rel=0.05)


def test_half_a_row_belongs_to_the_runner_up():
    s, y = scored(n=30)
    second = s.argsort(1)[:, -2]
    found = minimize_scalar(
        lambda b: plain_loss(s, y, np.exp(b)) + plain_loss(s, second, np.exp(b)) / 60,
        bounds=(-9, 9), method="bounded",
    )  # fmt: skip
    assert best_temperature(*loss_curves(s, y), len(y)) == pytest.approx(np.exp(-found.x), rel=0.01)


def test_rows_that_are_all_right_do_not_make_it_certain():
    """L falls for ever; the half row of the runner-up says how far that is to be believed."""
    s = torch.full((20, 3), 0.0)
    y = torch.arange(20) % 3
    s[torch.arange(20), y] = 1.0
    T = best_temperature(*loss_curves(s, y), 20)
    p = log_probabilities(s, T).exp().amax(1)
    # 20 rows right and half a row of another class, of which there are two with equal probabilities (1 - p) / 2
    np.testing.assert_allclose(p, 20 / 20.5, rtol=1e-3)


def test_a_single_class_says_nothing_of_temperatures():
    assert best_temperature(*loss_curves(torch.randn(5, 1), torch.zeros(5, dtype=torch.long)), 5) == 1.0


def test_probabilities_keep_the_order_of_scores():
    s = torch.tensor([[3.0, 1.0, 2.0]])
    p = log_probabilities(s, 4.0).exp()
    np.testing.assert_allclose(p.numpy(), torch.softmax(s.double() / 4, 1).numpy())
    assert p.dtype == torch.float64
    assert p.argsort(1).tolist() == s.argsort(1).tolist()

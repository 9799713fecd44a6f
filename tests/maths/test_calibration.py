"""Temperature scaling against a minimiser of the plain loss, and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cairn.maths.calibration import (
    INVERSE_TEMPERATURES,
    best_temperature,
    evened,
    least_loss,
    log_probabilities,
    loss_curve,
)


def scored(n=400, k=7, sharpness=1.0, seed=0):
    """Scores whose softmax at T = sharpness gives the very probabilities that labels were drawn from."""
    rng = np.random.default_rng(seed)
    logits = 2.5 * rng.normal(size=(n, k)) @ (np.eye(k) + 0.4 * rng.normal(size=(k, k)))
    p = np.exp(log_softmax(logits, axis=1))
    labels = np.array([rng.choice(k, p=row) for row in p])
    return torch.from_numpy(sharpness * logits), torch.from_numpy(labels)


def plain_loss(s, y, b, q=0.0):
    total = 0.0
    for row, label in zip(s.numpy(), y.tolist(), strict=True):
        total -= log_softmax(b * row / (row.max() - row.mean()) ** q)[label]
    return total


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_the_curve_is_the_loss_at_each_temperature(q):
    s, y = scored(n=20)
    L = loss_curve(s, y, q)
    for i in (0, 57, 80, 100, 160):
        assert L[i].item() == pytest.approx(plain_loss(s, y, INVERSE_TEMPERATURES[i].item(), q), rel=1e-9)


def test_curves_of_parts_add_up():
    s, y = scored(n=50)
    torch.testing.assert_close(loss_curve(s, y), loss_curve(s[:13], y[:13]) + loss_curve(s[13:], y[13:]))


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 37.0])
def test_temperature_is_that_of_the_smallest_loss(sharpness):
    s, y = scored(sharpness=sharpness)
    found = minimize_scalar(lambda b: plain_loss(s, y, np.exp(b)), bounds=(-9, 9), method="bounded")
    assert best_temperature(loss_curve(s, y)) == pytest.approx(np.exp(-found.x), rel=0.01)


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 37.0])
def test_temperature_finds_the_truth_that_labels_were_drawn_from(sharpness):
    s, y = scored(n=4000, sharpness=sharpness)
    assert best_temperature(loss_curve(s, y)) == pytest.approx(sharpness, rel=0.05)


def test_rows_that_are_all_right_ask_for_the_end_of_the_grid():
    s, y = torch.zeros(20, 3), torch.arange(20) % 3
    s[torch.arange(20), y] = 1e-4
    assert best_temperature(loss_curve(s, y)) == pytest.approx(1e-4)


@pytest.mark.parametrize("n", [1, 5, 200])
def test_rows_that_are_all_right_are_as_sure_as_so_many_successes(n):
    """Two classes at a margin of 3: the bound is met where sigmoid(3 / T) = (n + 1) / (n + 2)."""
    s, y = torch.zeros(n, 2), torch.arange(n) % 2
    s[torch.arange(n), y] = 3.0
    T = best_temperature(loss_curve(s, y), least_loss(n))
    assert torch.sigmoid(torch.tensor(3 / T)).item() == pytest.approx((n + 1) / (n + 2), rel=0.002)


def test_the_bound_is_of_no_account_where_some_are_wrong():
    s, y = torch.zeros(10, 2), torch.arange(10) % 2
    s[torch.arange(10), y] = 3.0
    y[0] = 1 - y[0]
    assert best_temperature(loss_curve(s, y), least_loss(10)) == best_temperature(loss_curve(s, y))


def test_a_single_class_says_nothing_of_temperatures():
    assert best_temperature(loss_curve(torch.randn(5, 1), torch.zeros(5, dtype=torch.long))) == 1.0


def test_probabilities_keep_the_order_of_scores():
    s = torch.tensor([[3.0, 1.0, 2.0]])
    for q in (0.0, 0.5, 1.0):  # 3 stands out by 1
        p = log_probabilities(s, 4.0, q).exp()
        np.testing.assert_allclose(p.numpy(), torch.softmax(s.double() / 4, 1).numpy())
        assert p.dtype == torch.float64
        assert p.argsort(1).tolist() == s.argsort(1).tolist()


@pytest.mark.parametrize("q", [0.5, 1.0])
def test_rows_that_stand_out_more_are_not_surer_in_proportion(q):
    s = torch.tensor([[3.0, 1.0, 2.0], [-7.0, 5.0, -1.0]])
    np.testing.assert_allclose(evened(9 * s + 4, q).numpy(), 9 ** (1 - q) * evened(s, q).numpy())
    assert evened(s, q)[1].tolist() == pytest.approx([-12 / 6**q, 0, -6 / 6**q])


def test_rows_without_a_best_class_are_even():
    assert log_probabilities(torch.full((2, 4), 3.0), 0.1, 0.5).exp().tolist() == [[0.25] * 4] * 2
    assert log_probabilities(torch.tensor([[3.0]]), 0.1, 0.5).tolist() == [[0.0]]


@pytest.mark.parametrize("q", [0.25, 0.5])
def test_temperature_finds_the_truth_of_rows_that_stand_out_unequally(q):
    """Labels are drawn from softmax(s / m^q / T) of rows whose scale goes from 1 to 50."""
    rng = torch.Generator().manual_seed(0)
    s = torch.randn(4000, 7, generator=rng, dtype=torch.float64) * torch.linspace(1, 50, 4000)[:, None]
    p = torch.softmax(s / (s.amax(1) - s.mean(1))[:, None] ** q / 1.7, 1)
    y = torch.multinomial(p, 1, generator=rng)[:, 0]
    assert best_temperature(loss_curve(s, y, q)) == pytest.approx(1.7, rel=0.05)
    torch.testing.assert_close(log_probabilities(s, 1.7, q).exp(), p)

"""Tails of distributions against scipy; Dempster's test against its formula, by rates, and where it must find a shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cairn.maths.mean_shift import OF_ONE_CLASS, directions, mean_shift
from cairn.maths.tails import beta_binomial_tail, f_tail, incomplete_beta


@pytest.mark.parametrize("a", [0.5, 1.0, 3.7, 40.0, 900.5])
@pytest.mark.parametrize("b", [0.5, 2.0, 11.3, 5000.0])
def test_tails_are_scipys(a, b):
    for x in (1e-6, 0.01, 0.3, 0.5, 0.9, 0.999):
        np.testing.assert_allclose(incomplete_beta(x, a, b), stats.beta.cdf(x, a, b), rtol=1e-8, atol=1e-300)
    for f in (0.0, 0.1, 0.8, 1.0, 1.3, 4.0):
        np.testing.assert_allclose(f_tail(f, a, b), stats.f.sf(f, a, b), rtol=1e-7, atol=1e-200)
    assert (incomplete_beta(0.0, a, b), incomplete_beta(1.0, a, b)) == (0, 1)


@pytest.mark.parametrize(("n", "a", "b"), [(1, 1.0, 1.0), (20, 3.0, 50.0), (400, 13.0, 244.0), (5000, 2.4, 31.5)])
def test_the_beta_binomial_tail_is_scipys(n, a, b):
    for k in sorted({0, 1, n // 20, n // 3, n}):
        np.testing.assert_allclose(
            beta_binomial_tail(k, n, a, b), stats.betabinom.sf(k - 1, n, a, b), rtol=1e-7, atol=1e-11
        )


def rows(seed, n, d=12, shift=0.0):
    """Correlated and unequally wide in different directions."""
    rng = np.random.default_rng(seed)
    L = np.tril(np.random.default_rng(0).normal(size=(d, d))) * np.linspace(0.3, 2, d)[:, None] + np.eye(d)
    return torch.tensor(rng.normal(size=(n, d)) @ L.T + shift * L[:, 0]), torch.tensor(L)


def test_the_formula():
    (y, L), m = rows(3, 9), torch.linspace(-1, 1, 12).double()
    found = mean_shift(y, m, 40, L, 7.5)
    W = (L @ L.T).numpy()
    gap = (y.mean(0) - m).numpy()
    square = gap @ np.linalg.solve(W, gap)
    centred = (y - y.mean(0)).numpy()
    s2 = sum(r @ np.linalg.solve(W, r) for r in centred) / 8
    assert found.shift == pytest.approx(square**0.5)
    assert found.by_chance == pytest.approx((s2 * (1 / 9 + 1 / 40)) ** 0.5)
    assert found.p == pytest.approx(stats.f.sf(square / (s2 * (1 / 9 + 1 / 40)), 7.5, 7.5 * 8))


def test_directions_are_those_of_equal_variance():
    """Of a pooled covariance with as many equal variances h is their number times the quarter, whatever chance added."""
    rng, d, N = np.random.default_rng(1), 30, 300
    x = torch.tensor(rng.normal(size=(N, d)))
    assert directions(x.T @ x, N, torch.eye(d).double()) == pytest.approx(OF_ONE_CLASS * d, rel=0.05)
    # whitened by its own root nothing is left of what made them unequal
    _, L = rows(0, 1)
    T = N * L @ L.T
    assert directions(T, 10**9, L * 1.0) == pytest.approx(max(1.0, OF_ONE_CLASS * 12))


@pytest.mark.parametrize("n", [5, 40])
def test_it_finds_no_shift_where_there_is_none_and_one_where_there_is(n):
    """Rows of a Gaussian whiten to equal directions: the test with all of them is exact; with a quarter it finds fewer."""
    p, few, moved = [], [], []
    for seed in range(300):
        learned, L = rows(10_000 + seed, 30)
        y, _ = rows(seed, n)
        p.append(mean_shift(y, learned.mean(0), 30, L, 12.0).p)
        few.append(mean_shift(y, learned.mean(0), 30, L, OF_ONE_CLASS * 12).p)
        moved.append(mean_shift(rows(seed, n, shift=6.0)[0], learned.mean(0), 30, L, OF_ONE_CLASS * 12).p)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(few) < 0.05) < np.mean(np.array(p) < 0.05) + 0.01
    assert np.mean(np.array(moved) < 0.01) > 0.9


def test_classes_of_one_row_each_do_not_scatter():
    assert directions(torch.zeros(4, 4).double(), 1, torch.eye(4).double()) == 1

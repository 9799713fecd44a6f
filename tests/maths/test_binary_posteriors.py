"""Probabilities of several classes by themselves, against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from cairn.maths.binary_posteriors import (
    OFFSET,
    WIDE,
    Decisions,
    best_threshold,
    log_odds,
    weighted_average_precision,
)


@pytest.fixture
def told():
    """Decisions on four classes of unequal frequency; scores of the rare ones lie lower."""
    rng = np.random.default_rng(0)
    classes = rng.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05])
    shown = rng.random(600) < np.array([0.6, 0.3, 0.1, 0.05])[classes]
    values = 3 * shown + rng.normal(size=600) * 2.5 - classes
    weights = rng.uniform(0.5, 3, 600)
    parts = (values, shown.astype(float), weights)
    return Decisions(torch.from_numpy(classes), *(torch.from_numpy(part) for part in parts))


def test_slope_and_offsets_minimise_what_the_equation_says(told):
    c, (v, y, w) = told.classes.numpy(), (part.numpy() for part in told[1:])
    s, yes, no = v.std(), (w * y).sum(), (w * (1 - y)).sum()
    smooth = np.where(y > 0, (yes + 1) / (yes + 2), 1 / (no + 2))

    def loss(x):
        z = x[0] * v / s + x[1] + x[2:][c]
        data = w * (smooth * np.logaddexp(0, -z) + (1 - smooth) * np.logaddexp(0, z))
        return data.sum() + (x[2:] ** 2).sum() / (2 * OFFSET**2) + (x[:2] ** 2).sum() / (2 * WIDE**2)

    naive = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-8}).x
    found = log_odds(told, 4)
    assert found.slope == pytest.approx(naive[0] / s, rel=1e-5)
    np.testing.assert_allclose(found.offsets, naive[1] + naive[2:], atol=1e-4)


def test_of_one_class_with_many_images_it_is_a_logistic_regression():
    rng = np.random.default_rng(1)
    v = rng.normal(size=20_000) * 3
    y = rng.random(20_000) < 1 / (1 + np.exp(-(0.7 * v - 1)))
    of_one = Decisions(
        torch.zeros(20_000, dtype=torch.int64), torch.from_numpy(v), torch.from_numpy(y * 1.0), torch.ones(20_000)
    )
    theirs = LogisticRegression(C=np.inf).fit(v[:, None], y)
    found = log_odds(of_one, 1)
    assert found.slope == pytest.approx(theirs.coef_[0, 0], rel=2e-3)
    assert float(found.offsets[0]) == pytest.approx(theirs.intercept_[0], abs=2e-3)


def test_scores_that_part_classes_and_scores_that_mislead_give_finite_odds(told):
    parted = told._replace(values=told.shown * 10)
    assert 0 < log_odds(parted, 4).slope < 10
    misled = log_odds(told._replace(values=-told.values), 4)
    assert 0 < misled.slope < 1e-2
    assert bool(misled.offsets.isfinite().all())
    nothing = Decisions(*(part[:0] for part in told))
    assert log_odds(nothing, 3).offsets.tolist() == [0, 0, 0]
    assert len(log_odds(told, 6).offsets) == 6  # of classes that nothing tells of


def test_the_threshold_has_the_largest_f1_of_all():
    rng = np.random.default_rng(2)
    for n in (1, 5, 80):
        p, y = rng.random(n).round(1), rng.random(n) < 0.4
        y[0] = True
        t, f1 = best_threshold(torch.from_numpy(p), torch.from_numpy(y * 1.0), torch.ones(n))
        best = max(f1_score(y, p >= other) for other in [*p, 0.0])
        assert f1 == pytest.approx(best)
        assert f1_score(y, p >= t) == pytest.approx(best)
    assert best_threshold(torch.rand(3), torch.zeros(3), torch.ones(3)) == (0.5, 0.0)


def test_weighted_average_precision_is_scikit_learns():
    rng = np.random.default_rng(3)
    v, y, w = rng.normal(size=60).round(1), rng.random(60) < 0.3, rng.integers(1, 4, 60)
    found = weighted_average_precision(torch.from_numpy(v), torch.from_numpy(y * 1.0), torch.from_numpy(w * 1.0))
    assert found == pytest.approx(average_precision_score(np.repeat(y, w), np.repeat(v, w)), abs=1e-12)
    assert weighted_average_precision(torch.rand(3), torch.zeros(3), torch.ones(3)) is None

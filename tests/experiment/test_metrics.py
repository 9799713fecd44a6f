"""The metrics on a table small enough for paper and pencil."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import log_loss

from cairn.experiment.metrics import (
    any_time,
    average_incremental,
    backward_transfer,
    forgetting,
    mean_and_deviation,
    mean_of_known,
    seen_accuracy,
)
from cairn.maths.calibration_error import (
    MOST_EXACTLY,
    calibration_error,
    calibration_error_by_chance,
    negative_log_likelihood,
)
from cairn.maths.frequency import by_frequency

A = [
    [0.9, None, None],
    [0.7, 0.8, None],
    [0.6, 0.9, 0.5],
]
SIZES = [10, 30, 10]


def test_seen_accuracy_weighs_tasks_by_their_test_images():
    # after task 1: (10 * .7 + 30 * .8) / 40 = 31 / 40; after task 2: (6 + 27 + 5) / 50
    assert seen_accuracy(A, SIZES) == pytest.approx([0.9, 0.775, 0.76])


def test_head_medium_and_tail():
    found = by_frequency([0.9, 0.5, 0.7, 0.2, 0.1], [100, 99, 20, 19, 1])
    assert found.means == pytest.approx({"head": 0.9, "medium": 0.6, "tail": 0.15})
    assert not found.terciles


def test_groups_are_thirds_where_one_of_them_would_be_empty():
    found = by_frequency([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [6, 50, 6, 50, 30, 12])
    assert found.means == pytest.approx({"head": 0.3, "medium": 0.55, "tail": 0.2})
    assert found.terciles


def test_no_groups_of_classes_that_have_as_many_images():
    assert by_frequency([0.9, 0.1, 0.4], [16, 16, 16]) is None
    assert by_frequency([0.9, 0.1], [16, 2]) is None


def test_any_time_accuracy_is_the_area_under_a_curve_of_steps():
    curve, images = [0.5, 0.8, 0.2], [30, 10, 5]
    steps = [a for a, m in zip(curve, images, strict=True) for _ in range(m)]
    assert any_time(curve, images) == pytest.approx(sum(steps) / 45)
    assert any_time([0.4, 0.6], [7, 7]) == pytest.approx(0.5)


def test_average_incremental():
    assert average_incremental([0.9, 0.775, 0.76]) == pytest.approx(2.435 / 3)


def test_forgetting_is_from_the_best_before_the_last_task():
    # task 0: max(.9, .7) - .6 = .3; task 1: .8 - .9 = -.1
    assert forgetting(A) == pytest.approx(0.1)


def test_backward_transfer_is_from_the_task_s_own_row():
    # task 0: .6 - .9 = -.3; task 1: .9 - .8 = .1
    assert backward_transfer(A) == pytest.approx(-0.1)


def test_forgetting_sees_a_peak_that_backward_transfer_does_not():
    table = [[0.5, None, None], [0.9, 0.8, None], [0.5, 0.8, 0.7]]
    assert forgetting(table) == pytest.approx(0.2)
    assert backward_transfer(table) == pytest.approx(0.0)


def test_one_task_has_neither():
    assert forgetting([[0.9]]) is None
    assert backward_transfer([[0.9]]) is None


def test_a_mean_over_classes_ignores_how_many_images_a_class_has_and_classes_of_which_nothing_is_known():
    assert mean_of_known([1 / 1, 30 / 60]) == pytest.approx(0.75)
    assert mean_of_known([1.0, None, 0.5]) == pytest.approx(0.75)


def test_deviation_is_the_sample_s():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert mean_and_deviation([0.4]) == (0.4, 0.0)


def test_calibration_error_by_hand():
    # bins of a fifth: (.6, .8] holds .65 and .75, one of them right: |.70 - .5|; (.8, 1] holds .9, .95, 1, all right: .05
    error = calibration_error([0.65, 0.75, 0.9, 0.95, 1.0], [True, False, True, True, True], bins=5)
    assert error == pytest.approx((2 * 0.2 + 3 * 0.05) / 5)


def test_a_confidence_on_the_edge_is_in_the_bin_below():
    # .4 and .2 share no bin with .41; each of the first two is wrong by itself
    assert calibration_error([0.4, 0.41], [True, False], bins=5) == pytest.approx((0.6 + 0.41) / 2)
    assert calibration_error([0.2, 0.4], [True, False], bins=5) == pytest.approx((0.8 + 0.4) / 2)
    assert calibration_error([0.0, 0.1], [False, True], bins=5) == pytest.approx(abs(0.1 - 1) / 2)


def test_calibration_error_against_the_plain_formula():
    rng = np.random.default_rng(3)
    p, right = rng.beta(5, 2, 500), rng.random(500) < 0.6
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (p > low) & (p <= high)
        if inside.any():
            error += inside.mean() * abs(p[inside].mean() - right[inside].mean())
    assert calibration_error(p.tolist(), right.tolist()) == pytest.approx(error)


def test_negative_log_likelihood_is_scikit_learns_log_loss():
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(5), 60)
    y = rng.integers(0, 5, 60)
    found = negative_log_likelihood(np.log(p[np.arange(60), y]).tolist())
    assert found == pytest.approx(log_loss(y, p, labels=range(5)))


@pytest.mark.parametrize(("n", "draws"), [(3, 4000), (40, 2000), (3 * MOST_EXACTLY, 200)])
def test_chance_alone_makes_the_calibration_error_that_drawing_makes(n, draws):
    """Images are classified correctly with the probabilities that are stated, few of them even and many near 1."""
    rng = np.random.default_rng(n)
    p = 1 - rng.beta(0.4, 2, n)
    drawn = [calibration_error(p.tolist(), (rng.random(n) < p).tolist()) for _ in range(draws)]
    assert calibration_error_by_chance(p.tolist()) == pytest.approx(np.mean(drawn), rel=0.05)


def test_chance_has_no_part_where_everything_is_certain():
    assert calibration_error_by_chance([1.0] * 5) == 0.0
    assert calibration_error_by_chance([0.5]) == 0.5

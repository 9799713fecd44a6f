"""Average precision against scikit-learn, ties and empty classes included."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from cairn.maths.average_precision import average_precision


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_scikit_learns(ties):
    rng = np.random.default_rng(3)
    targets = rng.random((60, 7)) < [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    targets[0, 0] = True
    scores = rng.normal(size=(60, 7)) + targets
    if ties:
        scores = scores.round(0)
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    expected = [average_precision_score(targets[:, c], scores[:, c]) for c in range(7)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    scores, shows = torch.tensor([[4.0], [3.0], [2.0], [1.0]]), torch.tensor([[True], [False], [True], [False]])
    assert average_precision(scores, shows) == [pytest.approx(0.5 * 1 + 0.5 * 2 / 3)]


def test_a_class_that_no_image_shows_has_none():
    assert average_precision(torch.rand(5, 2), torch.tensor([[False, True]] * 5)) == [None, 1.0]
    assert average_precision(torch.empty(0, 2), torch.empty(0, 2, dtype=torch.bool)) == [None, None]

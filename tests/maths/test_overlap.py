"""Intersection over union against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from cairn.maths.overlap import confusion, overlaps


def regions(n=500, classes=5):
    """What pixels show, unequal in number, and what they are taken for; class 3 is shown by none."""
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 4], size=n, p=[0.7, 0.2, 0.06, 0.04])
    return truth, np.where(rng.random(n) < 0.3, rng.integers(classes, size=n), truth)


def test_counts_and_overlaps_are_those_of_scikit_learn():
    truth, found = regions()
    counts = confusion(torch.as_tensor(truth), torch.as_tensor(found), 5)
    assert counts.tolist() == confusion_matrix(truth, found, labels=range(5)).tolist()
    wanted = jaccard_score(truth, found, labels=range(5), average=None, zero_division=0)
    got = overlaps(counts)
    assert got[3] is None
    for c in (0, 1, 2, 4):
        assert got[c] == pytest.approx(wanted[c])


def test_counts_add_up():
    truth, found = (torch.as_tensor(part) for part in regions())
    parts = [confusion(t, f, 5) for t, f in zip(truth.split(99), found.split(99), strict=True)]
    assert torch.equal(sum(parts), confusion(truth, found, 5))


def test_all_right_is_one():
    truth = torch.tensor([0, 0, 1, 2])
    assert overlaps(confusion(truth, truth, 4)) == [1, 1, 1, None]

"""F1 against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from cairn.maths.f1 import f1_by_class, macro_f1, micro_f1


def test_it_is_scikit_learns():
    rng = np.random.default_rng(3)
    for share in (0.1, 0.5):
        shown, said = rng.random((40, 7)) < share, rng.random((40, 7)) < share
        shown[0], said[:, 2] = True, False
        both = torch.from_numpy(said), torch.from_numpy(shown)
        expected = f1_score(shown, said, average=None, zero_division=0)
        assert f1_by_class(*both) == pytest.approx(expected.tolist(), abs=1e-12)
        for kind, found in (("macro", macro_f1(*both)), ("micro", micro_f1(*both))):
            assert found == pytest.approx(f1_score(shown, said, average=kind, zero_division=0), abs=1e-12)


def test_a_class_that_no_image_shows_is_left_out_of_the_mean():
    said, shown = torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [True, False]])
    assert f1_by_class(said, shown) == [2 / 3, None]
    assert macro_f1(said, shown) == 2 / 3
    assert micro_f1(said, shown) == 2 / 4
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    assert (macro_f1(nothing, nothing), micro_f1(nothing, nothing)) == (None, None)

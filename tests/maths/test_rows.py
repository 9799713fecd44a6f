"""Rows and columns of classes that go."""

from __future__ import annotations

import pytest
import torch

from cairn.maths.rows import without


@pytest.mark.parametrize("c", [0, 2, 3, 7])
def test_one_row_or_column_goes_and_the_rest_stays_in_order(c):
    x = torch.arange(16).view(4, 4)
    rows = [i for i in range(4) if i != c]
    assert without(x, c).tolist() == [x[i].tolist() for i in rows]
    assert without(x, c, 1).tolist() == [[row[i] for i in rows] for row in x.tolist()]
    assert without(x, c, 1).is_contiguous()
    assert without(x[:0], c).shape == (0, 4)

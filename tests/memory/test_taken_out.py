"""Rows are taken out of sums, and classes joined: what is left is what was never otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cairn.errors import DataError
from cairn.maths.ridge import one_hot, recursive_ridge, reduced_ridge
from cairn.memory.covariances import Diagonal, Full, LowRank, Shared
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.gram import Gram
from cairn.memory.means import ClassMeans
from cairn.memory.scatter import ScatterMemory
from cairn.memory.second_order import SecondOrder

D, COUNTS = 10, (14, 3, 25, 8)


def world(seed=0, counts=COUNTS, dtype=torch.float64):
    """Clustered anisotropic unit rows, unequal in number, in random order, and which of them are taken out."""
    rng = torch.Generator().manual_seed(seed)
    x, y = [], []
    for c, n in enumerate(counts):
        L = torch.randn(D, D, generator=rng, dtype=torch.float64) * torch.logspace(0, -1.5, D, dtype=torch.float64)
        x.append(
            2 * torch.randn(D, generator=rng, dtype=torch.float64) + torch.randn(n, D, generator=rng).double() @ L.T
        )
        y += [c] * n
    order = torch.randperm(len(y), generator=rng)
    x, y = torch.nn.functional.normalize(torch.cat(x)[order]).to(dtype), torch.tensor(y)[order]
    out = torch.zeros(len(y), dtype=torch.bool)
    for c, n in enumerate((5, 2, 10, 8)):  # of the second all but one, of the last all
        out[(y == c).nonzero()[:n, 0]] = True
    return x, y, out


def joined(y, c, other):
    """Labels with class `other` as c, and later ones one lower."""
    y = torch.where(y == other, c, y)
    return y - (y > other).long()


@pytest.mark.parametrize("seed", range(3))
def test_scatter_without_rows_and_merged(seed):
    x, y, out = world(seed)
    empty = ScatterMemory(D, precision="float64")
    half = len(y) // 2
    order = torch.cat([(y == c).nonzero()[:1, 0] for c in range(len(COUNTS))])
    learned = empty.add(x[order], y[order])
    rest = torch.tensor(np.setdiff1d(np.arange(len(y)), order.numpy()))
    for part in rest.split(half):
        learned = learned.add(x[part], y[part]).stored()
    left = learned.without_rows(x[out], y[out])
    assert left.counts.tolist() == [9, 1, 15, 0]
    assert [len(F) for F in left.statistics.factors] == [8, 0, 10, 0]
    right = empty.add(x[~out], y[~out])
    for c in range(3):
        torch.testing.assert_close(left.means[c], right.means[c], rtol=0, atol=1e-12)
        found, wanted = (memory.statistics.factors[c] for memory in (left, right))
        torch.testing.assert_close(found.T @ found, wanted.T @ wanted, rtol=0, atol=1e-10)
    again = left.without(3).add(x[out & (y < 3)], y[out & (y < 3)])
    torch.testing.assert_close(again.scatter, learned.without(3).scatter, rtol=0, atol=1e-10)
    for c, other in ((0, 1), (1, 3), (0, 2)):
        found, wanted = learned.merged(c, other).statistics, empty.add(x, joined(y, c, other)).statistics
        torch.testing.assert_close(found.means, wanted.means, rtol=0, atol=1e-10)
        assert found.counts.tolist() == wanted.counts.tolist()
        for mine, theirs in zip(found.factors, wanted.factors, strict=True):
            torch.testing.assert_close(mine.T @ mine, theirs.T @ theirs, rtol=0, atol=1e-10)
    with pytest.raises(DataError, match="cannot be taken out"):
        learned.without_rows(torch.nn.functional.normalize(5 - x[out]), y[out])
    with pytest.raises(DataError, match="4 rows to take out of 3"):
        learned.without_rows(x[:4], torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_scatter_that_was_cut_keeps_the_sum_of_all_classes(precision):
    """To rounding of factors and rest; of a class alone, an error of no more than what was cut off and taken out."""
    x, y, out = world(1)
    learned = ScatterMemory(D, 4, precision).add(x, y).stored()
    left, right = learned.without_rows(x[out], y[out]), ScatterMemory(D, 4, precision).add(x[~out], y[~out]).stored()
    scale = learned.scatter.norm()
    assert (left.scatter - right.scatter).norm() < {"float16": 2e-3, "float32": 1e-6}[precision] * scale
    assert (left.statistics.cut >= 0).all()
    assert left.statistics.cut[[1, 3]].tolist() == [0, 0]
    for c in (0, 2):
        exact = (own := x[~out & (y == c)].double() - right.means[c]).T @ own
        found = left.statistics.factors[c].T @ left.statistics.factors[c]
        lost = float(learned.statistics.cut[c]) + 2e-3 * float(exact.trace())
        assert torch.linalg.matrix_norm(found - exact, 2) <= lost
        trace = found.trace() + left.statistics.cut[c]
        assert abs(trace - exact.trace()) <= lost


@pytest.mark.parametrize("kind", [Full(), Shared(), Diagonal()], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("seed", range(3))
def test_gaussians_without_rows_and_merged(kind, seed):
    """To rounding of float32."""
    x, y, out = world(seed)
    learned = GaussianMemory(D, covariance=kind).add(x, y)
    left = learned.without_rows(x[out], y[out]).without(3)
    right = GaussianMemory(D, covariance=kind).add(x[~out], y[~out])
    assert left.counts.tolist() == right.counts.tolist() == [9, 1, 15]
    torch.testing.assert_close(left.means, right.means, rtol=0, atol=2e-7)
    for name, value in left.state_dict().items():
        torch.testing.assert_close(value, right.state_dict()[name], rtol=0, atol=2e-7)
    for c in range(3):
        torch.testing.assert_close(left.covariance(c), right.covariance(c), rtol=0, atol=2e-7)
    for c, other in ((0, 1), (1, 3), (0, 2)):
        found, wanted = learned.merged(c, other), GaussianMemory(D, covariance=kind).add(x, joined(y, c, other))
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, wanted.state_dict()[name], rtol=0, atol=1e-7)
    with pytest.raises(DataError, match=r"not learned|to take out of 3"):
        learned.without_rows(20 * torch.cat([x[:4], -x[:4]]), torch.tensor([0] * 8))


def test_low_rank_gaussians_are_refused():
    x, y, out = world()
    learned = GaussianMemory(D, covariance=LowRank(rank=3)).add(x, y)
    for change in (lambda: learned.without_rows(x[out], y[out]), lambda: learned.merged(0, 1)):
        with pytest.raises(ValueError, match="low_rank"):
            change()


def test_means_without_rows_and_merged():
    x, y, out = world(dtype=torch.float32)
    learned = ClassMeans.empty(D).add(x, y)
    left, right = learned.without_rows(x[out], y[out]).without(3), ClassMeans.empty(D).add(x[~out], y[~out])
    assert left.counts.tolist() == right.counts.tolist()
    torch.testing.assert_close(left.means, right.means, rtol=0, atol=5e-7)
    found, wanted = learned.merged(1, 2), ClassMeans.empty(D).add(x, joined(y, 1, 2))
    torch.testing.assert_close(found.means, wanted.means, rtol=0, atol=2e-7)
    assert found.counts.tolist() == wanted.counts.tolist() == [14, 28, 8]


def test_a_recursive_ridge_without_rows():
    x, y, out = world()
    Y = one_hot(y, 4)
    empty = torch.eye(D, dtype=torch.float64) / 0.3, torch.zeros(D, 0, dtype=torch.float64)
    found, wanted = (
        reduced_ridge(*recursive_ridge(*empty, x, Y), x[out], Y[out]),
        recursive_ridge(*empty, x[~out], Y[~out]),
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="were not learned"):
        reduced_ridge(*recursive_ridge(*empty, x, Y), 100 * x[out], Y[out])


def test_normal_equations_without_rows_and_merged():
    x, y, out = world()
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        learned = Gram.empty(D, dtype).joined(x, one_hot(y, 4))
        assert learned.G.dtype == Gram.from_state(learned.state_dict()).G.dtype == dtype
        for found, wanted in (
            (learned.without_rows(x[out], one_hot(y[out], 4)), Gram.empty(D).joined(x[~out], one_hot(y[~out], 4))),
            (learned.merged(0, 2), Gram.empty(D).joined(x, one_hot(joined(y, 0, 2), 3))),
        ):
            torch.testing.assert_close(found.G.double(), wanted.G.double(), rtol=0, atol=max(atol, 1e-5))
            torch.testing.assert_close(found.C.double(), wanted.C.double(), rtol=0, atol=max(atol, 1e-5))
    exact = x[~out].T @ x[~out]
    found = Gram.empty(D, torch.float64).joined(x, one_hot(y, 4)).without_rows(x[out], one_hot(y[out], 4))
    torch.testing.assert_close(found.G, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [D, 30, 80], ids=["more rows than features", "as many", "fewer"])
def test_a_square_root_without_rows(width):
    """In several goes, also copies of one row; and in no more rows than are left."""
    x, y, out = world()
    V = torch.randn(D, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    H, Y = torch.relu(x @ V).float(), one_hot(y, 4).float()
    H = torch.cat([H, H[:2]])
    Y, out = torch.cat([Y, Y[:2]]), torch.cat([out, torch.tensor([True, False])])
    learned = SecondOrder.empty(width).joined(H, Y, torch.Generator().manual_seed(1))
    left = learned
    for rows in out.nonzero()[:, 0].split(9):
        left = left.without_rows(H[rows], Y[rows])
    h, target = H[~out].double(), Y[~out].double()
    R, Q = left.R.double(), left.D.double()
    scale = (H.double().T @ H.double()).norm()
    assert (R.T @ R - h.T @ h).norm() < 1e-5 * scale
    assert (R.T @ Q - h.T @ target).norm() < 1e-5 * scale
    assert len(left.R) <= min(width, len(h) + 2)  # copies span no more
    right = SecondOrder.empty(width).joined(H[~out], Y[~out])
    torch.testing.assert_close(left.solution(1.0), right.solution(1.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        learned.merged(0, 3).solution(1.0),
        SecondOrder.empty(width).joined(H, one_hot(joined(Y.argmax(1), 0, 3), 3).float()).solution(1.0),
        rtol=0,
        atol=1e-4,
    )
    if width > D:  # else any few rows may have been among so many
        with pytest.raises(DataError, match="were not learned"):
            learned.without_rows(torch.randn(3, width, generator=torch.Generator().manual_seed(6)), Y[:3])

"""Statistics of classes as factors: sums that do not depend on how images came, and classes that leave no trace."""

from __future__ import annotations

import pytest
import torch

from cairn.errors import DataError, NotFinite, ResultError
from cairn.maths.gaussian import AffineMap
from cairn.memory.scatter import ScatterMemory, principal_axes

D, COUNTS = 9, (20, 3, 1, 12)


def world(seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    mixing = torch.randn(D, D, generator=rng).double() * torch.logspace(0, -2, D).double()
    return 5 + torch.randn(4, D, generator=rng).double()[y] + torch.randn(len(y), D, generator=rng).double() @ mixing, y


def scatters(memory):
    return [F.T @ F for F in memory.statistics.factors]


def of_rows(x):
    return (x - x.mean(0)).T @ (x - x.mean(0))


@pytest.fixture
def exact():
    return ScatterMemory(D, rank=None, precision="float64")


def test_a_factor_holds_the_scatter(exact):
    x, y = world()
    memory = exact.add(x, y).stored()
    assert memory.counts.tolist() == list(COUNTS)
    for c, A in enumerate(scatters(memory)):
        torch.testing.assert_close(A, of_rows(x[y == c]), rtol=0, atol=1e-10)
        assert len(memory.statistics.factors[c]) <= min(D, COUNTS[c] - 1)
    torch.testing.assert_close(memory.means[0], x[y == 0].mean(0))
    torch.testing.assert_close(memory.scatter, sum(scatters(memory)))


def test_how_images_come_does_not_matter(exact):
    x, y = world()
    whole = exact.add(x, y).stored()
    first = torch.tensor([int((y == c).nonzero()[0]) for c in range(4)])
    memory = exact.add(x[first], y[first]).stored()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    rest = order[~torch.isin(order, first)]
    for some in rest.split(5):
        memory = memory.add(x[some], y[some]).stored()
    torch.testing.assert_close(memory.means, whole.means, rtol=0, atol=1e-10)
    for a, b in zip(scatters(memory), scatters(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_a_forgotten_class_was_never_learned(exact):
    x, y = world()
    without = exact.add(x, y).stored().without(1)
    kept = y != 1
    never = exact.add(x[kept], y[kept] - (y[kept] > 1).long()).stored()
    assert without.counts.tolist() == never.counts.tolist()
    torch.testing.assert_close(without.means, never.means, rtol=0, atol=1e-12)
    torch.testing.assert_close(without.scatter, never.scatter, rtol=0, atol=1e-8)


def test_what_is_cut_off_is_kept_in_sum(exact):
    x, y = world()
    whole, memory = exact.add(x, y), ScatterMemory(D, rank=2, precision="float32").add(x, y).stored()
    torch.testing.assert_close(memory.scatter, whole.scatter, rtol=0, atol=1e-4)
    A = of_rows(x[y == 0])
    values, axes = torch.linalg.eigh(A)
    kept = axes[:, -2:] @ torch.diag(values[-2:]) @ axes[:, -2:].T
    torch.testing.assert_close(scatters(memory)[0], kept, rtol=0, atol=1e-4)
    assert memory.statistics.cut[0].item() == pytest.approx((A.trace() - kept.trace()).item(), rel=1e-4)
    assert memory.statistics.cut[2] == 0  # one image has no scatter


def test_forgetting_takes_the_share_of_what_was_cut_off():
    x, y = world()
    memory = ScatterMemory(D, rank=2).add(x, y).stored()
    left = memory.without(0)
    expected = sum(F.T @ F for F in memory.statistics.factors[1:]).trace() + memory.statistics.cut[1:].sum()
    assert left.scatter.trace().item() == pytest.approx(expected.item(), rel=1e-5)
    only = ScatterMemory(D, rank=0).add(x[y == 0], y[y == 0]).stored().without(0)
    assert only.scatter.abs().max() == 0


def test_half_precision_is_close_and_half_the_bytes():
    x, y = world()
    memory = {p: ScatterMemory(D, precision=p).add(x, y).stored() for p in ("float16", "float32")}
    for a, b in zip(scatters(memory["float16"]), scatters(memory["float32"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    rows = sum(len(F) for F in memory["float32"].statistics.factors)
    assert memory["float32"].bytes - memory["float16"].bytes == 2 * D * rows


@pytest.mark.parametrize("rank", [None, 2])
def test_a_memory_is_what_its_state_says(rank):
    x, y = world()
    memory = ScatterMemory(D, rank=rank, precision="float16").add(x, y).stored()
    again = ScatterMemory(D, rank=rank, precision="float16").restored(memory.state_dict())
    assert torch.equal(again.scatter, memory.scatter)
    for name, tensor in memory.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    more = x[:6] + 1
    one, other = (m.add(more, y[:6]).stored().state_dict() for m in (memory, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_foreign_state_is_refused():
    x, y = world()
    state = ScatterMemory(D).add(x, y).stored().state_dict()
    with pytest.raises(ResultError, match="width 8"):
        ScatterMemory(8).restored(state)
    with pytest.raises(ResultError, match="statistics of width"):
        ScatterMemory(D).restored({"counts": state["counts"]})


def test_draws_have_the_moments_of_the_class():
    x, y = world()
    memory = ScatterMemory(D).add(x, y).stored()
    drawn, labels = memory.draw(40_000, torch.Generator().manual_seed(0), [0])
    (there,), _ = memory.draws(3, [torch.Generator()], [0], device=torch.device("meta"))
    assert there.device.type == "meta"
    assert labels.unique().tolist() == [0]
    n, A = COUNTS[0], memory.scatter
    N = sum(m - 1 for m in COUNTS)
    rho = D / (N + D)
    S = (1 - rho) * A / N + rho * A.trace() / N / D * torch.eye(D).double()
    expected = (D * S + scatters(memory)[0]) / (D + n)
    torch.testing.assert_close(drawn.double().mean(0), memory.means[0], rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.double().T), expected, rtol=0.1, atol=0.05)


def test_moving_classes_is_moving_their_images():
    x, y = world()
    A = torch.randn(D, D, generator=torch.Generator().manual_seed(2)).double()
    b = torch.arange(D).double()
    moved = ScatterMemory(D, precision="float64").add(x, y).stored().moved(AffineMap(A, b))
    direct = ScatterMemory(D, precision="float64").add(x @ A.T + b, y).stored()
    torch.testing.assert_close(moved.means, direct.means)
    torch.testing.assert_close(moved.scatter, direct.scatter, rtol=0, atol=1e-8)


def test_axes_are_orthogonal_and_in_order():
    for n in (4, 30):
        rows = torch.randn(n, D, generator=torch.Generator().manual_seed(0)).double()
        F = principal_axes(rows)
        gram = F @ F.T
        torch.testing.assert_close(F.T @ F, rows.T @ rows)
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-9)
        assert (gram.diagonal().diff() <= 1e-9).all()
        # None of them is an image
        assert torch.cdist(F, rows).min() > 1e-3


def test_bad_rows_are_refused():
    x, y = world()
    with pytest.raises(DataError, match="leave no gap"):
        ScatterMemory(D).add(x, y + 1)
    with pytest.raises(DataError, match="width 4"):
        ScatterMemory(4).add(x, y)
    x[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="class 0"):
        ScatterMemory(D).add(x, y)

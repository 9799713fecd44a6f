"""Sums of squares as a square root, against the sums themselves, the batch solution and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from cairn.errors import ResultError
from cairn.maths.ridge import one_hot
from cairn.memory.second_order import SecondOrder


def clustered(n, m, k, seed=0):
    """Correlated, anisotropic rows around k far-off centres, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(m, m, generator=rng) * torch.logspace(0, -2, m)
    y = torch.arange(n) % k
    return (3 + torch.randn(k, m, generator=rng))[y] + torch.randn(n, m, generator=rng) @ mixing.T, y


def labels(y, k):
    return one_hot(y, k).float()


def batch_solution(H, Y, lam):
    """(G + lam I)^-1 C, as it is written."""
    H, Y = H.double(), Y.double()
    return torch.linalg.solve(H.T @ H + lam * torch.eye(H.shape[1], dtype=H.dtype), H.T @ Y)


@pytest.fixture(params=[(30, 50), (120, 50)], ids=["fewer rows than columns", "more"])
def tasks(request):
    """Three tasks of new classes, a row of an old class among the last one's."""
    n, m = request.param
    H, y = clustered(n, m, 6)
    y, order = y.sort(stable=True)
    y[-1] = 0
    return list(zip(H[order].split(n // 3), y.split(n // 3), strict=True))


def learned(tasks, rng=None):
    sums = SecondOrder.empty(tasks[0][0].shape[1])
    for t, (H, y) in enumerate(tasks):
        sums = sums.joined(H, labels(y, 2 * t + 2), rng)
    return sums


def everything(tasks):
    H, y = (torch.cat(column) for column in zip(*tasks, strict=True))
    return H, labels(y, 6)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("lam", [1e-2, 1.0, 1e3])
def test_the_solution_is_that_of_all_tasks_at_once(tasks, lam, rotated):
    sums = learned(tasks, torch.Generator().manual_seed(3) if rotated else None)
    H, Y = everything(tasks)
    assert len(sums.R) == min(H.shape)
    torch.testing.assert_close(sums.R.T @ sums.R, H.T @ H, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(sums.R.T @ sums.D, H.T @ Y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums.K, sums.R.double() @ sums.R.double().T)
    exact = batch_solution(H, Y, lam)
    torch.testing.assert_close(sums.solution(lam).double(), exact, rtol=1e-2, atol=1e-3 * exact.abs().max().item())
    judge = Ridge(alpha=lam, fit_intercept=False, solver="svd").fit(H.double().numpy(), Y.double().numpy())
    torch.testing.assert_close(
        H.double() @ sums.solution(lam).double(),
        H.double() @ torch.from_numpy(judge.coef_.T.copy()),
        rtol=1e-3,
        atol=1e-4,
    )


def test_products_of_earlier_rows_are_taken_to_the_bit():
    """A run that goes on from its files makes all of them anew and must not differ."""
    H, y = clustered(700, 800, 4)
    sums = SecondOrder.empty(800).joined(H[:300], labels(y[:300], 4))
    earlier = sums.K.clone()
    more = sums.joined(H[300:], labels(y[300:], 4))
    assert torch.equal(more.K, SecondOrder.from_state(more.state_dict()).K)
    assert torch.equal(sums.K, earlier)


def test_no_row_that_was_learned_is_kept():
    H, y = clustered(40, 60, 4)
    start = SecondOrder.empty(60)
    assert torch.cdist(start.joined(H, labels(y, 4)).R, H).amin() == 0
    kept = start.joined(H, labels(y, 4), torch.Generator().manual_seed(3)).R
    assert torch.cdist(kept, H).min() > 0.1 * H.norm(dim=1).mean()


def test_errors_are_those_of_the_solution_on_other_rows(tasks):
    sums, (H, Y) = learned(tasks), everything(tasks)
    V, v = clustered(40, 50, 6, seed=1)
    for lam in (1e-2, 1.0, 1e4):
        naive = ((V.double() @ batch_solution(H, Y, lam) - labels(v, 6).double()) ** 2).mean().item()
        assert sums.error(V, labels(v, 6), lam) == pytest.approx(naive, rel=1e-3)


def test_a_ridge_without_a_solution_has_no_error():
    H = torch.ones(4, 6)  # one direction alone
    sums = SecondOrder.empty(6).joined(H, torch.eye(4))
    assert math.isnan(sums.error(H, torch.eye(4), 1e-30))
    assert math.isfinite(sums.error(H, torch.eye(4), 1.0))


def test_in_single_precision_the_square_root_beats_the_sum_of_squares():
    """Singular values over five decades: squared they would be beyond float32."""
    H, y = clustered(60, 40, 4)
    U, _, V = torch.linalg.svd(H.double(), full_matrices=False)
    H, Y, lam = (U @ torch.diag(torch.logspace(0, -5, 40, dtype=torch.float64)) @ V).float(), labels(y, 4), 1e-9
    exact, G = batch_solution(H, Y, lam), (H.T @ H).double()
    by_sum = torch.linalg.solve(G + lam * torch.eye(40, dtype=torch.float64), (H.T @ Y).double())
    sums = SecondOrder.empty(40).joined(H, Y)
    assert (sums.solution(lam) - exact).norm() < 0.05 * (by_sum - exact).norm()


def test_of_a_triangle_half_is_stored_and_more_can_be_learned_from_it():
    H, y = clustered(90, 40, 4)
    sums = SecondOrder.empty(40).joined(H[:60], labels(y[:60], 4))
    state = sums.state_dict()
    assert state["R"].shape == (40 * 41 // 2,)
    assert sums.bytes == sum(tensor.nbytes for tensor in state.values())
    again = SecondOrder.from_state(state)
    assert torch.equal(again.R, sums.R)
    more = again.joined(H[60:], labels(y[60:], 4))
    exact = batch_solution(H, labels(y, 4), 1.0)
    torch.testing.assert_close(more.solution(1.0).double(), exact, rtol=1e-2, atol=1e-3 * exact.abs().max().item())
    former = SecondOrder.from_state({"R": sums.R, "D": sums.D})  # stored whole, as it once was
    assert torch.equal(former.solution(1.0), sums.solution(1.0))
    with pytest.raises(ResultError, match="with 819 numbers: no triangle has so many"):
        SecondOrder.from_state(state | {"R": state["R"][1:]})


def test_it_loses_a_class_and_comes_back_from_its_state(tasks):
    sums = learned(tasks)
    less = sums.without(2)
    torch.testing.assert_close(less.solution(1.0), torch.cat([sums.solution(1.0)[:, :2], sums.solution(1.0)[:, 3:]], 1))
    assert less.bytes == sums.bytes - 4 * len(sums.R)
    again = SecondOrder.from_state(sums.state_dict())
    torch.testing.assert_close(again.solution(1.0), sums.solution(1.0))

"""Ridge regression: the recursion against the batch solution; the square root is tested with the memory that holds it."""

from __future__ import annotations

import pytest
import torch

from cairn.maths.ridge import compressed, joined_to_triangle, one_hot, recursive_ridge, solved, squared


def clustered(n, m, k, seed=0, dtype=torch.float64):
    """Correlated, anisotropic rows around k far-off centres, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(m, m, generator=rng, dtype=dtype) * torch.logspace(0, -2, m, dtype=dtype)
    y = torch.arange(n) % k
    centres = 3 + torch.randn(k, m, generator=rng, dtype=dtype)
    return centres[y] + torch.randn(n, m, generator=rng, dtype=dtype) @ mixing.T, y


def batch_solution(H, Y, lam):
    """(G + lam I)^-1 C, as it is written."""
    return torch.linalg.solve(H.T @ H + lam * torch.eye(H.shape[1], dtype=H.dtype), H.T @ Y)


@pytest.fixture(params=[(30, 50), (120, 50)], ids=["fewer rows than columns", "more"])
def tasks(request):
    """Three tasks of new classes, a row of an old class among the last one's."""
    n, m = request.param
    H, y = clustered(n, m, 6)
    y, order = y.sort(stable=True)
    H = H[order]
    y[-1] = 0
    return [(H[y_ == 1], y[y_ == 1]) for y_ in [(torch.arange(n) // (n // 3) == t).long() for t in range(3)]]


def test_compression_keeps_both_sums():
    H, y = clustered(80, 20, 4)
    R, D = compressed(H, one_hot(y, 4))
    assert R.shape == (20, 20)
    torch.testing.assert_close(R.T @ R, H.T @ H)
    torch.testing.assert_close(R.T @ D, H.T @ one_hot(y, 4))


def test_what_has_no_solution_is_not_a_number():
    K = torch.ones(4, 4, dtype=torch.float64)  # one direction alone
    assert solved(K, torch.eye(4), 1e-30).isnan().all()
    torch.testing.assert_close(solved(K, torch.eye(4), 1.0), torch.linalg.inv(K + torch.eye(4)))


@pytest.mark.parametrize("lam", [1e-2, 1.0, 1e3])
def test_the_recursion_equals_the_batch_solution(tasks, lam):
    m = tasks[0][0].shape[1]
    P, W = torch.eye(m, dtype=torch.float64) / lam, torch.zeros(m, 0, dtype=torch.float64)
    for t, (H, y) in enumerate(tasks):
        P, W = recursive_ridge(P, W, H, one_hot(y, 2 * t + 2))
    H, y = (torch.cat(column) for column in zip(*tasks, strict=True))
    exact = batch_solution(H, one_hot(y, 6), lam)
    assert (W - exact).abs().max() < 1e-8
    torch.testing.assert_close(
        P, torch.linalg.inv(H.T @ H + lam * torch.eye(m, dtype=torch.float64)), rtol=1e-6, atol=1e-9
    )
    assert torch.equal(P, P.T)


def test_how_rows_are_spread_over_calls_is_immaterial():
    H, y = clustered(60, 30, 4)
    start = torch.eye(30, dtype=torch.float64), torch.zeros(30, 4, dtype=torch.float64)
    _, at_once = recursive_ridge(*start, H, one_hot(y, 4))
    P, W = start
    for h, label in zip(H, y, strict=True):
        P, W = recursive_ridge(P, W, h[None], one_hot(label[None], 4))
    assert (W - at_once).abs().max() < 1e-8


@pytest.mark.parametrize("rows", [1, 70, 400])
def test_rows_that_join_a_triangle_leave_one(rows):
    """300 columns are three panels, the last of them narrower."""
    rng = torch.Generator().manual_seed(1)
    mixing = torch.randn(300, 300, generator=rng, dtype=torch.float64) * torch.logspace(0, -2, 300)
    H = torch.randn(500 + rows, 300, generator=rng, dtype=torch.float64) @ mixing.T
    Y = one_hot(torch.arange(len(H)) % 4, 4)
    triangle, D = compressed(H[:500], Y[:500])
    R, D = joined_to_triangle(triangle, D, H[500:], Y[500:])
    assert R.shape == (300, 300)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R.T @ R, H.T @ H, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(R.T @ D, H.T @ Y, rtol=1e-10, atol=1e-8)
    whole = compressed(H, Y)[0]
    torch.testing.assert_close(R.abs(), whole.abs(), rtol=1e-8, atol=1e-8)  # the same but for signs


@pytest.mark.parametrize("m", [5, 700])
def test_the_square_of_a_triangle(m):
    R = torch.randn(m, m, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(squared(R[: m - 2]), R[: m - 2].double() @ R[: m - 2].double().T)
    R = R.triu()
    torch.testing.assert_close(squared(R, triangle=True), R.double() @ R.double().T)

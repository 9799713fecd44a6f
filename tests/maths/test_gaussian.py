from __future__ import annotations

import numpy as np
import pytest
import torch

from cairn.errors import NotFinite
from cairn.maths.gaussian import (
    AffineMap,
    Halved,
    cholesky_repaired,
    draw,
    leading,
    low_rank,
    low_rank_draw,
    merged,
    moments,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covariance(d: int, seed: int = 0) -> torch.Tensor:
    """Correlated and anisotropic: standard deviations from 1 down to 0.1, axes turned at random."""
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=rng(seed), dtype=torch.float64))
    return axes @ torch.logspace(0, -2, d, dtype=torch.float64).diag() @ axes.T


def distance(A: torch.Tensor, B: torch.Tensor) -> float:
    return float((A.double() - B).norm() / B.norm())


def test_moments_are_numpys():
    x = torch.randn(50, 4, generator=rng()) + 100
    m, S = moments(x)
    np.testing.assert_allclose(m, x.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(S, np.cov(x.double().numpy().T, bias=True), rtol=1e-12)
    assert m.dtype == S.dtype == torch.float64


@pytest.mark.parametrize("split", [1, 7, 39])
def test_merged_equals_the_moments_of_all_rows(split):
    x = torch.randn(40, 5, generator=rng(1), dtype=torch.float64) @ covariance(5).T + 1e4
    x[:split] += 2.0
    n, m, S = merged(split, *moments(x[:split]), 40 - split, *moments(x[split:]))
    expected_m, expected_S = moments(x)
    assert n == 40
    torch.testing.assert_close(m, expected_m, rtol=1e-14, atol=0)
    torch.testing.assert_close(S, expected_S, rtol=1e-9, atol=1e-10)


def test_merging_nothing_changes_nothing():
    m, S = moments(torch.randn(6, 3, generator=rng()))
    n, m2, S2 = merged(6, m, S, 0, torch.zeros(3), torch.zeros(3, 3))
    assert n == 6
    assert torch.equal(m2, m)
    torch.testing.assert_close(S2, S, rtol=1e-15, atol=0)


def test_draws_have_the_covariance_and_not_that_of_the_transposed_factor():
    S = covariance(6)
    mean = torch.arange(6, dtype=torch.float64)
    L, _ = cholesky_repaired(S)
    x = draw(mean, L, 40_000, rng())
    m, drawn = moments(x)
    assert distance(L.T @ L, S) > 0.3
    assert distance(drawn, S) < 0.03
    assert distance(drawn, L.T @ L) > 0.3
    torch.testing.assert_close(m, mean, rtol=0, atol=0.02)


def test_draws_of_several_classes_are_those_of_their_own_gaussian():
    covariances = torch.stack([covariance(4, seed) for seed in (1, 2)])
    factors = torch.stack([cholesky_repaired(S)[0] for S in covariances])
    means = torch.tensor([[0.0] * 4, [5.0] * 4])
    x = draw(means, factors.float(), 20_000, rng())
    assert x.shape == (2, 20_000, 4)
    assert x.dtype == torch.float32
    for c in range(2):
        m, S = moments(x[c])
        assert distance(S, covariances[c]) < 0.04
        torch.testing.assert_close(m, means[c].double(), rtol=0, atol=0.04)


def test_one_factor_serves_all_means_as_if_repeated():
    L, _ = cholesky_repaired(covariance(4))
    means = torch.randn(3, 4, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close(draw(means, L, 5, rng(1)), draw(means, L.expand(3, 4, 4), 5, rng(1)))


def test_low_rank_draws_have_low_rank_plus_diagonal_covariance():
    U, _ = torch.linalg.qr(torch.randn(6, 2, generator=rng(), dtype=torch.float64))
    lam = torch.tensor([2.0, 0.5], dtype=torch.float64)
    diag = torch.logspace(-1, -2, 6, dtype=torch.float64)
    mean = torch.arange(6, dtype=torch.float64)
    m, S = moments(low_rank_draw(mean, U, lam, diag, 40_000, rng()))
    assert distance(S, U @ lam.diag() @ U.T + diag.diag()) < 0.03
    torch.testing.assert_close(m, mean, rtol=0, atol=0.03)


@pytest.mark.parametrize("columns", [1, 3, 20])
def test_low_rank_keeps_the_leading_eigenpairs_and_every_variance(columns):
    B = covariance(8)[:, :1] if columns == 1 else torch.randn(8, columns, generator=rng(), dtype=torch.float64)
    diag = torch.logspace(-1, -2, 8, dtype=torch.float64)
    U, lam, rest = low_rank(B, diag, 3)
    assert U.shape == (8, 3)
    expected = torch.linalg.eigvalsh(B @ B.T).flip(0)[:3].clamp_min(0)
    torch.testing.assert_close(lam, expected, rtol=1e-10, atol=1e-12)
    S = U @ lam.diag() @ U.T + rest.diag()
    torch.testing.assert_close(S.diagonal(), (B @ B.T).diagonal() + diag)
    if columns <= 3:
        torch.testing.assert_close(S, B @ B.T + diag.diag())


@pytest.mark.parametrize(("d", "slope"), [(64, 1.0), (64, 3.0), (200, 2.0), (20, 1.0)])
def test_leading_eigenpairs_are_nearly_those_of_a_whole_decomposition(d, slope):
    generator = torch.Generator().manual_seed(d)
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -slope, d, dtype=torch.float64)
    S, r = axes * values @ axes.T, 8
    U, lam = leading(S, r)
    torch.testing.assert_close(U.T @ U, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)
    least = values[r:].norm()
    assert least - 1e-12 <= (S - U * lam @ U.T).norm() < 1.01 * least
    assert (values[:r] - lam).abs().max() < 0.02 * values[r - 1]
    assert (lam <= values[:r] + 1e-12).all()  # Cauchy: never above the true ones
    again = leading(S, r)
    assert torch.equal(again[0], U)
    assert torch.equal(again[1], lam)


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_leading_eigenpairs_of_few_directions_are_all_there_is(rank):
    B = torch.randn(100, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    U, lam = leading(B @ B.T, 8)
    torch.testing.assert_close(U * lam @ U.T, B @ B.T, rtol=0, atol=1e-10)
    assert (lam >= 0).all()


def test_cholesky_needs_no_jitter_where_a_factor_exists():
    S = covariance(6)
    L, jitter = cholesky_repaired(S.float())
    assert jitter == 0.0
    assert L.dtype == torch.float64
    torch.testing.assert_close(L @ L.T, S.float().double(), rtol=1e-6, atol=1e-8)
    assert torch.equal(L, L.tril())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_cholesky_repairs_a_singular_matrix_at_any_scale(scale):
    x = torch.randn(3, 10, generator=rng(), dtype=torch.float64)
    S = scale * x.T @ x
    L, jitter = cholesky_repaired(S)
    assert 0 < jitter <= 1e-8
    assert distance(L @ L.T, S) < 1e-7


def test_cholesky_names_what_is_not_a_covariance():
    broken = torch.eye(3)
    broken[0, 1] = float("nan")
    with pytest.raises(NotFinite, match="class 7: 1 of 9 values"):
        cholesky_repaired(broken, "class 7")
    with pytest.raises(NotFinite, match="smallest eigenvalue -1"):
        cholesky_repaired(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(NotFinite, match="average variance 0"):
        cholesky_repaired(torch.zeros(2, 2))


def test_affine_map_acts_on_rows_as_its_matrix_on_columns():
    A = torch.randn(3, 3, generator=rng(), dtype=torch.float64)
    b = torch.arange(3, dtype=torch.float64)
    x = torch.randn(5, 3, generator=rng(1), dtype=torch.float64)
    torch.testing.assert_close(AffineMap(A, b)(x), torch.stack([A @ row + b for row in x]))
    assert torch.equal(AffineMap.identity(3)(x), x)
    m, S = moments(x)
    mapped_m, mapped_S = moments(AffineMap(A, b)(x))
    torch.testing.assert_close(mapped_m, A @ m + b)
    torch.testing.assert_close(mapped_S, A @ S @ A.T)


def test_draws_come_from_the_generator_alone():
    L = torch.eye(3)
    state = torch.random.get_rng_state()
    first = draw(torch.zeros(3), L, 4, rng(5))
    assert torch.equal(first, draw(torch.zeros(3), L, 4, rng(5)))
    assert not torch.equal(first, draw(torch.zeros(3), L, 4, rng(6)))
    low_rank_draw(torch.zeros(3), torch.zeros(3, 1), torch.ones(1), torch.ones(3), 4, rng())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_triangles_folded_in_half_precision(d):
    rng = torch.Generator().manual_seed(d)
    L = (torch.randn(3, d, d, generator=rng) * torch.logspace(0, -3, d)).tril() * torch.tensor([1e-9, 1.0, 1e9])[
        :, None, None
    ]
    L[:, 0, 0] = L[:, 0, 0].abs()
    halved = Halved.of(L)
    assert sum(part.numel() for part in halved[1:]) == 3 * (d * (d + 1) // 2 + d % 2 * (d // 2))
    largest = L.abs().amax((1, 2), keepdim=True)
    whole = halved.whole()
    assert torch.equal(whole, whole.tril())
    assert ((whole - L).abs() <= torch.maximum(2**-11 * L.abs(), 2**-25 * largest) * (1 + 1e-5)).all()
    assert torch.equal(Halved.of(torch.zeros(2, d, d)).whole(), torch.zeros(2, d, d))

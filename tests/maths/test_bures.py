from __future__ import annotations

import ot
import pytest
import torch

from cairn.errors import NotFinite
from cairn.maths.bures import bures_parts, bures_squared, gaussian_map


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(d: int, seed: int, spread: float = 1.5, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of n (default 4 d) correlated rows whose standard deviations span 10^spread."""
    g = rng(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) * torch.logspace(0, -spread, d, dtype=torch.float64)
    x = torch.randn(n or 4 * d, d, generator=g, dtype=torch.float64) @ mix.T / d**0.5
    return torch.randn(d, generator=g, dtype=torch.float64) + x.mean(0), torch.cov(x.T, correction=0)


def several(k: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    means, covariances = zip(*(gaussian(d, seed + i) for i in range(k)), strict=True)
    return torch.stack(means), torch.stack(covariances)


def pot_squared(m0: torch.Tensor, S0: torch.Tensor, m1: torch.Tensor, S1: torch.Tensor) -> float:
    return float(ot.gaussian.bures_wasserstein_distance(m0, m1, S0, S1)) ** 2


@pytest.mark.parametrize(("d", "seed"), [(2, 0), (4, 1), (16, 2), (48, 3)])
def test_distance_equals_pot(d, seed):
    (m0, S0), (m1, S1) = gaussian(d, seed), gaussian(d, seed + 50)
    assert float(bures_squared(m0, S0, m1, S1)) == pytest.approx(pot_squared(m0, S0, m1, S1), rel=1e-9)


def test_distance_and_map_in_one_dimension():
    m0, S0, m1, S1 = (torch.tensor(x, dtype=torch.float64) for x in ([1.0], [[4.0]], [-2.0], [[0.25]]))
    assert float(bures_squared(m0, S0, m1, S1)) == pytest.approx(9 + 1.5**2)
    found = gaussian_map(m0, S0, m1, S1, reg=0.0)
    torch.testing.assert_close(found.A, torch.full((1, 1), 0.25, dtype=torch.float64))
    torch.testing.assert_close(found.b, torch.full((1,), -2.25, dtype=torch.float64))


def test_distance_splits_into_means_and_covariances():
    (m0, S0), (m1, S1) = gaussian(12, 0), gaussian(12, 1)
    mean, covariance = bures_parts(m0, S0, m1, S1)
    torch.testing.assert_close(mean, (m0 - m1).square().sum())
    torch.testing.assert_close(covariance, bures_squared(m0, S0, m0, S1))
    torch.testing.assert_close(mean + covariance, bures_squared(m0, S0, m1, S1))


def test_distance_of_commuting_covariances_is_that_of_their_roots():
    Q = torch.linalg.qr(torch.randn(9, 9, generator=rng(), dtype=torch.float64))[0]
    v0, v1 = torch.logspace(0, -3, 9, dtype=torch.float64), torch.linspace(0.1, 2, 9, dtype=torch.float64)
    m = torch.zeros(9, dtype=torch.float64)
    found = bures_squared(m, Q * v0 @ Q.T, m, Q * v1 @ Q.T)
    torch.testing.assert_close(found, (v0.sqrt() - v1.sqrt()).square().sum())


def test_distance_is_symmetric_and_zero_at_home():
    (m0, S0), (m1, S1) = gaussian(20, 0), gaussian(20, 1)
    torch.testing.assert_close(bures_squared(m0, S0, m1, S1), bures_squared(m1, S1, m0, S0), rtol=1e-10, atol=0)
    assert 0 <= float(bures_squared(m0, S0, m0, S0)) < 1e-12


def test_distance_pair_by_pair_and_pairs_by_broadcasting():
    m, S = several(5, 8, 0)
    batched = bures_squared(m[:4], S[:4], m[1:], S[1:])
    alone = torch.stack([bures_squared(m[i], S[i], m[i + 1], S[i + 1]) for i in range(4)])
    torch.testing.assert_close(batched, alone, rtol=1e-12, atol=1e-14)
    table = torch.stack([bures_squared(m[i].expand(5, 8), S[i].expand(5, 8, 8), m, S) for i in range(5)])
    torch.testing.assert_close(table, table.T, rtol=1e-9, atol=1e-12)


def test_distance_of_singular_covariances():
    (m0, S0), (m1, S1) = gaussian(16, 0, n=5), gaussian(16, 1, n=7)
    zero = torch.zeros_like(S0)
    assert float(bures_squared(m0, S0, m1, S1)) == pytest.approx(pot_squared(m0, S0, m1, S1), rel=1e-7)
    torch.testing.assert_close(bures_parts(m0, zero, m1, S1)[1], S1.trace())
    mixed = bures_squared(torch.stack([m0, m0]), torch.stack([S0, zero]), torch.stack([m1, m1]), torch.stack([S1, S1]))
    torch.testing.assert_close(mixed[0], bures_squared(m0, S0, m1, S1))


def test_distance_has_the_right_gradient():
    (m0, S0), (m1, S1) = gaussian(5, 0, spread=0.5), gaussian(5, 1, spread=0.5)
    inputs = [x.clone().requires_grad_() for x in (m0, S0, m1, S1)]
    assert torch.autograd.gradcheck(bures_squared, inputs)
    # Envelope theorem: the derivative in S0 is I less the map towards S1
    (slope,) = torch.autograd.grad(bures_squared(*inputs), inputs[1])
    A = gaussian_map(m0, S0, m1, S1, reg=0.0).A
    torch.testing.assert_close((slope + slope.T) / 2, torch.eye(5, dtype=torch.float64) - A, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("d", "seed"), [(2, 0), (4, 1), (16, 2), (48, 3)])
def test_map_equals_pot(d, seed):
    (m0, S0), (m1, S1) = gaussian(d, seed), gaussian(d, seed + 50)
    A, b = ot.gaussian.bures_wasserstein_mapping(m0, m1, S0, S1)
    found = gaussian_map(m0, S0, m1, S1, reg=0.0)
    torch.testing.assert_close(found.A, A, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.b, b.reshape(-1), rtol=1e-6, atol=1e-6)


def test_map_with_its_ridge_equals_pots_on_samples():
    # POT adds its absolute ridge to both covariances too
    g = rng(3)
    x0 = torch.randn(40, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    x1 = x0 @ torch.randn(6, 6, generator=g, dtype=torch.float64) + 2.0
    S0, S1 = torch.cov(x0.T, correction=0), torch.cov(x1.T, correction=0)
    reg = 1e-3
    A, b = ot.gaussian.empirical_bures_wasserstein_mapping(x0, x1, reg=float(reg * (S0 + S1).trace() / 12))
    found = gaussian_map(x0.mean(0), S0, x1.mean(0), S1, reg=reg)
    # POT divides by n - 1 or n depending on its release: the map is the same
    torch.testing.assert_close(found.A, A, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.b, b.reshape(-1), rtol=2e-2, atol=2e-2)


def test_map_pushes_one_gaussian_onto_the_other():
    (m0, S0), (m1, S1) = gaussian(32, 0), gaussian(32, 1)
    A, b = gaussian_map(m0, S0, m1, S1, reg=0.0)
    torch.testing.assert_close(A @ S0 @ A.T, S1, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(A @ m0 + b, m1)
    assert torch.equal(A, A.T)
    assert float(torch.linalg.eigvalsh(A)[0]) > 0
    # Among maps that push S0 onto S1 it moves mass least: its cost is the distance itself
    shift = A - torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close((shift @ S0 @ shift.T).trace(), bures_parts(m0, S0, m1, S1)[1], rtol=1e-9, atol=0)


def test_map_of_commuting_covariances_is_the_ratio_of_their_roots():
    Q = torch.linalg.qr(torch.randn(9, 9, generator=rng(), dtype=torch.float64))[0]
    v0, v1 = torch.logspace(0, -3, 9, dtype=torch.float64), torch.linspace(0.1, 2, 9, dtype=torch.float64)
    m = torch.zeros(9, dtype=torch.float64)
    A = gaussian_map(m, Q * v0 @ Q.T, m, Q * v1 @ Q.T, reg=0.0).A
    torch.testing.assert_close(A, Q * (v1 / v0).sqrt() @ Q.T, rtol=1e-10, atol=1e-10)


def test_map_undoes_itself_and_is_the_identity_at_home():
    (m0, S0), (m1, S1) = gaussian(16, 0), gaussian(16, 1)
    there, back = gaussian_map(m0, S0, m1, S1), gaussian_map(m1, S1, m0, S0)
    torch.testing.assert_close(back.A @ there.A, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-8)
    home = gaussian_map(m0, S0, m0, S0)
    torch.testing.assert_close(home.A, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(home.b, torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-10)


def test_map_of_few_samples_leaves_unseen_directions_alone():
    d, n = 24, 7
    m, S = gaussian(d, 0, n=n)
    stretch = torch.eye(d, dtype=torch.float64) * 1.5
    A, b = gaussian_map(m, S, stretch @ m, stretch @ S @ stretch, reg=1e-4)
    lam, V = torch.linalg.eigh(S)
    unseen, seen = V[:, : d - n + 1], V[:, d - n + 1 :]
    assert float(lam[d - n]) < 1e-12 < float(lam[d - n + 1])
    torch.testing.assert_close(unseen.T @ A @ unseen, torch.eye(d - n + 1, dtype=torch.float64), rtol=0, atol=1e-6)
    top = seen[:, -1]
    assert float(top @ A @ top) == pytest.approx(1.5, rel=1e-3)
    assert A.isfinite().all()
    assert b.isfinite().all()


def test_map_of_one_point_to_another_is_a_translation():
    (m0, S), (m1, _) = gaussian(6, 0), gaussian(6, 1)
    A, b = gaussian_map(m0, torch.zeros_like(S), m1, torch.zeros_like(S))
    assert torch.equal(A, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(b, m1 - m0)


def test_map_of_scales_far_apart_stays_finite():
    (m0, S0), (m1, S1) = gaussian(32, 0, spread=6), gaussian(32, 1, spread=6)
    A, b = gaussian_map(m0, 1e-9 * S0, m1, 1e-9 * S1)
    assert A.isfinite().all()
    torch.testing.assert_close(A @ m0 + b, m1)


def test_maps_in_a_batch_are_those_alone():
    (m0, S0), (m1, S1) = several(3, 10, 0), several(3, 10, 30)
    maps = gaussian_map(m0, S0, m1, S1)
    for i in range(3):
        alone = gaussian_map(m0[i], S0[i], m1[i], S1[i])
        torch.testing.assert_close(maps.A[i], alone.A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(maps.b[i], alone.b, rtol=1e-10, atol=1e-12)


def test_map_leaves_its_arguments_as_they_were():
    (m0, S0), (m1, S1) = gaussian(6, 0), gaussian(6, 1)
    before = S0.clone(), S1.clone()
    gaussian_map(m0, S0, m1, S1, reg=0.1)
    assert torch.equal(S0, before[0])
    assert torch.equal(S1, before[1])


def test_map_refuses_what_it_cannot_do():
    m, S = gaussian(6, 0)
    zero = torch.zeros_like(S)
    with pytest.raises(NotFinite, match="singular with a ridge of 0"):
        gaussian_map(m, zero, m, S, reg=0.0)
    with pytest.raises(NotFinite, match="not finite"):
        gaussian_map(m, S, m, S * float("nan"))

from __future__ import annotations

import pydantic
import pytest
import torch
from sklearn.covariance import oas as sklearn_oas

from cairn.maths.shrinkage import Oas, Ridge, Shrinkage, oas, oas_diagonal, ridge


def sample(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Correlated, anisotropic rows away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix.T + 3.0


def biased(x: torch.Tensor) -> torch.Tensor:
    return torch.cov(x.T, correction=0)


@pytest.mark.parametrize(("n", "d"), [(5, 40), (16, 8), (400, 12), (2, 3)])
def test_oas_equals_sklearn(n, d):
    x = sample(n, d)
    expected, weight = sklearn_oas(x.numpy())
    S, rho = oas(biased(x), n)
    torch.testing.assert_close(S, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    assert float(rho) == pytest.approx(weight, rel=1e-12)


def test_oas_takes_several_matrices_each_with_its_count():
    samples = [sample(5, 6, 1), sample(50, 6, 2)]
    S, rho = oas(torch.stack([biased(x) for x in samples]), torch.tensor([5, 50]))
    for i, x in enumerate(samples):
        alone, weight = oas(biased(x), len(x))
        torch.testing.assert_close(S[i], alone, rtol=1e-14, atol=0)
        assert float(rho[i]) == pytest.approx(float(weight), rel=1e-14)


@pytest.mark.parametrize("S", [torch.zeros(4, 4), 0.1 * torch.eye(7), torch.tensor([[2.0]])])
def test_oas_leaves_an_isotropic_matrix_as_it_is(S):
    shrunk, rho = oas(S, 10)
    torch.testing.assert_close(shrunk, S.double(), rtol=1e-14, atol=0)
    assert float(rho) == 1.0


def test_oas_is_nearer_the_truth_and_invertible_when_samples_are_few():
    d, n = 40, 10
    x = sample(4000, d)
    truth = biased(x)
    raw = biased(x[:n])
    shrunk, rho = oas(raw, n)
    assert 0 < float(rho) < 1
    assert torch.linalg.eigvalsh(raw)[0] < 1e-12
    assert torch.linalg.eigvalsh(shrunk)[0] > 1e-3 * truth.trace() / d
    assert (shrunk - truth).norm() < (raw - truth).norm()


def test_ridge_adds_a_share_of_the_average_variance():
    S = biased(sample(30, 5))
    expected = S + 0.2 * S.trace() / 5 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(ridge(S, 0.2), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(ridge(9 * S, 0.2), 9 * expected, rtol=1e-14, atol=0)
    assert torch.equal(ridge(S, 0.0), S)


def test_diagonal_weight_is_near_the_oracle_where_that_of_oas_is_not():
    """Mean squared error over repetitions, against the best of a grid of weights chosen knowing the truth."""
    d, n, repeats = 64, 16, 200
    truth = torch.logspace(0, -1, d, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(repeats, n, d, generator=generator, dtype=torch.float64) * truth.sqrt()
    v = x.var(1, correction=0)

    def error(shrunk):
        return float(((shrunk - truth) ** 2).sum(1).mean())

    def weighted(rho):
        return v + rho * (v.mean(1, keepdim=True) - v)

    best = min(error(weighted(rho)) for rho in torch.linspace(0, 1, 101, dtype=torch.float64))
    shrunk, rho = oas_diagonal(v, n)
    assert error(shrunk) < 1.05 * best
    assert error(shrunk) < 0.9 * error(v)
    assert 0 < float(rho.mean()) < 0.5
    full_weights = oas(v.diag_embed(), n)[1]
    assert float(full_weights.mean()) == 1.0


def test_equal_variances_stay():
    v, rho = oas_diagonal(torch.full((6,), 0.1), 9)
    torch.testing.assert_close(v, torch.full((6,), 0.1).double(), rtol=1e-14, atol=0)
    assert float(rho) == 1.0


@pytest.mark.parametrize("shrinkage", [Oas(), Ridge(), Ridge(eps=0.5), Ridge(eps=0)])
def test_scales_and_call_agree(shrinkage):
    S, n = biased(sample(9, 7)), 9
    a, b = shrinkage.scales(S.trace(), (S * S).sum(), n, 7)
    torch.testing.assert_close(shrinkage(S, n), a * S + b * torch.eye(7, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_ridge_of_variances_is_the_diagonal_of_ridge():
    v = biased(sample(9, 7)).diagonal()
    torch.testing.assert_close(Ridge(eps=0.3).diagonal(v, 9).diag(), Ridge(eps=0.3)(v.diag(), 9), rtol=1e-14, atol=0)


def test_results_are_float64_and_leave_the_argument_alone():
    S = biased(sample(9, 7)).float()
    before = S.clone()
    for shrinkage in (Oas(), Ridge()):
        assert shrinkage(S, 9).dtype == torch.float64
        assert shrinkage.diagonal(S.diagonal(), 9).dtype == torch.float64
    assert torch.equal(S, before)


def test_settings_are_frozen_chosen_by_kind_and_refused_when_wrong():
    choice = pydantic.TypeAdapter(Shrinkage)
    assert choice.validate_python({"kind": "ridge", "eps": 0.1}) == Ridge(eps=0.1)
    assert choice.validate_json(Oas().model_dump_json()) == Oas()
    for wrong in ({"kind": "ridge", "eps": -1}, {"kind": "oas", "eps": 0.1}, {"kind": "lasso"}):
        with pytest.raises(pydantic.ValidationError):
            choice.validate_python(wrong)
    with pytest.raises(pydantic.ValidationError):
        Ridge().eps = 0.1
    assert all(f.description for model in (Oas, Ridge) for f in model.model_fields.values())

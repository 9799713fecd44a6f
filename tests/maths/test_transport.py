from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

from cairn.maths.transport import sinkhorn_kernel, sinkhorn_log

EPS = [1e-3, 1e-2, 0.05, 0.1, 1.0, 10.0]
FORMS = pytest.mark.parametrize("form", [sinkhorn_log, sinkhorn_kernel])


def clustered(batch: tuple[int, ...], n: int, m: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Cosine costs in [0, 2] between unit rows of four tight clusters, in different shares on either side.

    Rows without clusters lie at almost equal distances: then the plan is a a b^T at once and no test means anything.
    """
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=g, dtype=torch.float64)

    def rows(number: int) -> torch.Tensor:
        which = torch.multinomial(torch.rand(4, generator=g), number * max(1, int(np.prod(batch))), True, generator=g)
        x = centres[which] + 0.3 * torch.randn(len(which), 16, generator=g, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1).reshape(*batch, number, 16)

    return (1 - rows(n) @ rows(m).mT).to(dtype)


def weights(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    w = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return (w / w.sum(-1, keepdim=True)).to(dtype)


def test_the_costs_are_clustered_enough_to_test_anything():
    C = clustered((8,), 32, 16)
    assert float(C.min()) >= 0
    assert float(C.max()) <= 2
    assert float(sinkhorn_log(C, iterations=5, tolerance=0.0).error.max()) > 0.05


@FORMS
@pytest.mark.parametrize("eps", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_plans_equal_pots_problem_by_problem(form, eps, dtype, atol):
    n, m = 24, 12
    C, a, b = clustered((4,), n, m), weights(4, n, seed=1), weights(4, m, seed=2)
    found = form(
        C.to(dtype), a.to(dtype), b.to(dtype), eps=eps, iterations=5000, tolerance=1e-10 if atol < 1e-5 else 1e-5
    )
    assert found.P.dtype == dtype
    for i in range(4):
        expected = ot.sinkhorn(a[i], b[i], C[i], eps, method="sinkhorn_log", numItermax=20000, stopThr=1e-12)
        # Relative to the weight of a row, so that 1e-6 is not 1e-6 of a thousandth
        torch.testing.assert_close(found.P[i].double() * n, expected * n, rtol=0, atol=atol)
        torch.testing.assert_close(found.cost[i].double(), (expected * C[i]).sum(), rtol=0, atol=atol)


@FORMS
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(32, 16), (5, 40), (2, 2), (1, 7)])
def test_nothing_underflows_into_nan(form, eps, dtype, n, m):
    C = clustered((3,), n, m, seed=4, dtype=dtype)
    far = torch.full_like(C, 2.0)
    far[..., 0, 0] = 0.0
    for cost in (C, far):
        plan = form(
            cost, weights(n, dtype=dtype), weights(m, seed=5, dtype=dtype), eps=eps, iterations=200, tolerance=0.0
        )
        assert all(x.isfinite().all() for x in plan[:3])
        assert (plan.P >= 0).all()
        torch.testing.assert_close(plan.P.sum((-2, -1)), torch.ones(3, dtype=dtype), rtol=1e-3, atol=0)


@FORMS
@pytest.mark.parametrize("eps", [5e-3, 1e-2])
def test_small_eps_is_right_and_not_merely_finite(form, eps):
    C = clustered((), 8, 6, seed=2)
    plan = form(C, eps=eps, iterations=10_000, tolerance=1e-6)
    assert float(plan.error) <= 2e-6
    exact = ot.emd2(np.full(8, 1 / 8), np.full(6, 1 / 6), C.numpy())
    assert exact - 1e-6 <= float(plan.cost) <= exact + eps * np.log(48)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hundred_steps_are_enough_at_a_tenth(form, dtype):
    plan = form(clustered((64,), 32, 16, dtype=dtype), eps=0.1, iterations=100, tolerance=0.0)
    assert plan.iterations == 100
    assert float(plan.error.max()) < 0.01


@FORMS
def test_error_is_that_of_the_worst_marginal(form):
    n, m = 12, 9
    C, a, b = clustered((2,), n, m), weights(2, n), weights(m, seed=3)
    plan = form(C, a, b, eps=0.05, iterations=4, tolerance=0.0)
    rows, columns = (plan.P.sum(-1) / a - 1).abs().amax(-1), (plan.P.sum(-2) / b - 1).abs().amax(-1)
    torch.testing.assert_close(plan.error, torch.maximum(rows, columns))
    assert (columns < 1e-12).all()
    assert (rows > 1e-4).all()


@FORMS
def test_stops_once_the_tolerance_is_met(form):
    C = clustered((4,), 20, 10)
    plan = form(C, eps=0.1, iterations=1000, tolerance=1e-3)
    assert 1 < plan.iterations < 1000
    assert float(plan.error.max()) <= 1.001e-3
    assert form(C, eps=0.1, iterations=7, tolerance=0.0).iterations == 7


@FORMS
def test_a_batch_is_its_problems(form):
    C, a = clustered((2, 3), 10, 6), weights(2, 3, 10)
    together = form(C, a, eps=0.05, iterations=30, tolerance=0.0)
    assert together.P.shape == (2, 3, 10, 6)
    for i in range(2):
        for j in range(3):
            alone = form(C[i, j], a[i, j], eps=0.05, iterations=30, tolerance=0.0)
            torch.testing.assert_close(together.P[i, j], alone.P, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(together.cost[i, j], alone.cost)
            torch.testing.assert_close(together.error[i, j], alone.error, rtol=1e-6, atol=1e-9)


def test_both_forms_agree_where_scalings_were_absorbed():
    C = clustered((6,), 16, 12, seed=7)
    log, kernel = (form(C, eps=0.01, iterations=3000, tolerance=1e-9) for form in (sinkhorn_log, sinkhorn_kernel))
    torch.testing.assert_close(kernel.P, log.P, rtol=0, atol=1e-8)


@FORMS
def test_uniform_marginals_are_the_default(form):
    C = clustered((3,), 7, 5)
    explicit = form(C, torch.full((7,), 1 / 7), torch.full((3, 5), 0.2), iterations=50, tolerance=0.0)
    torch.testing.assert_close(form(C, iterations=50, tolerance=0.0).P, explicit.P, rtol=1e-6, atol=1e-8)


@FORMS
def test_half_precision_is_computed_in_float32(form):
    C = clustered((2,), 30, 10, dtype=torch.bfloat16)
    plan = form(C)
    assert plan.P.dtype == torch.float32
    torch.testing.assert_close(plan.P.sum((-2, -1)), torch.ones(2), rtol=1e-5, atol=0)


def test_a_large_eps_forgets_the_cost():
    a, b = weights(6), weights(4, seed=1)
    plan = sinkhorn_log(clustered((), 6, 4), a, b, eps=1e4)
    torch.testing.assert_close(plan.P, torch.outer(a, b), rtol=1e-3, atol=0)


@FORMS
def test_without_asking_the_plan_is_a_constant_and_the_cost_has_it_as_slope(form):
    C = clustered((2,), 6, 5).requires_grad_()
    plan = form(C)
    assert not plan.P.requires_grad
    (slope,) = torch.autograd.grad(plan.cost.sum(), C)
    torch.testing.assert_close(slope, plan.P)


def test_gradients_through_the_iterations():
    C, a, b = clustered((), 4, 3).requires_grad_(), weights(4).requires_grad_(), weights(3, seed=1).requires_grad_()

    def outputs(C, a, b):
        # gradcheck moves one weight at a time; the problem asks for equal sums
        plan = sinkhorn_log(C, a / a.sum(), b / b.sum(), eps=0.2, iterations=15, tolerance=0.0, gradient=True)
        return plan.P, plan.cost

    assert torch.autograd.gradcheck(outputs, (C, a, b))


def test_gradient_of_the_regularised_value_is_the_plan():
    C = clustered((), 6, 5).requires_grad_()
    plan = sinkhorn_log(C, eps=0.1, iterations=3000, tolerance=1e-11, gradient=True)
    value = plan.cost + 0.1 * (plan.P * plan.P.log()).sum()
    (slope,) = torch.autograd.grad(value, C)
    torch.testing.assert_close(slope, plan.P, rtol=0, atol=1e-8)


@FORMS
def test_refuses_what_is_no_transport_problem(form):
    C = clustered((), 4, 3)
    with pytest.raises(ValueError, match="eps 0"):
        form(C, eps=0.0)
    with pytest.raises(ValueError, match="not positive"):
        form(C, torch.tensor([0.5, 0.5, 0.0, 0.0]))
    with pytest.raises(ValueError, match="total weight"):
        form(C, torch.full((4,), 0.5))


@pytest.mark.parametrize("eps", [0.1, 0.05, 0.02])
def test_over_relaxation_takes_fewer_sweeps_to_the_same_cost(eps):
    C = clustered((50,), 32, 16, seed=11)
    how = {"eps": eps, "iterations": 100_000, "tolerance": 1e-2}
    plain, kernel = sinkhorn_log(C, **how), sinkhorn_kernel(C, **how)
    assert plain.iterations > 20
    assert kernel.iterations < 0.6 * plain.iterations
    torch.testing.assert_close(kernel.cost, plain.cost, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 7), (32, 16), (64, 8), (60, 60)])
def test_over_relaxation_never_costs_many_sweeps(n, m, seed):
    rng = torch.Generator().manual_seed(seed)
    for scale in (0.1, 1.0, 3.0):
        C = scale * torch.rand(n, m, generator=rng, dtype=torch.float64)
        for eps in (0.1, 0.02, 0.005):
            how = {"eps": eps, "iterations": 20_000, "tolerance": 1e-3}
            plain, kernel = sinkhorn_log(C, **how), sinkhorn_kernel(C, **how)
            assert kernel.iterations <= 1.3 * plain.iterations + 6
            assert float(kernel.error) <= 2e-3 or plain.iterations == 20_000

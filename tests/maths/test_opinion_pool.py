"""The pool of experts against scipy's minimiser and against all tasks at once."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize

from cairn.maths.opinion_pool import OpinionPool


def evidence(n=60, k=5, seed=0):
    """A good expert, one in other units, one that knows nothing."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=rng)
    truth = torch.eye(k).double()[y]
    noise = torch.randn(n, k, 3, generator=rng).double()
    return torch.stack([2 * truth + noise[..., 0], 60 * truth + 40 * noise[..., 1], noise[..., 2]], 2), y


def objective(phi, E, y, phi0, H):
    s = (E.numpy() * np.exp(phi)).sum(2)
    s = s - s.max(1, keepdims=True)
    loss = (np.log(np.exp(s).sum(1)) - s[np.arange(len(y)), y]).sum()
    return loss + (phi - phi0) @ H @ (phi - phi0) / 2


def test_the_fit_is_the_minimum_that_scipy_finds():
    E, y = evidence()
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    found = start.fitted(E, y)
    held = (E, y.numpy(), start.phi.numpy(), start.H.numpy())
    best = minimize(objective, start.phi.numpy(), args=held, method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found.phi, best.x, atol=1e-4)
    gap = found.phi - start.phi
    np.testing.assert_allclose(found.loss, best.fun - (gap @ start.H @ gap).item() / 2, rtol=1e-6)
    assert found.weights[2] < start.weights[2]  # of the one that knows nothing


def test_the_precision_grows_by_the_curvature_of_the_loss():
    E, y = evidence()
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    found = start.fitted(E, y)
    w = found.weights

    def logits(phi):
        return torch.log_softmax((E * phi.exp()).sum(2), 1)

    jacobian = torch.autograd.functional.jacobian(lambda phi: (E * phi.exp()).sum(2), found.phi)
    p = logits(found.phi).exp()
    expected = torch.zeros(3, 3).double()
    for i in range(len(y)):
        curvature = torch.diag(p[i]) - torch.outer(p[i], p[i])
        expected += jacobian[i].T @ curvature @ jacobian[i]
    torch.testing.assert_close(found.H - start.H, expected)
    assert (w > 0).all()


def test_two_tasks_are_close_to_both_at_once():
    first, second = evidence(200, seed=1), evidence(200, seed=2)
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    apart = start.fitted(*first).fitted(*second)
    both = start.fitted(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    assert (apart.phi - both.phi)[:2].abs().max() < 0.1
    assert (start.fitted(*second).phi - both.phi)[:2].abs().max() > (apart.phi - both.phi)[:2].abs().max()


def test_ageing_weighs_what_was_before_less():
    first, second = evidence(seed=1), evidence(seed=2)
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0).fitted(*first)
    none = start.fitted(*second, ageing=0.0)
    alone = OpinionPool(start.phi, torch.zeros(3, 3).double()).fitted(*second)
    torch.testing.assert_close(none.phi, alone.phi)
    assert none.loss == alone.loss
    half = start.fitted(*second, ageing=0.5)
    torch.testing.assert_close(half.loss - 0.5 * start.loss, half.loss - start.loss + 0.5 * start.loss)


def test_a_pool_is_what_its_state_says():
    pool = OpinionPool.starting([0.5, 0.03, 1.0], 3.0).fitted(*evidence())
    again = OpinionPool.from_state(pool.state_dict())
    E, _ = evidence(seed=4)
    assert torch.equal(again.joined(E), pool.joined(E))
    assert again.loss == pool.loss

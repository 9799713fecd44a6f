"""The pool of experts against scipy's minimiser and against all tasks at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from cairn.maths.opinion_pool import THETA, OpinionPool


def evidence(n=60, k=5, seed=0):
    """A good expert, one in other units, one that knows nothing."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=rng)
    truth = torch.eye(k).double()[y]
    noise = torch.randn(n, k, 3, generator=rng).double()
    return torch.stack([2 * truth + noise[..., 0], 60 * truth + 40 * noise[..., 1], noise[..., 2]], 2), y


COUNTS = torch.tensor([3, 40, 9, 1, 12])
EVEN = torch.full((5,), 7)


def objective(psi, E, y, counts, psi0, H):
    """As it is written, image by image."""
    n = counts.numpy()
    squares, w = sum(1 / n[c] ** 2 for c in y), [sum(1 / n[j] for j in y) / n[c] for c in y]
    loss = 0.0
    for row, c, weight in zip(E.numpy(), y, w, strict=True):
        s = row @ np.exp(psi[:-1]) - psi[-1] * np.log(n)
        loss += weight / squares * (np.log(np.exp(s - s.max()).sum()) + s.max() - s[c])
    return loss + (psi - psi0) @ H @ (psi - psi0) / 2


@pytest.mark.parametrize("counts", [EVEN, COUNTS])
def test_the_fit_is_the_minimum_that_scipy_finds(counts):
    E, y = evidence()
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    found = start.fitted(E, y, counts)
    held = (E, y.numpy(), counts, start.psi.numpy(), start.H.numpy())
    best = minimize(objective, start.psi.numpy(), args=held, method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(found.psi, best.x, atol=1e-4)
    gap = found.psi - start.psi
    np.testing.assert_allclose(found.loss, best.fun - (gap @ start.H @ gap).item() / 2, rtol=1e-6)
    assert found.weights[2] < start.weights[2]  # of the one that knows nothing


def test_of_equal_counts_nothing_is_taken_off():
    """theta and its precision stay as they were, and the weights are the same whatever the counts."""
    E, y = evidence()
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    found, more = start.fitted(E, y, EVEN), start.fitted(E, y, 100 * EVEN)
    assert found.psi[-1] == THETA
    assert found.H[-1].tolist() == [0, 0, 0, start.H[-1, -1]]
    torch.testing.assert_close(found.psi, more.psi)
    assert found.loss == pytest.approx(more.loss)
    torch.testing.assert_close(torch.log_softmax(found.joined(E, EVEN), 1), torch.log_softmax(E @ found.weights, 1))


def test_what_classes_of_many_images_have_too_much_is_taken_off():
    """Scores that hold .8 log n_c too much, and as many images of a class as it was learned from: theta is .8 of the weight."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([40, 100, 300, 900])
    y = torch.arange(4).repeat_interleave(counts)
    E = 2 * torch.eye(4).double()[y] + torch.randn(len(y), 4, generator=rng).double() + 0.8 * counts.double().log()
    found = OpinionPool.starting([1.0], 30.0).fitted(E[:, :, None], y, counts)
    assert (found.psi[-1] / found.weights).item() == pytest.approx(0.8, abs=0.1)
    right = found.joined(E[:, :, None], counts).argmax(1) == y
    before = E.argmax(1) == y
    by_class = [torch.stack([hits[y == c].double().mean() for c in range(4)]) for hits in (before, right)]
    assert by_class[0][0] < 0.3 < 0.6 < by_class[1].min()


def test_the_precision_grows_by_the_curvature_of_the_loss():
    E, y = evidence()
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    found = start.fitted(E, y, COUNTS)
    w = found.weights

    def logits(psi):
        return (E * psi[:-1].exp()).sum(2) - psi[-1] * COUNTS.double().log()

    jacobian = torch.autograd.functional.jacobian(logits, found.psi)
    p, rarity = torch.softmax(logits(found.psi), 1), 1 / COUNTS.double()[y]
    expected = torch.zeros(4, 4).double()
    for i in range(len(y)):
        curvature = torch.diag(p[i]) - torch.outer(p[i], p[i])
        expected += (rarity[i] * rarity.sum() / (rarity**2).sum()).double() * jacobian[i].T @ curvature @ jacobian[i]
    torch.testing.assert_close(found.H - start.H, expected)
    assert (w > 0).all()


def test_two_tasks_are_close_to_both_at_once():
    first, second = evidence(200, seed=1), evidence(200, seed=2)
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0)
    apart = start.fitted(*first, EVEN).fitted(*second, EVEN)
    both = start.fitted(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), EVEN)
    assert (apart.psi - both.psi)[:2].abs().max() < 0.1
    alone = start.fitted(*second, EVEN)
    assert (alone.psi - both.psi)[:2].abs().max() > (apart.psi - both.psi)[:2].abs().max()


def test_ageing_weighs_what_was_before_less():
    first, second = evidence(seed=1), evidence(seed=2)
    start = OpinionPool.starting([0.5, 0.03, 1.0], 3.0).fitted(*first, EVEN)
    none = start.fitted(*second, EVEN, ageing=0.0)
    alone = OpinionPool(start.psi, 1e-9 * torch.eye(4).double()).fitted(*second, EVEN)
    torch.testing.assert_close(none.psi, alone.psi)
    assert none.loss == pytest.approx(alone.loss)
    half = start.fitted(*second, EVEN, ageing=0.5)
    torch.testing.assert_close(half.loss - 0.5 * start.loss, half.loss - start.loss + 0.5 * start.loss)


def test_a_pool_is_what_its_state_says():
    pool = OpinionPool.starting([0.5, 0.03, 1.0], 3.0).fitted(*evidence(), COUNTS)
    again = OpinionPool.from_state(pool.state_dict())
    E, _ = evidence(seed=4)
    assert torch.equal(again.joined(E, COUNTS), pool.joined(E, COUNTS))
    assert again.loss == pool.loss


def test_a_state_of_before_there_was_a_theta_has_its_prior():
    phi, H = torch.tensor([0.3, -1.0]).double(), torch.tensor([[4.0, 1.0], [1.0, 6.0]]).double()
    pool = OpinionPool.from_state({"phi": phi, "H": H, "loss": torch.tensor(2.5)})
    start = OpinionPool.starting([1.0, 1.0], 3.0)
    assert torch.equal(pool.psi[:2], phi)
    assert torch.equal(pool.H[:2, :2], H)
    assert (pool.psi[2], pool.H[2].tolist(), pool.loss) == (THETA, start.H[2].tolist(), 2.5)

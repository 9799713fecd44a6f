"""The normal equations: sums against all rows at once, left-out predictions against really leaving out."""

from __future__ import annotations

import torch

from cairn.maths.ridge import one_hot
from cairn.memory.gram import Gram

M, COUNTS = 12, (9, 2, 14)


def world(seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    mixing = torch.randn(M, M, generator=rng).double() * torch.logspace(0, -1, M).double()
    return (torch.randn(3, M, generator=rng).double()[y] + torch.randn(len(y), M, generator=rng).double() @ mixing), y


def solved(H, Y, lam):
    return torch.linalg.solve(H.T @ H + lam * torch.eye(M).double(), H.T @ Y)


def test_the_sums_do_not_depend_on_how_rows_came():
    H, y = world()
    first = y < 2
    gram = Gram.empty(M).joined(H[first], one_hot(y[first], 2)).joined(H[~first], one_hot(y[~first], 3))
    torch.testing.assert_close(gram.solution(0.3), solved(H, one_hot(y, 3), 0.3), rtol=1e-4, atol=1e-6)


def test_left_out_predictions_are_those_of_learning_without():
    H, y = world()
    H = H.float().double()
    Y = one_hot(y, 3)
    gram = Gram((H.T @ H).double(), (H.T @ Y).double())  # exact sums
    for lam, found in zip((1e-2, 1.0), gram.left_out(H, Y, (1e-2, 1.0)), strict=True):
        for i in range(len(H)):
            rest = torch.arange(len(H)) != i
            torch.testing.assert_close(found[i], H[i] @ solved(H[rest], Y[rest], lam), rtol=0, atol=1e-8)


def test_a_forgotten_class_loses_its_column():
    H, y = world()
    gram = Gram.empty(M).joined(H, one_hot(y, 3))
    torch.testing.assert_close(gram.without(1).solution(1.0), gram.solution(1.0)[:, [0, 2]])


def test_its_state_is_one_triangle():
    H, y = world()
    gram = Gram.empty(M).joined(H, one_hot(y, 3))
    state = gram.state_dict()
    assert state["G"].shape == (M * (M + 1) // 2,)
    assert gram.bytes == sum(tensor.nbytes for tensor in state.values())
    again = Gram.from_state(state)
    assert torch.equal(again.G, gram.G)
    assert torch.equal(again.C, gram.C)

"""The graph over class texts, against loops."""

import pytest
import torch

from cairn.maths.graph import SLOPE, propagated, text_graph
from cairn.maths.similarity import unit


def texts(k=9, d=6):
    rng = torch.Generator().manual_seed(1)
    return unit(torch.randn(k, d, generator=rng, dtype=torch.float64) * torch.linspace(1, 3, d) + 2)


def looped(T, share, neighbours):
    k = len(T)
    centred = [t - T.mean(0) for t in T]
    A = torch.zeros(k, k, dtype=T.dtype)
    for c in range(k):
        near = {}
        for o in range(k):
            if o != c:
                near[o] = float(centred[c] @ centred[o] / centred[c].norm() / centred[o].norm())
        kept = {o: v for o, v in sorted(near.items(), key=lambda pair: -pair[1])[:neighbours] if v > 0}
        total = sum(kept.values())
        A[c, c] = 1 - share if kept else 1
        for o, v in kept.items():
            A[c, o] = share * v / total
    return A


@pytest.mark.parametrize("neighbours", [1, 3, 8, 50])
def test_it_is_the_loop(neighbours):
    A = text_graph(texts(), 0.2, neighbours)
    torch.testing.assert_close(A, looped(texts(), 0.2, neighbours))
    torch.testing.assert_close(A.sum(1), torch.ones(9, dtype=A.dtype))


def test_without_a_share_or_neighbours_classes_stand_alone():
    for A in (text_graph(texts(), 0.0, 3), text_graph(texts(), 0.2, 0), text_graph(texts(1), 0.2, 3)):
        torch.testing.assert_close(A, torch.eye(len(A), dtype=A.dtype))


def test_classes_of_one_text_alone_have_no_neighbour():
    T = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(text_graph(T, 0.2, 3), torch.eye(2, dtype=T.dtype))  # centred they are opposites


def test_layers_are_the_loop():
    A, F = text_graph(texts(), 0.3, 2), texts()
    rng = torch.Generator().manual_seed(2)
    W1, W2 = (torch.randn(*shape, generator=rng, dtype=F.dtype) for shape in ((6, 4), (4, 6)))
    hidden = torch.zeros(9, 4, dtype=F.dtype)
    for c in range(9):
        for o in range(9):
            hidden[c] += A[c, o] * F[o] @ W1
    hidden = torch.where(hidden > 0, hidden, SLOPE * hidden)
    expected = torch.stack([sum(A[c, o] * hidden[o] for o in range(9)) @ W2 for c in range(9)])
    torch.testing.assert_close(propagated(A, F, [W1, W2]), expected)
    torch.testing.assert_close(propagated(A, F, []), F)


def test_from_last_weights_of_zero_their_gradient_still_flows():
    A, F = text_graph(texts(), 0.3, 2), texts()
    W1, W2 = torch.ones(6, 4, dtype=F.dtype, requires_grad=True), torch.zeros(4, 6, dtype=F.dtype, requires_grad=True)
    propagated(A, F, [W1, W2]).square().sum().backward()
    (propagated(A, F, [W1, W2]) * F).sum().backward()
    assert W2.grad.abs().sum() > 0

"""Losses against the sums they stand for."""

from __future__ import annotations

import math

import torch

from cairn.maths.losses import (
    batch_contrast,
    class_cross_entropy,
    mean_squared_cosine,
    normalised_cross_entropy,
    supervised_contrast,
    text_anchor_contrast,
)
from cairn.maths.similarity import cosines, unit


def clustered(n=12, k=3, d=8, seed=0):
    """Unit rows in correlated clusters, unit texts near them, labels."""
    rng = torch.Generator().manual_seed(seed)
    T = unit(torch.randn(k, d, generator=rng, dtype=torch.float64))
    y = torch.arange(n) % k
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    z = unit(T[y] + 0.5 * torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing.T)
    return z, T, y


def test_class_cross_entropy_is_the_written_sum():
    z, T, y = clustered()
    s = 7.0
    total = 0.0
    for i in range(len(z)):
        logits = [s * sum(a * b for a, b in zip(z[i].tolist(), t.tolist(), strict=True)) for t in T]
        total -= logits[y[i]] - math.log(sum(math.exp(value) for value in logits))
    assert math.isclose(class_cross_entropy(z, T, y, s).item(), total / len(z), rel_tol=1e-12)


def test_normalised_cross_entropy_is_the_written_sum():
    z, T, y = clustered()
    H = 5.0 * z @ T.T + torch.tensor([3.0, -1.0, 0.5])
    tau, total = 0.1, 0.0
    for row, label in zip(H.tolist(), y.tolist(), strict=True):
        length = math.sqrt(sum(value * value for value in row))
        logits = [value / (tau * length) for value in row]
        total -= logits[label] - math.log(sum(math.exp(value) for value in logits))
    assert math.isclose(normalised_cross_entropy(H, y, tau).item(), total / len(z), rel_tol=1e-12)
    assert math.isclose(normalised_cross_entropy(9 * H, y, tau).item(), total / len(z), rel_tol=1e-12)


def test_normalised_cross_entropy_of_tasks_divides_by_the_mean_of_their_lengths():
    z, T, y = clustered(k=5)
    H = 5.0 * z @ T.T + torch.tensor([3.0, -1.0, 0.5, 9.0, 0.1])
    tasks = [1, 0, 1, 3, 0]  # of unequal sizes, in no order
    tau, total = 0.1, 0.0
    for row, label in zip(H.tolist(), y.tolist(), strict=True):
        lengths = [math.sqrt(sum(v * v for v, t in zip(row, tasks, strict=True) if t == task)) for task in (0, 1, 3)]
        logits = [value / (tau * sum(lengths) / 3) for value in row]
        total -= logits[label] - math.log(sum(math.exp(value) for value in logits))
    found = normalised_cross_entropy(H, y, tau, torch.tensor(tasks)).item()
    assert math.isclose(found, total / len(z), rel_tol=1e-12)
    assert not math.isclose(normalised_cross_entropy(H, y, tau).item(), found, rel_tol=1e-2)


def test_text_anchor_contrast_is_the_written_sum_over_the_images_of_the_batch():
    z, T, y = clustered()
    y = torch.where(y == 2, 1, y)  # a class that the batch does not hold must not count
    s, total = 7.0, 0.0
    for i in range(len(z)):
        weights = [math.exp(s * float(T[y[i]] @ z[j])) for j in range(len(z))]
        total -= math.log(weights[i] / sum(weights))
    assert math.isclose(text_anchor_contrast(z, T, y, s).item(), total / len(z), rel_tol=1e-12)


def test_gradients_are_exact():
    z, T, y = clustered(n=6)
    for loss in (
        lambda z, T: class_cross_entropy(z, T, y, 3.0),
        lambda z, T: text_anchor_contrast(z, T, y, 3.0),
        lambda z, T: normalised_cross_entropy(z @ T.T, y, 0.1),
    ):
        assert torch.autograd.gradcheck(loss, (z.requires_grad_(), T.requires_grad_()))


def test_cosines_ignore_length_and_survive_zero():
    z, T, _ = clustered()
    torch.testing.assert_close(cosines(3 * z, 0.1 * T), z @ T.T)
    assert torch.equal(unit(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_batch_contrast_is_the_written_sum():
    a, T, y = clustered()
    b = a.flip(0) + T[y]
    total = 0.0
    for i in range(len(a)):
        logits = [sum(p * q for p, q in zip(a[i].tolist(), row.tolist(), strict=True)) for row in b]
        total -= logits[i] - math.log(sum(math.exp(value) for value in logits))
    assert math.isclose(batch_contrast(a, b).item(), total / len(a), rel_tol=1e-12)
    assert not math.isclose(batch_contrast(b, a).item(), total / len(a), rel_tol=1e-3)


def test_mean_squared_cosine_is_the_written_sum_and_an_opposite_text_is_no_further_than_an_equal_one():
    _, T, _ = clustered(k=7)
    new, old = T[:3], T[3:]
    written = sum(sum(float(a @ b) ** 2 for b in old) for a in new) / 12
    torch.testing.assert_close(mean_squared_cosine(new, old).item(), written)
    torch.testing.assert_close(mean_squared_cosine(new, -old), mean_squared_cosine(new, old))


def test_supervised_contrast_is_the_written_sum():
    """Rows without another of their label have no part in it."""
    h, _, y = clustered(n=11, k=4)
    y = torch.cat([y[:-1], torch.tensor([9])])
    tau, values = 0.3, []
    like = [[math.exp(float(a @ b) / tau) for b in h] for a in h]
    for i in range(len(h)):
        alike = [p for p in range(len(h)) if p != i and y[p] == y[i]]
        if alike:
            others = sum(like[i][j] for j in range(len(h)) if j != i)
            values.append(-sum(math.log(like[i][p] / others) for p in alike) / len(alike))
    assert len(values) == 10
    assert math.isclose(supervised_contrast(h, y, tau).item(), sum(values) / 10, rel_tol=1e-12)


def test_supervised_contrast_of_a_pair_is_a_softmax_of_one_against_the_rest():
    h = unit(torch.tensor([[1.0, 0.2], [0.3, 1.0], [-1.0, 0.1]], dtype=torch.float64)).requires_grad_()
    y = torch.tensor([0, 0, 1])
    a, b, c = (h[i].detach() for i in range(3))
    wanted = sum(torch.log1p((row @ c / 0.5 - a @ b / 0.5).exp()) for row in (a, b)) / 2
    value = supervised_contrast(h, y, 0.5)
    torch.testing.assert_close(value.detach(), wanted)
    value.backward()
    assert h.grad is not None
    assert (h.grad[0] @ c) > 0  # a step against the gradient takes it away from a row of another label


def test_supervised_contrast_without_two_of_a_label_is_nothing():
    for n in (1, 3):
        h = torch.eye(3)[:n].requires_grad_()
        value = supervised_contrast(h, torch.arange(n), 0.1)
        value.backward()
        assert value == 0
        assert h.grad is not None
        assert not h.grad.any()

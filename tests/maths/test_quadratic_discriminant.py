"""The discriminant against the formulas as they are written, and leave-one-out against really leaving out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cairn.maths.quadratic_discriminant import QuadraticDiscriminant, ScatterStatistics, predicted_means

BLOCKS = (7, 5)
D = sum(BLOCKS)


def world(counts, seed=0):
    """Correlated, anisotropic rows of classes of unequal size, and a prior mean near each class."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=rng).double() * torch.logspace(0, -1.5, D, dtype=torch.float64)
    centres = 2 * torch.randn(len(counts), D, generator=rng).double()
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    own = 0.5 + torch.rand(len(counts), D, generator=rng).double()
    x = centres[y] + (torch.randn(len(y), D, generator=rng).double() @ mixing.T) * own[y]
    return x, y, centres + 0.3 * torch.randn(len(counts), D, generator=rng).double()


def statistics(x, y, k, rank=None):
    counts, means, factors, cut = [], [], [], []
    A = torch.zeros(D, D).double()
    for c in range(k):
        rows = x[y == c]
        R = rows - rows.mean(0)
        A += R.T @ R
        _, s, V = torch.linalg.svd(R, full_matrices=False)
        F = (s[:, None] * V)[:rank]
        counts.append(float(len(rows)))
        means.append(rows.mean(0))
        factors.append(F)
        cut.append((R.square().sum() - F.square().sum()).item())
    return ScatterStatistics(torch.tensor(counts).double(), torch.stack(means), factors, torch.tensor(cut).double(), A)


def naive(x, y, prior, *, nu, delta, kappa, at, N=None, rho=None, isotropic=None):
    """g_c at rows `at`, class by class, with whole matrices; N, rho and D may be given."""
    k = len(prior)
    n = [int((y == c).sum()) for c in range(k)]
    scatters, means = [], []
    for c in range(k):
        rows = x[y == c]
        mean = rows.mean(0) if len(rows) else torch.zeros(D).double()
        A = (rows - mean).T @ (rows - mean) if len(rows) else torch.zeros(D, D).double()
        gap = mean - prior[c]
        weight = n[c] * delta / (n[c] + delta) if delta else 0.0
        scatters.append(A + weight * torch.outer(gap, gap))
        means.append((n[c] * mean + kappa * prior[c]) / (n[c] + kappa))
    total = sum(scatters)
    if N is None:
        N = sum(m - 1 + (m * delta / (m + delta) if delta else 0.0) for m in n)
        rho = D / (len(x) + D)
        trace = [part.mean() for part in (total.diagonal() / N).split(BLOCKS)]
        isotropic = torch.diag(torch.cat([t.expand(b) for t, b in zip(trace, BLOCKS, strict=True)]))
    S = (1 - rho) * total / N + rho * isotropic
    found = []
    for c in range(k):
        S_c = (nu * S + scatters[c]) / (nu + n[c])
        e = at - means[c]
        found.append(-((e @ torch.linalg.inv(S_c)) * e).sum(1) / 2 - torch.logdet(S_c) / 2)
    return torch.stack(found, 1), (N, rho, isotropic), S


@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("counts", [(9, 4, 30, 2), (1, 6, 1, 3)])
def test_scores_are_the_log_densities_as_written(counts, delta):
    x, y, prior = world(counts)
    at = world((3, 3, 3, 3), seed=5)[0]
    found = QuadraticDiscriminant(statistics(x, y, 4), prior, BLOCKS, nu=float(D), delta=delta).scores(at, 2.0)
    written, _, S = naive(x, y, prior, nu=float(D), delta=delta, kappa=2.0, at=at)
    torch.testing.assert_close(found - torch.logdet(S) / 2, written, rtol=0, atol=1e-8)


@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("counts", [(9, 4, 30, 2), (1, 6, 1, 3), (5,)])
def test_leaving_out_equals_learning_without(counts, delta):
    x, y, prior = world(counts, seed=1)
    kappas = (0.1, 2.0)
    discriminant = QuadraticDiscriminant(statistics(x, y, len(counts)), prior, BLOCKS, nu=1.5 * D, delta=delta)
    found = discriminant.left_out(x, y, kappas)
    for kappa, scores in zip(kappas, found, strict=True):
        _, held, S = naive(x, y, prior, nu=1.5 * D, delta=delta, kappa=kappa, at=x)
        for i in range(len(x)):
            rest = torch.arange(len(x)) != i
            expected, _, _ = naive(
                x[rest], y[rest], prior, nu=1.5 * D, delta=delta, kappa=kappa, at=x[i : i + 1],
                N=held[0], rho=held[1], isotropic=held[2],
            )  # fmt: skip
            torch.testing.assert_close(scores[i] - torch.logdet(S) / 2, expected[0], rtol=0, atol=1e-8)


def test_a_factor_that_was_cut_leaves_its_trace_to_the_common_covariance():
    x, y, prior = world((9, 14, 30, 12))
    whole, short = statistics(x, y, 4), statistics(x, y, 4, rank=2)
    at = x[::7]
    found = QuadraticDiscriminant(short, prior, BLOCKS, nu=float(D)).scores(at, 1.0)
    _, _, S = naive(x, y, prior, nu=float(D), delta=0.0, kappa=1.0, at=at)
    for c in range(4):
        F, n = short.factors[c], whole.counts[c]
        S_c = (D * S + F.T @ F + short.cut[c] / S.trace() * S) / (D + n)
        e = at - (n * whole.means[c] + prior[c]) / (n + 1)
        written = -((e @ torch.linalg.inv(S_c)) * e).sum(1) / 2 - (torch.logdet(S_c) - torch.logdet(S)) / 2
        torch.testing.assert_close(found[:, c], written, rtol=0, atol=1e-8)


def test_one_image_per_class_is_enough():
    x, y, prior = world((1, 1, 1))
    for p in (prior, x.clone()):  # and where the prior knows the images already
        found = QuadraticDiscriminant(statistics(x, y, 3), p, BLOCKS, nu=float(D))
        assert found.scores(x, 0.5).argmax(1).tolist() == [0, 1, 2]
        assert found.left_out(x, y, (0.5,))[0].isfinite().all()


@pytest.mark.parametrize("width", [D, BLOCKS[0]])
def test_predicted_means_are_least_squares_over_the_other_classes(width):
    rng = torch.Generator().manual_seed(3)
    T = torch.randn(6, width, generator=rng).double()
    M = torch.randn(6, D, generator=rng).double()
    M[:, :width] += 0.7 * T + 3
    found = predicted_means(M, T)
    for c in range(6):
        others = [i for i in range(6) if i != c]
        # a and b by a general solver: columns are t and one per dimension
        design = torch.cat([torch.cat([T[i][:, None], torch.eye(width).double()], 1) for i in others])
        solution = torch.linalg.lstsq(design, torch.cat([M[i, :width] for i in others])).solution
        expected = M[others].mean(0)
        expected[:width] = solution[0] * T[c] + solution[1:]
        torch.testing.assert_close(found[c], expected)


def test_without_texts_a_class_is_expected_among_the_others():
    M = torch.randn(4, D, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(predicted_means(M, None)[1], M[[0, 2, 3]].mean(0))
    assert torch.equal(predicted_means(M[:1], None), M[:1])
    alike = torch.ones(4, D).double()  # texts that tell nothing apart
    torch.testing.assert_close(predicted_means(M, alike), predicted_means(M, None))


def test_densities_are_those_of_scipy_up_to_a_constant():
    from scipy.stats import multivariate_normal

    x, y, prior = world((9, 4, 30))
    found = QuadraticDiscriminant(statistics(x, y, 3), prior, BLOCKS, nu=float(D)).scores(x, 1e-9)
    _, _, S = naive(x, y, prior, nu=float(D), delta=0.0, kappa=0.0, at=x)
    columns = []
    for c in range(3):
        rows = x[y == c]
        R = rows - rows.mean(0)
        S_c = (D * S + R.T @ R) / (D + len(rows))
        columns.append(multivariate_normal(rows.mean(0).numpy(), S_c.numpy()).logpdf(x.numpy()))
    expected = torch.tensor(np.array(columns)).T
    constant = D / 2 * math.log(2 * math.pi) + torch.logdet(S) / 2
    torch.testing.assert_close(found, expected + constant, rtol=0, atol=1e-6)

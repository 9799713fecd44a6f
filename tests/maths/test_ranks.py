"""Ranks against torch's Gumbel-Softmax, frequencies, and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from cairn.maths import ranks


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("largest", "wanted"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_candidates_are_powers_of_two_and_the_largest(largest, wanted):
    assert ranks.candidate_ranks(largest).tolist() == wanted


def test_gumbel_softmax_is_torch_s_given_the_same_noise(monkeypatch):
    logits, tau = torch.tensor([0.3, -1.0, 0.7, 0.1]), 0.6
    drawn = torch.rand(4, generator=rng()).clamp(min=1e-6)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda own: own.copy_(-torch.log(drawn)))
    theirs = torch.nn.functional.gumbel_softmax(logits, tau)
    torch.testing.assert_close(ranks.gumbel_softmax(logits, -torch.log(-torch.log(drawn)), tau), theirs)


def test_the_likeliest_of_logits_with_noise_is_each_as_often_as_the_softmax_says():
    logits, n = torch.tensor([0.5, -0.4, 1.2, 0.0]), 20000
    drawn = (logits + ranks.gumbel((n, 4), rng(1))).argmax(1).bincount(minlength=4).numpy()
    assert scipy.stats.chisquare(drawn, (n * logits.double().softmax(0)).numpy()).pvalue > 1e-3


def test_noise_is_finite_and_of_its_generator_alone():
    state = torch.get_rng_state()
    first, second = (ranks.gumbel((1000, 5), rng(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert torch.equal(state, torch.get_rng_state())


def test_the_mask_nests_and_sums_to_the_mean_rank():
    candidates = ranks.candidate_ranks(6)
    p = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    m = ranks.nested_mask(p, candidates)
    naive = [sum(p[j].item() for j, r in enumerate(candidates.tolist()) if i <= r) for i in range(1, 7)]
    np.testing.assert_allclose(m, naive, atol=1e-12)
    assert (m.diff() <= 0).all()
    assert m.sum().item() == pytest.approx((p * candidates).sum().item())


def test_a_hard_choice_has_the_gradient_of_the_soft_one():
    logits = torch.tensor([0.2, 0.9, -0.3], requires_grad=True)
    weight = torch.tensor([1.0, 3.0, 7.0])
    hard = ranks.straight_through(logits.softmax(0))
    assert hard.detach().tolist() == pytest.approx([0, 1, 0])
    (found,) = torch.autograd.grad((hard * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(0) * weight).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_hardness_written_out():
    """And it is all of novelty without old classes, none without new ones."""
    scores = 3 * torch.randn(7, 3, generator=rng(2)).double()
    texts = torch.randn(5, 4, generator=rng(3)) @ torch.randn(4, 4, generator=rng(4)) + 1
    new, old = texts[3:], texts[:3]
    p = scores.numpy()
    p = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    unsure = np.mean([-sum(x * math.log(x) for x in row) for row in p]) / math.log(3)
    t = texts.double().numpy()
    t = t / np.linalg.norm(t, axis=1, keepdims=True)
    gap = 1 - np.mean([max(t[c] @ t[o] for o in range(3)) for c in (3, 4)])
    spread = 1 - np.mean([t[a] @ t[b] for a in range(5) for b in range(5) if a != b])
    assert ranks.hardness(scores, new, old) == pytest.approx(unsure / 2 + min(1, gap / spread) / 2, abs=1e-9)
    assert ranks.hardness(scores, new, old[:0]) == pytest.approx(unsure / 2 + 0.5)
    assert ranks.hardness(scores, new[:0], old) == pytest.approx(unsure / 2)


def test_hardness_stays_within_0_and_1():
    same = torch.ones(2, 3)
    assert ranks.hardness(torch.zeros(4, 2), same, same[:0]) == pytest.approx(1)
    assert ranks.hardness(torch.zeros(4, 1), same[:1], same[:0]) == pytest.approx(0.5)
    assert ranks.hardness(1e4 * torch.eye(2), same, same) == pytest.approx(0, abs=1e-6)
    away = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert ranks.hardness(1e4 * torch.eye(2), away[:1], away[1:]) == pytest.approx(0.5)


def test_the_prior_is_largest_at_the_nearest_rank():
    candidates = ranks.candidate_ranks(16)
    logits = ranks.rank_prior(candidates, 0.3, 0.25)
    assert candidates[logits.argmax()] == 4
    assert logits[3].item() == pytest.approx(-((8 / 16 - 0.3) ** 2) / (2 * 0.25**2))


def products(seed=5):
    """Of two layers of unequal size, correlated."""
    return [torch.randn(n, 3, generator=rng(seed + n)) @ torch.randn(3, n, generator=rng(seed)) for n in (6, 4)]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
def test_the_rank_by_energy_is_the_least_that_suffices(share):
    whole = sum(S.double().square().sum().item() for S in products())

    def kept(rank):
        return sum(ranks.cut(S.double(), rank).square().sum().item() for S in products()) / whole

    rank = ranks.energy_rank(products(), share)
    assert kept(rank) >= share - 1e-9
    assert rank == 1 or kept(rank - 1) < share
    assert rank <= 3


def test_nothing_has_rank_0():
    assert ranks.energy_rank([torch.zeros(3, 3)], 0.95) == 0


def test_what_is_cut_is_the_nearest_matrix_of_that_rank():
    S = products()[0].double()
    for rank in range(4):
        low = ranks.cut(S, rank)
        assert torch.linalg.matrix_rank(low) == rank
        sigma = torch.linalg.svdvals(S)
        assert (S - low).norm().item() == pytest.approx(sigma[rank:].norm().item(), abs=1e-9)
    torch.testing.assert_close(ranks.cut(S, 6), S)

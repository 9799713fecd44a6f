from __future__ import annotations

import ot
import pytest
import torch
from torch.nn.functional import normalize

from cairn.maths.alignment import aligned, local_features, local_scores, padded_tokens


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(n: int = 3, k: int = 4, p: int = 25, L: int = 5, d: int = 12, seed: int = 0):
    """Patches in a few clusters around description tokens, which are clustered themselves: costs that converge slowly."""
    centres = normalize(torch.randn(6, d, generator=rng(seed)), dim=-1)
    D = normalize(
        centres[torch.arange(k * L) % 6] + 0.3 * torch.randn(k * L, d, generator=rng(seed + 1)) / d**0.5, dim=-1
    )
    which = torch.randint(6, (n, p), generator=rng(seed + 2))
    x = normalize(centres[which] + 0.5 * torch.randn(n, p, d, generator=rng(seed + 3)) / d**0.5, dim=-1)
    return x, D.view(k, L, d)


def uniform(D: torch.Tensor) -> torch.Tensor:
    return torch.full(D.shape[:2], 1 / D.shape[1])


def naive(x, D, b, patches, eps, guide="max"):
    """Image by image and class by class, with POT."""
    S = torch.zeros(len(x), len(D))
    for i, rows in enumerate(x):
        for c, tokens in enumerate(D):
            cos = (rows @ tokens.T).double()
            ranked = cos.max(1).values if guide == "max" else cos @ b[c].double()
            kept = cos[ranked.argsort(descending=True)[:patches]]
            a = torch.full((len(kept),), 1 / len(kept), dtype=torch.float64)
            plan = ot.bregman.sinkhorn_log(
                a, b[c].double() / b[c].double().sum(), 1 - kept, eps, numItermax=20000, stopThr=1e-9
            )
            S[i, c] = (plan * kept).sum()
    return S


@pytest.mark.parametrize("guide", ["max", "mean"])
@pytest.mark.parametrize("eps", [0.05, 0.1, 0.5])
def test_scores_are_those_of_pot_problem_by_problem(guide, eps):
    x, D = world()
    b = uniform(D)
    found = local_scores(x, D, b, patches=9, eps=eps, guide=guide, iterations=2000)
    torch.testing.assert_close(found, naive(x, D, b, 9, eps, guide), atol=1e-4, rtol=0)


def test_chunks_change_nothing():
    x, D = world(n=7, k=9)
    b = uniform(D)
    whole = local_scores(x, D, b, patches=6)
    for values in (1, 300, 2000):
        torch.testing.assert_close(local_scores(x, D, b, patches=6, values=values), whole, atol=1e-6, rtol=0)


def test_candidates_get_their_score_and_the_others_the_least_of_them():
    x, D = world(n=5, k=9)
    b = uniform(D)
    whole = local_scores(x, D, b, patches=6)
    picked = torch.stack([torch.randperm(9, generator=rng(i))[:3] for i in range(5)])
    some = local_scores(x, D, b, picked, patches=6)
    torch.testing.assert_close(some.gather(1, picked), whole.gather(1, picked), atol=1e-6, rtol=0)
    rest = torch.ones(5, 9, dtype=torch.bool).scatter(1, picked, False)
    least = whole.gather(1, picked).amin(1, keepdim=True).expand(5, 6)
    torch.testing.assert_close(some[rest].view(5, 6), least, atol=1e-6, rtol=0)


def test_padding_a_class_changes_neither_its_selection_nor_its_score():
    x, D = world(k=3)
    ragged = [D[0], D[1, :2], D[2, :4]]
    padded, b = padded_tokens(ragged)
    torch.testing.assert_close(b.sum(1), torch.ones(3))
    for guide in ("max", "mean"):
        found = local_scores(x, padded, b, patches=6, guide=guide, iterations=2000)
        for c, own in enumerate(ragged):
            alone = local_scores(x, own[None], uniform(own[None]), patches=6, guide=guide, iterations=2000)
            torch.testing.assert_close(found[:, c], alone[:, 0], atol=1e-4, rtol=0)


def test_without_transport_a_score_is_the_mean_of_maxima():
    x, D = world()
    found = local_scores(x, D, uniform(D), patches=7, transport=False)
    cos = torch.einsum("npd,kld->nkpl", x, D).amax(-1)
    torch.testing.assert_close(found, cos.topk(7, dim=-1).values.mean(-1), atol=1e-6, rtol=0)


def test_without_selection_every_patch_is_transported():
    x, D = world()
    cos = torch.einsum("npd,kld->nklp", x, D)
    found = aligned(cos, uniform(D).expand(3, -1, -1), patches=None)
    assert found.chosen.shape == (3, 4, 25)
    torch.testing.assert_close(found.plan.sum(-2), torch.full((3, 4, 25), 1 / 25), atol=1e-5, rtol=1e-2)


def test_the_plan_is_a_constant_and_the_score_is_not():
    x, D = world()
    cos = torch.einsum("npd,kld->nklp", x, D).requires_grad_()
    found = aligned(cos, uniform(D).expand(3, -1, -1), patches=4)
    assert not found.plan.requires_grad
    (gradient,) = torch.autograd.grad(found.score.sum(), cos)
    expected = torch.zeros_like(cos).scatter(-1, found.chosen[:, :, None, :].expand(-1, -1, 5, -1), found.plan)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_no_temperature_gives_nan(eps):
    x, D = world()
    assert torch.isfinite(local_scores(x, D, uniform(D), patches=9, eps=eps)).all()


def test_shares_are_the_transported_likeness_and_sum_to_one():
    x, D = world()
    cos = torch.einsum("npd,kld->nklp", x, D)
    found = aligned(cos, uniform(D).expand(3, -1, -1), patches=6)
    kept = cos.gather(-1, found.chosen[:, :, None].expand(-1, -1, 5, -1))
    likeness = (found.plan * kept.clamp_min(0)).sum(-2)
    torch.testing.assert_close(found.share, likeness / likeness.sum(-1, keepdim=True))
    nothing = aligned(-cos.abs(), uniform(D).expand(3, -1, -1), patches=6)
    torch.testing.assert_close(nothing.share, torch.full((3, 4, 6), 1 / 6))


@pytest.mark.parametrize("values", [1, 400, 2**20])
def test_local_features_are_the_weighted_patches_image_by_image(values):
    x, D = world(n=5, k=9)
    b = uniform(D)
    picked = torch.stack([torch.randperm(9, generator=rng(i))[:3] for i in range(5)])
    prior = torch.softmax(torch.randn(5, 3, generator=rng(9)), 1)
    found = local_features(x, D, b, picked, prior, values=values, patches=6)
    for i, rows in enumerate(x):
        total = torch.zeros(rows.shape[1])
        for c, weight in zip(picked[i].tolist(), prior[i], strict=True):
            one = aligned((D[c] @ rows.T)[None, None], b[c][None, None], patches=6)
            total += weight * one.share[0, 0] @ rows[one.chosen[0, 0]]
        torch.testing.assert_close(found[i], normalize(total, dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_default_sweeps_leave_less_than_a_percent_of_marginal_error(seed):
    x, D = world(n=20, k=6, p=49, L=6, seed=seed)
    cos = torch.einsum("npd,kld->nklp", x, D)
    found = aligned(cos, uniform(D).expand(20, -1, -1), patches=24)
    rows, columns = 6 * found.plan.sum(-1), 24 * found.plan.sum(-2)
    assert max((rows - 1).abs().max(), (columns - 1).abs().max()) < 0.01


def test_a_class_without_tokens_is_refused():
    with pytest.raises(ValueError, match="class 1 has no description token"):
        padded_tokens([torch.ones(2, 3), torch.ones(0, 3)])

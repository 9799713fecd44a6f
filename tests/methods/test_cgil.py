"""CGIL: autoencoders that know their class's shape, and texts that see nothing but what they draw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import rows
from torch.distributions import Normal, kl_divergence

from cairn.config import with_settings
from cairn.data.images import Concatenation, Subset
from cairn.errors import ConfigError
from cairn.maths.gaussian import moments
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.generators import GeneratorMemory
from cairn.memory.replay import ReplayBatches
from cairn.methods.catalogue import METHODS
from cairn.methods.parts import stages
from cairn.methods.parts.autoencoders import Vae, negative_elbo, trained
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.seeds import Seeds

CPU = torch.device("cpu")
FAST = ("generator.steps=20", "stage2.schedule.epochs=2", "stage2.schedule.batch=16")


def build(towers, *assignments):
    entry = METHODS["cgil"]
    config = entry.default_config(towers)
    known = [item for item in FAST if not (item.startswith("generator.") and "generator=gaussian" in assignments)]
    return entry.build(towers, with_settings(config, [*known, *assignments]), seed=1)


def scattered(n, seed, d=6):
    """Rows of one class: correlated, one direction ten times another, far from the origin."""
    rng = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    mean = 4 * torch.randn(d, generator=rng)
    return mean + torch.randn(n, d, generator=rng) @ (axes * torch.logspace(0, -1, d)).T


def taught(groups, seed=1, **settings):
    return trained(Vae(**settings), groups, CPU, Context(Seeds(seed)))


# --- the autoencoders -------------------------------------------------------------------------------------------------


def test_the_bound_is_that_of_torch_distributions():
    rng = torch.Generator().manual_seed(0)
    k, n, d, wide, h = 2, 5, 4, 3, 6
    shapes = ((d, h), (1, h), (h, 2 * wide), (1, 2 * wide), (wide, h), (1, h), (h, d), (1, d), (1, d))
    weights = [0.5 * torch.randn(k, *shape, generator=rng, dtype=torch.float64) for shape in shapes]
    x, noise = (torch.randn(k, n, width, generator=rng, dtype=torch.float64) for width in (d, wide))
    got = negative_elbo(weights, x, noise)
    for c in range(k):
        E, e, F, f, A, a, B, b, log_v = (w[c] for w in weights)
        for i in range(n):
            code = torch.relu(x[c, i] @ E + e[0]) @ F + f[0]
            q = Normal(code[:wide], torch.exp(code[wide:] / 2))
            u = q.mean + q.stddev * noise[c, i]
            p = Normal(torch.relu(u @ A + a[0]) @ B + b[0], torch.exp(log_v[0] / 2))
            wanted = -p.log_prob(x[c, i]).sum() + kl_divergence(q, Normal(torch.zeros(wide), torch.ones(wide))).sum()
            assert got[c, i].item() == pytest.approx(wanted.item() - 0.5 * d * np.log(2 * np.pi), rel=1e-9)


def test_draws_have_the_shape_of_the_class():
    groups = [scattered(400, seed) for seed in (1, 2)]
    made = taught(groups, latent=6, hidden=32, steps=400)
    drawn, labels = GeneratorMemory(torch.tensor([400, 400]), made).draw(4000, torch.Generator().manual_seed(1))
    for c, own in enumerate(groups):
        m, S = moments(own)
        m2, S2 = moments(drawn[labels == c])
        assert (m - m2).norm() < 0.2 * S.trace().sqrt()
        assert (S2 - S).norm() < 0.35 * S.norm()
        assert (S.diagonal().diag() - S).norm() > 0.6 * S.norm()


def test_a_class_is_trained_as_if_it_were_alone():
    one, other, third = (scattered(30, seed) for seed in (1, 2, 3))
    for a, b in zip(taught([one, other], steps=20), taught([one, 50 * third], steps=20), strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a[1], b[1])


def test_the_unit_of_features_does_not_matter():
    own = scattered(30, 1)
    A, a, B, m, s = taught([own], steps=20)
    A2, a2, B2, m2, s2 = taught([0.01 * own + 5], steps=20)
    for one, other in ((A, A2), (a, a2), (0.01 * B, B2), (0.01 * m + 5, m2), (0.01 * s, s2)):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3 * one.abs().max().item())


@pytest.mark.parametrize("count", [1, 3])
def test_a_class_without_scatter_is_as_wide_as_the_others_in_every_direction(count):
    lone, own = scattered(1, 5).repeat(count, 1), scattered(50, 1)
    _, _, B, m, s = taught([own, lone], steps=20)
    assert not B[1].any()
    torch.testing.assert_close(m[1], lone[0])
    torch.testing.assert_close(s[1], own.var(0, correction=0).mean().sqrt().expand(6))
    _, _, B, m, s = taught([lone], steps=20)
    torch.testing.assert_close(s[0], (0.01 * lone[0].square().mean()).sqrt().expand(6))
    torch.testing.assert_close(m[0], lone[0])


def test_the_seed_alone_decides():
    torch.manual_seed(0)
    one = taught([scattered(20, 1)], steps=5)
    torch.manual_seed(1)
    again, other = taught([scattered(20, 1)], steps=5), taught([scattered(20, 1)], seed=2, steps=5)
    assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))
    assert not torch.equal(one.A, other.A)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What stage 2 was given in each task."""
    given = []

    class Watched(ReplayBatches):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            given.append(self)

    monkeypatch.setattr(stages, "ReplayBatches", Watched)
    return given


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_texts_see_draws_of_every_class_and_of_real_rows_the_share_asked_for(flat, stream, seen, share):
    method = build(flat, f"stage2.real_share={share}")
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    real = {tuple(row.tolist()) for row in unit(rows(stream.tasks[1].train))}
    batches = [batch for epoch in seen[1].epochs([torch.Generator().manual_seed(0)]) for batch in epoch]
    inputs = [tuple(row.tolist()) in real for x, _ in batches for row in x]
    drawn = {int(c) for x, y in batches for row, c in zip(x, y, strict=True) if tuple(row.tolist()) not in real}
    assert np.mean(inputs) == pytest.approx(share, abs=0.05)
    assert drawn == (set() if share == 1 else {0, 1, 2, 3})
    if share == 0:
        assert METHODS["cgil"].config().stage2.real_share == 0


def test_the_tower_stands_and_the_texts_move(flat, stream):
    method = build(flat)
    method.learn(stream.tasks[0], Context(Seeds(1)))
    pixels = rows(stream.tests[0])
    assert torch.equal(method.embed(pixels), pixels)
    assert not torch.allclose(method._class_texts, flat._text[:2], atol=1e-4)
    still = build(flat, "stage2.text=templates")
    still.learn(stream.tasks[0], Context(Seeds(1)))
    assert torch.equal(still._class_texts, flat._text[:2])


@pytest.mark.parametrize("generator", ["vae", "gaussian"])
def test_learning_is_for_the_better(flat, stream, generator):
    method = build(flat, f"generator={generator}", "stage2.schedule.epochs=20")
    if generator == "vae":
        method = build(flat, "generator.steps=100", "stage2.schedule.epochs=20")
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
    x = torch.cat([rows(test) for test in stream.tests])
    y = np.concatenate([test.labels for test in stream.tests])
    accuracy, before = (np.mean(scores.argmax(1).numpy() == y) for scores in (method.scores(x), unit(x) @ flat._text.T))
    assert accuracy >= before
    assert isinstance(method.memory, GeneratorMemory if generator == "vae" else GaussianMemory)


def test_gaussians_are_those_of_the_unit_features(flat, stream):
    method = build(flat, "generator=gaussian", "generator.covariance=diagonal")
    method.learn(stream.tasks[0], Context(Seeds(1)))
    x, y = unit(rows(stream.tasks[0].train)).double(), torch.as_tensor(stream.tasks[0].train.labels)
    torch.testing.assert_close(method.memory.mean(1), x[y == 1].mean(0), atol=1e-6, rtol=0)
    assert method.memory.kind.kind == "diagonal"


def test_generators_are_smaller_than_full_gaussians_at_clip_s_width():
    d = 512
    vae, full = Vae().memory(d), GaussianMemory(d)
    k1 = vae.add(
        torch.zeros(1, d), torch.zeros(1, dtype=torch.int64), lambda own: taught(own, steps=1), torch.Generator()
    )
    assert k1.bytes < 0.27 * full.add(torch.zeros(1, d), torch.zeros(1, dtype=torch.int64)).bytes


@pytest.mark.parametrize("generator", ["vae", "gaussian"])
@pytest.mark.parametrize("text", [True, False])
def test_old_classes_alone_and_single_images_are_learned(flat, stream, text, generator):
    flat.has_text = text
    method = build(flat, f"generator={generator}")
    first, second = stream.tasks[:2]
    one = [np.flatnonzero(first.train.labels == c)[:1] for c in range(2)]
    few = np.concatenate([one[0], np.flatnonzero(first.train.labels == 1)])
    method.learn(replace(first, train=Subset(first.train, few, first.train.labels[few])), Context(Seeds(1)))
    again = Subset(first.train, one[0], first.train.labels[one[0]])
    before, kept = method._class_texts, method.memory.means[1]
    method.learn(replace(first, index=1, classes=range(2, 2), names=(), train=again), Context(Seeds(1)))
    assert not torch.equal(before, method._class_texts)
    assert torch.equal(kept, method.memory.means[1])
    method.learn(replace(second, index=2, train=Concatenation([again, second.train])), Context(Seeds(1)))
    assert method.memory.counts.tolist() == [3, 18, 30, 46]
    assert torch.isfinite(method.scores(method.embed(rows(stream.tests[0])))).all()


def test_soft_prompts_need_a_text_tower(flat):
    with pytest.raises(ConfigError, match="no text tower"):
        build(flat, "stage2.text=prompts")
    assert METHODS["cgil"].config().stage2.text.kind == "prompts"
    assert METHODS["cgil"].default_config(flat).stage2.text.kind == "residual"


class Cut(BaseException):
    pass


def test_a_task_cut_off_at_any_step_ends_where_an_untouched_one_does(flat, stream):
    whole = build(flat)
    for task in stream.tasks[:2]:
        whole.learn(task, Context(Seeds(1)))
    start = build(flat)
    start.learn(stream.tasks[0], Context(Seeds(1)))
    work, pieces = {}, 0
    while True:
        kept = Checkpoint(steps=1)

        def keep(now, kept=kept):
            work.update({name: {key: value.clone() for key, value in held.items()} for name, held in now.items()})
            kept.written = getattr(kept, "written", 0) + 1
            if kept.written > 5:
                raise Cut

        kept.begin(dict(work))
        kept.kept_by(keep)
        method = build(flat)
        method.load_state_dict({key: value.clone() for key, value in start.state_dict().items()})
        try:
            method.learn(stream.tasks[1], Context(Seeds(1), checkpoint=kept))
            break
        except Cut:
            pieces += 1
            assert pieces < 50
    assert pieces > 3
    mine, theirs = method.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

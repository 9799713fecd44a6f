"""PROOF: the attention against a naive one, what each part of it starts as, what stands still, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import rows, taught
from torch.nn.functional import cosine_similarity, cross_entropy

from cairn.config import with_settings
from cairn.data.images import Subset
from cairn.maths.similarity import unit
from cairn.memory.exemplars import Exemplars, herded
from cairn.methods import proof
from cairn.methods.catalogue import METHODS
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.seeds import Seeds

FAST = ("schedule.epochs=2", "schedule.batch=16")


def build(towers, *assignments):
    entry = METHODS["proof"]
    config = with_settings(entry.default_config(towers), [*FAST, *assignments])
    return entry.build(towers, config, seed=1)


def learned(towers, tasks, *assignments):
    return taught(build(towers, *assignments), tasks)


def clustered(rng, k, n, d):
    """n rows in k clusters, correlated within each."""
    mixing = rng.normal(size=(d, d)) * np.geomspace(1, 0.1, d)
    centres = rng.normal(size=(k, d)) * 2
    return torch.tensor(centres[np.arange(n) % k] + rng.normal(size=(n, d)) @ mixing.T, dtype=torch.float32)


# --- herding ----------------------------------------------------------------------------------------------------------


def naive_herding(x, mean, number):
    chosen = []
    for m in range(1, number + 1):
        best, least = None, float("inf")
        for i in range(len(x)):
            if i in chosen:
                continue
            distance = float(np.linalg.norm(mean - x[[*chosen, i]].sum(0) / m))
            if distance < least:
                best, least = i, distance
        chosen.append(best)
    return chosen


def test_herding_is_the_greedy_choice():
    x = clustered(np.random.default_rng(0), 3, 25, 6)
    mean = x.mean(0)
    assert herded(x, mean, 9) == naive_herding(x.double().numpy(), mean.double().numpy(), 9)
    assert sorted(herded(x, mean, 99)) == list(range(25))
    assert herded(x, mean, 0) == []


def test_the_herd_has_nearly_the_mean_of_all():
    x = clustered(np.random.default_rng(1), 4, 200, 8)
    herd, first = (x[chosen].mean(0) for chosen in (herded(x, x.mean(0), 20), list(range(20))))
    assert (herd - x.mean(0)).norm() < 0.3 * (first - x.mean(0)).norm()


def test_exemplars_of_a_class_that_comes_back_are_chosen_among_old_and_new_ones():
    rng = np.random.default_rng(2)
    x, y = clustered(rng, 2, 20, 5), torch.arange(20) % 2
    means = torch.stack([x[y == c].mean(0) for c in range(2)])
    first = Exemplars.empty(5).add(x, y, means, 4)
    assert first.sizes.tolist() == [4, 4]
    assert first.labels.tolist() == [0] * 4 + [1] * 4
    more, target = x[y == 1][:6] + 1, means + torch.tensor([[0.0], [0.5]])
    again = first.add(more, torch.ones(6, dtype=torch.int64), target, 4)
    choice = torch.cat([first.rows[4:], more])
    assert torch.equal(again.rows[:4], first.rows[:4])
    assert torch.equal(again.rows[4:], choice[naive_herding(choice.double().numpy(), target[1].double().numpy(), 4)])
    assert torch.equal(again.without(0).rows, again.rows[4:])
    assert again.without(0).bytes == 4 * 5 * 4 + 8
    assert first.sizes.tolist() == [4, 4]


# --- the attention ----------------------------------------------------------------------------------------------------


def naive_fusion(fusion, z, C, number):
    """Every image's set on its own, every row of it attending to every one."""
    found = torch.zeros(len(z), number)
    for i in range(len(z)):
        tokens = torch.cat([z[i : i + 1], C])
        moved = []
        for a in tokens[: number + 1]:
            logits = torch.stack([fusion.scale * (fusion.Q @ a) @ (fusion.K @ b) for b in tokens])
            shares = logits.exp() / logits.exp().sum()
            moved.append(a + sum(w * (fusion.V @ b) for w, b in zip(shares, tokens, strict=True)))
        for j in range(number):
            found[i, j] = cosine_similarity(moved[0], moved[1 + j], dim=0)
    return found


@pytest.fixture
def fusion():
    rng = np.random.default_rng(3)
    made = proof.Fusion(6, 20.0)
    for weight in made.parameters():
        weight.data += torch.tensor(0.6 * rng.normal(size=(6, 6)) * np.geomspace(1, 0.1, 6), dtype=torch.float32)
    return made


def test_the_attention_is_that_over_every_image_s_own_set(fusion):
    rng = np.random.default_rng(4)
    z, C = (unit(clustered(rng, 3, n, 6)) for n in (7, 9))
    found, expected = fusion.cosines(z, C, 5), naive_fusion(fusion, z, C, 5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - z @ C[:5].T).abs().max() > 0.05
    weights = torch.tensor(rng.normal(size=(7, 5)), dtype=torch.float32)
    for value in (found, expected):
        fusion.zero_grad()
        (value * weights).sum().backward()
        grads = [weight.grad.clone() for weight in fusion.parameters()]
        if value is found:
            first = grads
    for one, other in zip(first, grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_rows_that_are_not_asked_for_count_as_context(fusion):
    C = unit(clustered(np.random.default_rng(5), 3, 9, 6))
    z = C[:2] + 0.1
    assert (fusion.cosines(z, C, 5) - fusion.cosines(z, C[:5], 5)).abs().max() > 1e-3


# --- the method -------------------------------------------------------------------------------------------------------


def test_it_starts_as_texts_and_means_beside_each_other(flat, stream):
    method = learned(flat, stream.tasks, "schedule.epochs=0")
    x = unit(rows(stream.tests[0]))
    p = torch.stack(
        [unit(rows(task.train))[task.train.labels == c].mean(0) for task in stream.tasks for c in task.classes]
    )
    expected = flat.logit_scale * (2 * x @ method.anchors.T + x @ unit(p).T) / 3
    torch.testing.assert_close(method.scores(method.embed(rows(stream.tests[0]))), expected, atol=1e-4, rtol=1e-4)


def test_scores_are_the_mean_of_projected_visual_and_textual_matching(flat, stream):
    method = learned(flat, stream.tasks)
    state, s = method.state_dict(), flat.logit_scale
    A, B = (
        torch.eye(16) + state[f"projectors.{side}.finished"] + state[f"projectors.{side}.current"]
        for side in ("visual", "textual")
    )
    x = unit(rows(stream.tests[1])[:4])
    z, W, p = unit(x @ A.T), unit(method.anchors @ B.T), unit(method.means.means @ A.T)
    fused = naive_fusion(method.fusion, z, torch.cat([p, W, method.prompts]), 12).detach()
    expected = s * (z @ W.T + fused[:, :6] + fused[:, 6:]) / 3
    torch.testing.assert_close(method.scores(x), expected, atol=2e-3, rtol=1e-4)
    assert (fused[:, :6] - z @ p.T).abs().max() > 1e-2


def test_the_loss_is_the_sum_of_three_cross_entropies_on_images_and_exemplars(flat, stream, monkeypatch):
    seen = {}

    def spy(loss, parameters, batches, *_):
        x, y = next(batches.epoch(torch.Generator().manual_seed(0)))
        seen.update(loss=loss(x, y), x=x, y=y, batches=batches, trained=parameters)

    method = learned(flat, stream.tasks[:1], "prompts=2")
    before = method.exemplars
    monkeypatch.setattr(proof, "fit", spy)
    method.learn(stream.tasks[1], Context(Seeds(1)))
    # The spy trained nothing, so the prompts that were kept are those the loss was taken with.
    three = method._three(seen["x"])
    torch.testing.assert_close(seen["loss"], sum(cross_entropy(scores, seen["y"]) for scores in three))
    own = len(stream.tasks[1].train)
    assert torch.equal(seen["batches"].features[own:], before.rows)
    assert torch.equal(seen["batches"].labels[own:], before.labels)
    assert before.labels.tolist() == [0] * 20 + [1] * 18  # of the second class there are no more
    assert sorted(tuple(p.shape) for p in seen["trained"]) == [(2, 16), *[(16, 16)] * 5]


def test_finished_projections_and_prompts_stand_still_and_the_attention_is_trained_on(flat, stream):
    method = learned(flat, stream.tasks[:1])
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.learn(stream.tasks[1], Context(Seeds(1)))
    after = method.state_dict()
    for side in ("visual", "textual"):
        whole = before[f"projectors.{side}.finished"] + before[f"projectors.{side}.current"]
        assert torch.equal(after[f"projectors.{side}.finished"], whole)
        assert whole.abs().max() > 0
        assert after[f"projectors.{side}.current"].abs().max() > 0
    assert torch.equal(after["prompts"][:3], before["prompts"])
    assert after["prompts"].shape == (6, 16)
    assert all(not torch.equal(after[f"fusion.{name}"], before[f"fusion.{name}"]) for name in "QKV")


@pytest.mark.parametrize(("number", "kept"), [(0, 0), (3, 18), (99, 180)])
def test_so_many_exemplars_are_kept_of_each_class(flat, stream, number, kept):
    method = learned(flat, stream.tasks, f"exemplars={number}")
    assert len(method.exemplars.rows) == kept
    assert method.memory_bytes == kept * 16 * 4 + 6 * (16 * 4 + 8 + 8)
    known = {tuple(row.tolist()) for task in stream.tasks for row in unit(rows(task.train))}
    assert all(tuple(row.tolist()) in known for row in method.exemplars.rows)


def test_exemplars_hold_old_classes_in_place(flat, stream):
    losses = []
    for number in (0, 20):
        method = learned(flat, stream.tasks, f"exemplars={number}")
        truth = torch.as_tensor(stream.tests[0].labels)
        losses.append(cross_entropy(method.scores(rows(stream.tests[0])), truth).item())
    assert losses[1] < 0.8 * losses[0]


def test_without_prompts_the_context_is_the_classes_alone(flat, stream):
    method = learned(flat, stream.tasks, "prompts=0")
    assert len(method.prompts) == 0
    assert torch.isfinite(method.scores(rows(stream.tests[0]))).all()
    with_some = learned(flat, stream.tasks)
    assert (method.scores(rows(stream.tests[0])) - with_some.scores(rows(stream.tests[0]))).abs().max() > 1e-2


def test_one_image_per_class_and_no_texts_will_do(embedded_dataset, stream):
    held = embedded_dataset.embeddings
    bare = FeatureTowers(
        name="made", dim=held.dim, logit_scale=20.0, fingerprint="made", names=embedded_dataset.classes, text=None
    )
    task = stream.tasks[0]
    first = np.unique(task.train.labels, return_index=True)[1]
    method = learned(bare, [replace(task, train=Subset(task.train, first, task.train.labels[first]))])
    assert method.scores(unit(rows(task.train))[first]).argmax(1).tolist() == [0, 1]
    assert method.exemplars.sizes.tolist() == [1, 1]

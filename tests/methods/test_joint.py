"""Joint training as a bound: what is held out, how classifiers are weighed, and that training that does harm has no say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.kernel_ridge
import torch
from torch.nn.functional import cross_entropy, one_hot

from cairn.config import with_settings
from cairn.data.embeddings import Rows
from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.maths.kernels import arc_cosine
from cairn.maths.similarity import unit
from cairn.methods.blend import Blend, BlendConfig
from cairn.methods.catalogue import METHODS
from cairn.methods.joint import chosen
from cairn.methods.parts.kernel_ridge import RIDGES, KernelRidge
from cairn.methods.parts.pooled import best_pool, pool_weights, pooled
from cairn.towers.feature_file import features_towers
from cairn.training.context import Context
from cairn.training.seeds import Seeds

SIZES = torch.tensor([60, 9, 25])


def correlated(d=5, seed=0):
    """Three classes of unequal sizes and one scatter that is neither diagonal nor isotropic; a fifth of the rows held out."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(3).repeat_interleave(SIZES)
    mixing = torch.randn(d, d, generator=rng) * torch.logspace(0, -1, d)
    means = torch.randn(3, d, generator=rng)
    return means[y] + torch.randn(len(y), d, generator=rng) @ mixing.T, y, torch.rand(len(y), generator=rng) < 0.2


def theirs(z, y, lam, unseen, k=3):
    """Scores of `unseen` by scikit-learn."""
    head = sklearn.kernel_ridge.KernelRidge(alpha=lam, kernel="precomputed").fit(
        arc_cosine(z, z), one_hot(y, k).double()
    )
    return torch.from_numpy(head.predict(arc_cosine(unseen, z)))


def test_the_ridge_is_that_of_scikit_learn_and_the_best_on_the_rows_held_out():
    z, y, out = correlated()
    head = KernelRidge(5)
    found = head.fit(z, y, 3, out)
    each = {lam: theirs(z[~out], y[~out], lam, z[out]) for lam in RIDGES}
    errors = {lam: float((f - one_hot(y[out], 3)).square().sum()) for lam, f in each.items()}
    assert head.lam == min(errors, key=errors.get)
    assert RIDGES[0] < head.lam < RIDGES[-1]
    torch.testing.assert_close(found, each[head.lam])
    x = correlated(seed=1)[0]
    torch.testing.assert_close(head(x).double(), theirs(z, y, head.lam, x), atol=1e-5, rtol=1e-5)


def test_a_class_that_the_ridge_forgets_was_never_learned():
    z, y, out = correlated()
    head, other = KernelRidge(5), KernelRidge(5)
    head.fit(z, y, 3, out)
    head.forget(1)
    left = y != 1
    other.lam = head.lam
    other.fit(z[left], y[left] // 2, 2, torch.zeros(int(left.sum()), dtype=torch.bool))
    assert torch.equal(head(z), other(z))
    assert len(head.Z) == int(left.sum())


def test_weights_are_those_of_the_smallest_penalised_loss():
    rng = torch.Generator().manual_seed(1)
    y = torch.arange(40) % 3
    good = one_hot(y, 3) + 0.4 * torch.randn(40, 3, generator=rng)
    scores = [good, 100 * torch.randn(40, 3, generator=rng)]
    w = pool_weights(scores, y)
    v0 = -torch.stack([2 * f.double().std(1).mean() for f in scores]).log()

    def value(v):
        f = sum(weight * part.double() for weight, part in zip(v.exp(), scores, strict=True))
        return float(cross_entropy(f, y, reduction="sum") + ((v - v0) ** 2).sum() / 2)

    best = value(w.log())
    for j in range(2):
        for step in (-0.05, 0.05):
            moved = w.log().clone()
            moved[j] += step
            assert value(moved) > best
    assert w[0] > 2 * v0.exp()[0]
    assert w[1] < 0.8 * v0.exp()[1]
    torch.testing.assert_close(pool_weights([f[:0] for f in scores], y[:0]), torch.full((2,), 0.5, dtype=torch.float64))


def test_of_what_tells_nothing_a_lot_of_rows_leave_next_to_nothing():
    rng = torch.Generator().manual_seed(2)
    y = torch.randint(4, (3000,), generator=rng)
    good = one_hot(y, 4) + 0.3 * torch.randn(3000, 4, generator=rng)
    noise = torch.randn(3000, 4, generator=rng)
    w = pool_weights([good, noise], y)
    assert w[1] * noise.std() < 0.1 * w[0] * good.std()


def test_the_pool_that_tells_most_rows_right_is_taken_and_the_first_of_several():
    """A third classifier is right by a hair where the second is sure and wrong: likelihood takes both, accuracy the third alone."""
    y = torch.arange(40) % 2
    wrong = torch.arange(40) < 12
    sure = one_hot(torch.where(wrong, 1 - y, y), 2) * 4.0
    hair = one_hot(y, 2) * torch.where(wrong, 1e-3, 50.0)[:, None]
    scores = [sure, hair]
    assert (pooled(pool_weights(scores, y), scores).argmax(1) != y).any()
    alone = best_pool(scores, y, [(0, 1), (1,)])
    assert alone[0] == 0
    assert alone[1] == pool_weights([hair], y)[0]
    same = [hair, 2 * hair]
    assert torch.equal(best_pool(same, y, [(0, 1), (1,)]), pool_weights(same, y))


def test_a_pool_that_tells_more_rows_right_by_no_more_than_chance_is_not_taken():
    """Five of 40 rows that only the later one tells are more than two deviations of chance, four are not."""
    y = torch.arange(40) % 2
    for missed, later in ((4, False), (5, True)):
        first = one_hot(torch.where(torch.arange(40) < missed, 1 - y, y), 2).double()
        scores = [first, one_hot(y, 2).double()]
        assert bool(best_pool(scores, y, [(0,), (1,)])[1]) is later


def test_a_share_of_each_class_is_held_out_and_never_all_of_it():
    labels = np.repeat([4, 5, 6, 7], [11, 1, 2, 5])
    out = chosen(labels, 0.2, torch.Generator().manual_seed(0))
    assert [int(out[labels == c].sum()) for c in (4, 5, 6, 7)] == [2, 0, 1, 1]
    assert not torch.equal(out, chosen(labels, 0.2, torch.Generator().manual_seed(1)))
    assert [int(chosen(labels, 0.9, torch.Generator())[labels == c].sum()) for c in (4, 5, 6, 7)] == [10, 0, 1, 4]


def build(towers, *assignments):
    entry = METHODS["joint"]
    return entry.build(towers, with_settings(entry.default_config(towers), assignments), seed=1)


def test_no_training_by_descent_sees_an_image_held_out(towers, small_stream, monkeypatch):
    seen = []

    def vision(stage, encoder, anchors, batches, *_):
        seen.append([row.numpy().tobytes() for pixels, _ in batches.ordered() for row in pixels])

    def text(stage, texts, z, y, *_):
        seen.append(z)

    monkeypatch.setattr("cairn.methods.joint.align_vision", vision)
    monkeypatch.setattr("cairn.methods.joint.align_text", text)
    method = build(towers)
    for task in small_stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    images = torch.cat(
        [
            pixels
            for task in small_stream.tasks[:2]
            for pixels, _ in Loader(task.train, towers.prepare, towers.pixels).ordered()
        ]
    )
    out = torch.cat(method.out)
    assert 0 < out.sum() < len(out)
    assert sorted(seen[2]) == sorted(row.numpy().tobytes() for row in images[~out])
    with torch.no_grad():
        torch.testing.assert_close(seen[3], unit(towers.image(images))[~out], atol=1e-5, rtol=1e-5)


def right(method, stream, towers):
    """Accuracy on the test images of all classes."""
    with torch.no_grad():
        found = [
            method.scores(method.embed(pixels)).argmax(1) == y
            for test in stream.tests
            for pixels, y in Loader(test, towers.prepare, towers.pixels).ordered()
        ]
    return torch.cat(found).double().mean().item()


def alone(method, j):
    """The j-th classifier without the others: texts as they came and as trained, ridges on z0 and z, blend."""
    method.weights = torch.eye(5, dtype=torch.float64)[j]
    return method


def test_training_that_ruins_the_encoder_does_no_harm(towers, small_stream):
    plain = build(towers, "stage1.tuning=none", "stage2.schedule.epochs=0")
    ruined = build(towers, "stage1.schedule.lr=0.3", "stage1.schedule.epochs=1", "stage2.schedule.epochs=1")
    for method in (plain, ruined):
        for task in small_stream.tasks:
            method.learn(task, Context(Seeds(1)))
    reached = right(ruined, small_stream, towers)
    assert reached >= right(plain, small_stream, towers) - 0.05
    assert right(alone(ruined, 1), small_stream, towers) < reached - 0.2
    assert right(alone(ruined, 3), small_stream, towers) < reached - 0.2


@pytest.fixture
def embeddings(embedded_dataset):
    """Six classes of unequal sizes that overlap, each of two clusters; test rows are many, and drawn like those for training."""
    rng = np.random.default_rng(3)
    d, texts = 16, embedded_dataset.embeddings.text
    centres = texts[:, None] + rng.normal(size=(6, 2, d))
    mixing = rng.normal(size=(d, d)) / d**0.5 * np.geomspace(3.0, 0.3, d)

    def rows(counts):
        labels = np.repeat(np.arange(6), counts)
        values = centres[labels, rng.integers(2, size=len(labels))] + rng.normal(size=(len(labels), d)) @ mixing.T
        return Rows(values.astype(np.float32), labels, "made")

    made = replace(embedded_dataset, train=rows((60, 25, 40, 70, 30, 50)), test=rows((300,) * 6))
    return features_towers(made, "made.safetensors"), task_stream(made, step=2)


def blended(flat, stream):
    """Blend by itself."""
    blend = Blend(flat, BlendConfig.embedding(), seed=1)
    for task in stream.tasks:
        blend.learn(task, Context(Seeds(1)).at(task=task.index))
    return blend


def test_scores_are_the_weighed_sum_of_texts_ridges_and_blend(embeddings):
    flat, stream = embeddings
    method = build(flat)
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
    method.weights = torch.tensor([0.5, 0.2, 3.0, 2.0, 0.3], dtype=torch.float64)
    x = torch.stack([torch.as_tensor(stream.tests[0][i]) for i in range(8)])
    train = torch.cat([torch.stack([torch.as_tensor(t.train[i]) for i in range(len(t.train))]) for t in stream.tasks])
    y = torch.cat([torch.as_tensor(task.train.labels) for task in stream.tasks])
    with torch.no_grad():
        z, t = unit(method.image(x)), method.texts()
        parts = [
            flat.logit_scale * unit(x) @ flat.class_texts(stream.class_names, ()).T,
            flat.logit_scale * z @ t.T,
            theirs(unit(train), y, method.ridges[0].lam, x, 6),
            theirs(unit(method.image(train)), y, method.ridges[1].lam, z, 6),
            blended(flat, stream).scores(x),
        ]
        found = method.scores(method.embed(x))
    expected = sum(float(w) * part for w, part in zip(method.weights, parts, strict=True))
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)


def test_where_nothing_can_be_held_out_it_is_blend(embeddings):
    flat, stream = embeddings
    first = [np.flatnonzero(task.train.labels == c)[0] for task in stream.tasks for c in task.classes]
    labels = np.arange(6)
    rows = [np.asarray(stream.tasks[c // 2].train[i]) for c, i in enumerate(first)]
    tasks = [
        replace(task, train=Rows(np.stack(rows[2 * t : 2 * t + 2]), labels[2 * t : 2 * t + 2], "made"))
        for t, task in enumerate(stream.tasks)
    ]
    method = build(flat)
    for task in tasks:
        method.learn(task, Context(Seeds(1)))
    assert method.held_out is None
    assert method.weights[:-1].tolist() == [0.0] * 4
    x = torch.stack([torch.as_tensor(stream.tests[0][i]) for i in range(50)])
    blend = blended(flat, replace(stream, tasks=tuple(tasks)))
    with torch.no_grad():
        found, expected = method.scores(method.embed(x)), method.weights[-1] * blend.scores(x)
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-6, rtol=1e-6)


def test_on_a_world_of_embeddings_no_method_tells_more_right(embeddings):
    """By more than half a point, nine of the 1800 test rows."""
    flat, stream = embeddings
    reached = {}
    for name in ("joint", "zero-shot", "simplecil", "lda", "acil", "ranpac", "blend"):
        entry = METHODS[name]
        method = entry.build(flat, entry.default_config(flat), seed=1)
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
        reached[name] = right(method, stream, flat)
    assert reached["joint"] >= max(reached.values()) - 0.005

"""Blend: what leaving out, forgetting and few images do to it; its parts have tests of their own in maths and memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn.data.embeddings import Embeddings, Rows
from cairn.data.images import Dataset, Subset
from cairn.data.stream import task_stream
from cairn.methods.blend import TEXT, Blend, BlendConfig
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context, Log
from cairn.training.seeds import Seeds


def towers_of(dataset, text=None):
    held = dataset.embeddings
    return FeatureTowers(
        name="made",
        dim=held.dim,
        logit_scale=held.logit_scale,
        fingerprint="made",
        names=dataset.classes,
        text=text,
    )


def learned(dataset, tasks, texts=None, **settings):
    method = Blend(towers_of(dataset, texts), BlendConfig(patches="none", **settings), seed=1)
    for task in tasks:
        method.learn(task, Context(Seeds(1)))
    return method


def accuracy(method, stream):
    found = []
    for test in stream.tests:
        x = torch.tensor(np.stack([test[i] for i in range(len(test))]))
        found.append((method.scores(method.embed(x)).argmax(1).numpy() == test.labels).mean())
    return float(np.mean(found))


def some(task, number):
    labels = task.train.labels
    rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[:number] for c in np.unique(labels)]))
    return replace(task, train=Subset(task.train, rows, labels[rows]))


@pytest.fixture
def world(embedded_dataset):
    return embedded_dataset, task_stream(embedded_dataset, step=2), embedded_dataset.embeddings.text


def test_it_is_not_below_any_of_its_parts(world):
    dataset, stream, text = world
    whole = accuracy(learned(dataset, stream.tasks, text), stream)
    for settings in ({"text": False}, {"features": 0}, {"text": False, "features": 0}):
        assert whole >= accuracy(learned(dataset, stream.tasks, text, **settings), stream) - 0.03


def test_texts_that_tell_nothing_lose_their_weight(world):
    dataset, stream, text = world
    noise = np.random.default_rng(0).normal(size=text.shape).astype(np.float32)
    method, without = learned(dataset, stream.tasks, noise), learned(dataset, stream.tasks)
    assert method.pool.weights[1] < TEXT
    assert accuracy(method, stream) >= accuracy(without, stream) - 0.03
    trusted = learned(dataset, stream.tasks, text)
    assert trusted.pool.weights[1] > method.pool.weights[1]


@pytest.mark.parametrize("number", [1, 2])
def test_few_images_of_a_class_do_better_with_texts(world, number):
    dataset, stream, text = world
    tasks = [some(task, number) for task in stream.tasks]
    assert accuracy(learned(dataset, tasks, text), stream) >= accuracy(learned(dataset, tasks), stream)


def test_classes_may_come_one_by_one(world):
    dataset, _, text = world
    stream = task_stream(dataset, step=1)
    method = learned(dataset, stream.tasks, text)
    assert method.memory.classes == 6
    assert accuracy(method, stream) > 0.8


def test_a_class_that_comes_back_is_learned_on(world):
    dataset, stream, text = world
    first = stream.tasks[0]
    labels = first.train.labels
    halves = [
        Subset(first.train, rows, labels[rows]) for rows in (np.arange(0, len(labels), 2), np.arange(1, len(labels), 2))
    ]
    again = replace(first, index=1, names=(), classes=range(2, 2), train=halves[1])
    method = learned(dataset, [replace(first, train=halves[0]), again], text, precision="float64")
    whole = learned(dataset, [first], text, precision="float64")
    assert method.memory.counts.tolist() == whole.memory.counts.tolist()
    torch.testing.assert_close(method.memory.scatter, whole.memory.scatter, rtol=0, atol=1e-8)
    torch.testing.assert_close(method.memory.means, whole.memory.means, rtol=0, atol=1e-8)
    torch.testing.assert_close(method.gram.solution(0.1), whole.gram.solution(0.1), rtol=1e-3, atol=1e-4)


def test_the_gaussians_of_a_forgotten_class_leave_no_trace(world):
    dataset, stream, text = world
    exact = {"features": 0, "precision": "float64"}
    method = learned(dataset, stream.tasks, text, **exact)
    method.forget(1)
    x = torch.randn(20, dataset.embeddings.dim, generator=torch.Generator().manual_seed(0))
    rows = method.memory_rows(x).double()
    kept = [c for c in range(6) if c != 1]

    other = Blend(towers_of(dataset, text), BlendConfig(patches="none", **exact), seed=1)
    data = [
        (method.memory_rows(torch.tensor(np.stack([t.train[i] for i in range(len(t.train))]))), t.train.labels)
        for t in stream.tasks
    ]
    z, y = torch.cat([z for z, _ in data]), torch.from_numpy(np.concatenate([labels for _, labels in data]))
    never = y != 1
    other.texts = method.texts
    other._set(other.memory.add(z[never], y[never] - (y[never] > 1).long()).stored())
    torch.testing.assert_close(
        method._gaussians().scores(rows, 2.0), other._gaussians().scores(rows, 2.0), rtol=0, atol=1e-8
    )
    assert method.texts.shape[0] == len(kept)


def test_a_hundred_classes_take_what_the_documents_say():
    assert Blend.card.bytes(100, 512, 50_000, 4 * 512, 512) == pytest.approx(16.6e6, rel=5e-3)


def test_compact_is_small(world):
    dataset, stream, text = world
    whole, compact = learned(dataset, stream.tasks, text), learned(dataset, stream.tasks, text, rank=4, features=128)
    assert compact.memory_bytes < whole.memory_bytes / 10
    assert accuracy(compact, stream) > accuracy(whole, stream) - 0.1


def drawn_world(seed, k=12, d=60):
    """Gaussians near one another with a spectrum that falls, half of the classes of 8 rows and half of 80; (dataset, counts)."""
    rng = np.random.default_rng(seed)
    centres, spectrum = 0.2 * rng.normal(size=(k, d)), np.geomspace(1, 0.2, d)
    counts = np.where(np.arange(k) % 2, 80, 8)

    def rows(numbers):
        labels = np.repeat(np.arange(k), numbers)
        noise = rng.normal(size=(len(labels), d)) * spectrum
        return Rows((centres[labels] + noise).astype(np.float32), labels, "drawn")

    held = Embeddings(dim=d, text=None, logit_scale=100.0, fingerprint="drawn", name="drawn")
    names = tuple(f"class_{c}" for c in range(k))
    return Dataset("drawn", names, rows(counts), rows(np.full(k, 60)), ("a photo of a {}.",), held), counts


def test_classes_as_likely_as_they_have_images():
    """Bayes' rule: log n_c more for each class, and more right where it is true."""
    right = {"equal": 0.0, "counts": 0.0}
    for seed in range(3):
        dataset, counts = drawn_world(seed)
        stream = task_stream(dataset, step=6)
        x, y = torch.from_numpy(dataset.test.values), torch.from_numpy(dataset.test.labels)
        n = torch.from_numpy(counts).double()
        methods = {prior: learned(dataset, stream.tasks, class_prior=prior) for prior in right}
        scores = {prior: method.scores(method.embed(x)).double() for prior, method in methods.items()}
        torch.testing.assert_close(scores["counts"], scores["equal"] + n.log(), rtol=1e-5, atol=1e-4)
        for prior in right:
            hits = (scores[prior].argmax(1) == y).double()
            right[prior] += (hits * n[y]).sum().item() / n[y].sum().item()
    assert right["counts"] > right["equal"], right


def test_classes_of_few_images_are_not_lost_to_those_of_many():
    """Eight rows do not tell as much as eighty, but no class may go under: mean accuracy over classes of few and of many."""
    few, many = [], []
    for seed in range(3):
        dataset, counts = drawn_world(seed)
        stream = task_stream(dataset, step=6)
        method = learned(dataset, stream.tasks)
        x, y = torch.from_numpy(dataset.test.values), dataset.test.labels
        hits = method.scores(method.embed(x)).argmax(1).numpy() == y
        few.append(hits[counts[y] == 8].mean())
        many.append(hits[counts[y] == 80].mean())
    assert np.mean(few) > 0.83, (few, many)
    assert np.mean(few + many) > 0.87, (few, many)


# --- images without labels ----------------------------------------------------------------------------------------------


@pytest.fixture
def few(embedded_dataset):
    return task_stream(embedded_dataset, step=3, labelled=0.1)


def rows_of(images):
    return torch.stack([torch.as_tensor(images[i]) for i in range(len(images))])


def test_images_without_labels_are_learned_as_what_they_look_like_among_the_classes_of_the_task(embedded_dataset, few):
    """In double precision: sums as those of a blend for which they had these labels, chosen by the labelled ones."""
    text, settings = embedded_dataset.embeddings.text, {"precision": "float64", "threshold": 0.5, "rank": None}
    method, events = learned(embedded_dataset, few.tasks[:1], text, **settings), []
    task = few.tasks[1]
    before = learned(embedded_dataset, few.tasks[:1], text, **settings)
    before.learn(replace(task, unlabelled=None), Context(Seeds(1)))
    scores = before.scores(before.embed(rows_of(task.unlabelled))).double().numpy()[:, 3:]  # none is of an old class
    likely = np.exp(scores - scores.max(1, keepdims=True))
    likely /= likely.sum(1, keepdims=True)
    sure = likely.max(1) >= 0.5

    method.learn(task, Context(Seeds(1), Log(keep=events.append)))
    (told,) = [event for event in events if event["event"] == "unlabelled"]
    assert (told["images"], told["trusted"]) == (len(task.unlabelled), int(sure.sum()))
    assert sure.sum() > 0

    labels = np.concatenate([task.train.labels, 3 + likely.argmax(1)[sure]])
    values = np.concatenate([rows_of(task.train).numpy(), rows_of(task.unlabelled).numpy()[sure]])
    taken = learned(embedded_dataset, few.tasks[:1], text, **settings)
    taken.learn(replace(task, train=Rows(values, labels, "made"), unlabelled=None), Context(Seeds(1)))
    assert torch.equal(method.memory.counts, taken.memory.counts)
    torch.testing.assert_close(method.memory.means, taken.memory.means)
    torch.testing.assert_close(method.memory.scatter, taken.memory.scatter)
    torch.testing.assert_close(method.gram.G, taken.gram.G)
    torch.testing.assert_close(method.gram.C, taken.gram.C)
    assert before.left_out is not None
    assert method.left_out is None  # what the others were taken for was told by every image with a label
    assert torch.equal(method.texts, taken.texts)


def test_without_them_it_is_as_if_there_were_none(embedded_dataset, few):
    off = learned(embedded_dataset, few.tasks, unlabelled=False).state_dict()
    none = learned(embedded_dataset, [replace(task, unlabelled=None) for task in few.tasks]).state_dict()
    assert off.keys() == none.keys()
    assert all(torch.equal(off[key], none[key]) for key in off)
    sure = learned(embedded_dataset, few.tasks, threshold=1.0).state_dict()  # none is
    assert all(torch.equal(sure[key], none[key]) for key in none)


def test_images_without_labels_teach():
    """With one to eight labels of a class: what others look like tells where it lies."""
    gained = []
    for seed in range(3):
        dataset, _ = drawn_world(seed)
        stream = task_stream(dataset, step=4, labelled=0.1)
        with_them = accuracy(learned(dataset, stream.tasks), stream)
        gained.append(with_them - accuracy(learned(dataset, stream.tasks, unlabelled=False), stream))
    assert np.mean(gained) > 0.02, gained

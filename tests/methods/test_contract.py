"""What every method promises, on images and, where it can, on embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn.classifier.stored import copied
from cairn.config import settings, with_values
from cairn.data.images import Concatenation, Subset, Unlabelled
from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.errors import ExemplarsKept
from cairn.experiment.evaluator import Evaluator
from cairn.experiment.exemplar_check import looked_for, refuse_exemplars
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import (
    CAPABILITIES,
    CosineScoring,
    GaussianScoring,
    KeepsImages,
    KeepsSums,
    LearnsUnlabelled,
    NamesClasses,
)
from cairn.towers.catalogue import load_towers
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

TOGETHER = {
    "blend": "a covariance of all classes and what texts predict are parts of each class",
    "spa": "the classes that look at an image make its local feature",
    "lda": "a pooled covariance is then shrunk as one of fewer images",
    "joint": "what is fitted on all images at once is fitted again without those of the class",
    "proof": "classes are each other's context",
    "engine": "the likeliest classes are compared pair by pair",
    "segment": "classes have shares of a patch",
    "capnet": "classes take from their neighbours in the graph of texts",
    "reco": "what is found of other classes refines images and texts",
}
"""Methods in which a class has a part in the scores of others, so that these change when it is forgotten."""

CASES = [(name, form) for name in METHODS for form in ("images", "embeddings")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def world(request, towers, small_stream, embedded_dataset):
    """(method's row, towers, stream) for every row and form."""
    name, form = request.param
    if form == "images":
        return METHODS[name], towers, small_stream
    held = embedded_dataset.embeddings
    flat = FeatureTowers(
        name="made",
        dim=held.dim,
        logit_scale=held.logit_scale,
        fingerprint="made",
        names=embedded_dataset.classes,
        text=held.text,
    )
    return METHODS[name], flat, task_stream(embedded_dataset, step=2)


def build(entry, towers, seed=1):
    config = entry.default_config(towers)
    known = {path for path, _, _ in settings(config)}
    config = with_values(config, [(key, value) for key, value in entry.card.quick.items() if key in known])
    return entry.build(towers, config, seed=seed)


PIXELS = {}


def seen_later(stream, towers):
    """The test images of the one stream there is in each form, as the towers take them."""
    if towers.has_images not in PIXELS:
        loaders = [Loader(test, towers.prepare, towers.pixels) for test in stream.tests]
        PIXELS[towers.has_images] = torch.cat([pixels for loader in loaders for pixels, _ in loader])
    return PIXELS[towers.has_images].clone()


TAUGHT = {}
"""Of one row of methods, in one form, the states after each task: tests come row by row."""


def taught(world, tasks):
    """A method that has learned so many tasks under seed 1, as one that was restored."""
    entry, towers, stream = world
    key = entry.name, towers.has_images
    if key not in TAUGHT:
        TAUGHT.clear()
        method, states = build(entry, towers), []
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
            states.append({name: value.clone() for name, value in method.state_dict().items()})
        TAUGHT[key] = states
    state = {name: value.clone() for name, value in TAUGHT[key][tasks - 1].items()}
    return copied(lambda: build(entry, towers), state, stream.tasks[:tasks])


def scores(method, pixels):
    with torch.no_grad():
        return method.scores(method.embed(pixels))


def test_columns_are_the_classes_seen_and_numbers_are_finite(world):
    entry, towers, stream = world
    method, pixels = build(entry, towers), seen_later(stream, towers)
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
        got = scores(method, pixels)
        assert got.shape == (len(pixels), task.classes.stop)
        assert torch.isfinite(got).all()
    assert got.std() > 0
    assert method.memory_bytes >= 0


def test_a_method_has_what_the_contract_names(world):
    """And of the capabilities exactly those that its class inherits."""
    entry, towers, stream = world
    method = taught(world, 1)
    assert method.towers is towers
    assert type(method.config) is entry.config
    assert isinstance(method.encoder, str)
    assert {kind for kind in CAPABILITIES if isinstance(method, kind)} == {*entry.capabilities}
    features = method.embed(seen_later(stream, towers)[:3])
    if isinstance(method, CosineScoring):
        W = method.class_matrix
        torch.testing.assert_close(W.norm(dim=1), torch.ones(len(stream.tasks[0].names)))
    if isinstance(method, GaussianScoring):
        drawn, _ = method.memory.draw(2, torch.Generator().manual_seed(0))
        rows = method.memory_rows(features)
        assert rows.shape == (3, method.memory.dim)
        assert method.row_scores(rows).shape == (3, len(stream.tasks[0].names))
        assert method.row_scores(method.on_sphere(drawn)).isfinite().all()
        assert method.memory.counts.tolist() == np.bincount(stream.tasks[0].train.labels).tolist()


def test_the_same_seed_gives_the_same_scores_and_no_global_state_is_used(world):
    entry, towers, stream = world
    pixels, other = seen_later(stream, towers), taught(world, 2)
    noise = 1000 + len(entry.name)  # what others drew before must not matter
    torch.manual_seed(noise)
    np.random.seed(noise)  # noqa: NPY002
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    method = build(entry, towers)
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    assert torch.equal(scores(method, pixels), scores(other, pixels))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_np, np.random.get_state()[1])  # noqa: NPY002


def test_the_seed_moves_what_is_trained_with_batches(world):
    entry, towers, stream = world
    other = build(entry, towers, 2)
    for task in stream.tasks[:2]:
        other.learn(task, Context(Seeds(2)))
    trained = [scores(method, seen_later(stream, towers)) for method in (taught(world, 2), other)]
    random = entry.card.trains != "nothing"
    assert torch.equal(*trained) != random


def test_the_batch_an_image_comes_in_does_not_matter(world):
    _, towers, stream = world
    method, pixels = taught(world, 1), seen_later(stream, towers)
    one_by_one = torch.cat([scores(method, pixel[None]) for pixel in pixels[:5]])
    torch.testing.assert_close(scores(method, pixels)[:5], one_by_one, atol=2e-4, rtol=1e-4)


def test_learning_leaves_task_and_towers_as_they_were(world):
    entry, towers, stream = world
    task = stream.tasks[0]

    def digest():
        rows = [np.asarray(task.train[i]).tobytes() for i in range(len(task.train))]
        weights = (
            [t.detach().numpy().tobytes() for t in towers._model.state_dict().values()] if towers.has_images else []
        )
        return hashlib.sha256(b"".join([*rows, *weights, task.train.labels.tobytes()])).hexdigest()

    before, texts = digest(), towers.class_texts(task.names, task.templates)
    build(entry, towers).learn(task, Context(Seeds(1)))
    assert digest() == before
    assert torch.equal(towers.class_texts(task.names, task.templates), texts)


def test_state_round_trips_into_a_fresh_method(world):
    entry, towers, stream = world
    method, pixels = build(entry, towers), seen_later(stream, towers)
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    state = {key: value.clone() for key, value in method.state_dict().items()}
    fresh = build(entry, towers, seed=7)
    fresh.load_state_dict(state)
    assert torch.equal(scores(fresh, pixels), scores(method, pixels))
    again = fresh.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_a_restored_method_learns_on_as_if_it_had_never_stopped(world):
    entry, towers, stream = world
    if entry.card.keeps == "images":
        pytest.skip("keeps images, which a state does not hold")
    restored, never = taught(world, 1), taught(world, 2)  # the state of one that learned both
    restored.learn(stream.tasks[1], Context(Seeds(1)))
    pixels = seen_later(stream, towers)
    assert torch.equal(scores(never, pixels), scores(restored, pixels))


def test_a_class_that_comes_back_is_learned_on(world):
    """Alone, or beside new ones: no column is added for it, and its images count."""
    entry, towers, stream = world
    method, pixels = taught(world, 1), seen_later(stream, towers)
    first, second = stream.tasks[:2]
    before, k = scores(method, pixels), first.classes.stop
    some = np.flatnonzero(first.train.labels == 0)
    again = Subset(first.train, some, first.train.labels[some])
    method.learn(replace(first, index=1, classes=range(k, k), names=(), train=again), Context(Seeds(1)))
    after = scores(method, pixels)
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    method.learn(replace(second, index=2, train=Concatenation([again, second.train])), Context(Seeds(1)))
    assert scores(method, pixels).shape == (len(pixels), second.classes.stop)
    if entry.card.keeps in ("means", "gaussians"):
        kept = method.memory if isinstance(method, GaussianScoring) else method.means
        assert kept.counts.tolist()[: k + 1] == [
            3 * len(some),
            *[(first.train.labels == c).sum() for c in range(1, k)],
            (second.train.labels == k).sum(),
        ]


def test_what_was_kept_of_a_state_does_not_change_with_learning(world):
    _, _, stream = world
    method = taught(world, 1)
    state = method.state_dict()
    copy = {key: value.clone() for key, value in state.items()}
    method.learn(stream.tasks[1], Context(Seeds(1)))
    assert not [key for key in copy if not torch.equal(copy[key], state[key])]


def test_a_class_that_is_renamed_is_as_if_it_had_come_with_that_name(world):
    """In all that is made of names, and in nothing else: what was trained stays, and where nothing was, or no name is used, the
    method is the one that learned it so. Every method that uses class texts can do it."""
    entry, towers, stream = world
    assert (NamesClasses in entry.capabilities) == entry.card.text
    if not entry.card.text:
        return
    second = stream.tasks[1]
    new = stream.tasks[2].names[0]  # of which a features file has a text
    called = replace(second, names=(new, *second.names[1:]))
    method, right = taught(world, 2), taught(world, 1)
    right.learn(called, Context(Seeds(1)))
    c = second.classes.start
    named = replace(
        second, index=0, classes=range(c, c + 1), names=(new,), train=Subset(second.train, [], np.zeros(0, int))
    )
    pixels, before = seen_later(stream, towers), scores(method, seen_later(stream, towers))
    others = [i for i in range(second.classes.stop) if i != c]
    method.rename(c, named, Log())
    after = scores(method, pixels)
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert not torch.equal(after[:, c], before[:, c])
    if entry.name not in TOGETHER:
        torch.testing.assert_close(after[:, others], before[:, others])
    if entry.card.trains == "nothing":
        torch.testing.assert_close(after, scores(right, pixels), rtol=1e-5, atol=1e-5)
    # Of what was trained nothing moves; what is made of the name is that of the method that learned it so
    held, wanted = method.state_dict(), right.state_dict()
    assert held.keys() == wanted.keys()
    for key in ("texts", "anchors", "sentences", "tokens", "texts.anchors", "texts.names"):
        if key in held:
            torch.testing.assert_close(held[key], wanted[key], rtol=0, atol=1e-6)  # texts in one batch or another
    fresh = build(entry, towers)
    fresh.load_state_dict({key: value.clone() for key, value in held.items()})
    if isinstance(fresh, KeepsImages):
        fresh.attach_images(method.tasks)
        assert method.tasks[1].names == called.names
    torch.testing.assert_close(scores(fresh, pixels), after)
    last = stream.tasks[2]
    fresh.learn(
        replace(last, names=(second.names[0], *last.names[1:])), Context(Seeds(1))
    )  # the old name is free again
    assert scores(fresh, pixels).shape == (len(pixels), last.classes.stop)


SUMS = {
    "acil": {"width": 40},
    "blend": {"features": 24, "rank": None, "precision": "float64"},
    "lda": {},
    "ranpac": {"width": 40},
    "simplecil": {},
    "zero-shot": {},
}
"""The methods that keep sums alone, with settings in which nothing of these is cut off."""


def sums_of(method):
    """What is a sum over images, or follows from such: of ranpac, whose root is one of many, G, C and W."""
    state = {key: value for key, value in method.state_dict().items() if not key.startswith(("pools", "ridge_errors"))}
    if "sums.R" in state:
        R, D = method.sums.R.double(), method.sums.D.double()
        del state["sums.R"], state["sums.D"]
        state |= {"G": R.T @ R, "C": R.T @ D, "W": method.sums.solution(1.0)}
        del state["lam"]
    if "memory.factors" in state:  # of which each class's own product is one
        state.pop("memory.factors")
        state |= {f"A{c}": F.T @ F for c, F in enumerate(method.memory.statistics.factors)}
    return state


def assert_sums(method, right, atol):
    found, wanted = sums_of(method), sums_of(right)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        near = atol * max(1.0, wanted[key].abs().amax().item())
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=near, msg=lambda said, key=key: f"{key}: {said}")


def summing(world):
    entry, towers, stream = world
    assert (KeepsSums in entry.capabilities) == (entry.name in SUMS)
    if entry.name not in SUMS:
        pytest.skip("trains on images, or keeps more of them than sums")

    def learned(*tasks):
        method = entry.build(towers, with_values(entry.default_config(towers), SUMS[entry.name].items()), seed=1)
        for task in tasks:
            method.learn(task, Context(Seeds(1)))
        return method

    # acil and blend sum in float64; a root in float32 squared is less exact; images pass the tower in other batches
    exact = {"acil": 1e-8, "blend": 1e-8, "ranpac": 1e-4}.get(entry.name, 1e-6)
    return learned, stream, 1e-4 if towers.has_images else exact


def less(task, rows):
    """The task without these rows of its images, and these rows alone."""
    kept = np.setdiff1d(np.arange(len(task.train)), rows)
    return [replace(task, train=Subset(task.train, own, task.train.labels[own])) for own in (kept, np.asarray(rows))]


def features_of(method, images):
    pixels = torch.cat([pixels for pixels, _ in Loader(images, method.towers.prepare, method.towers.pixels).ordered()])
    with torch.no_grad():
        return method.embed(pixels), torch.as_tensor(images.labels)


def test_an_image_that_is_unlearned_was_never_learned(world):
    """Some of two tasks, unequal in number, of one class all but one."""
    learned, stream, atol = summing(world)
    first, second = stream.tasks[:2]
    kept, out = less(first, [0, 1, 2, *np.flatnonzero(first.train.labels == 1)[1:]])
    kept_too, out_too = less(second, [2, 3])
    method, right = learned(first, second), learned(kept, kept_too)
    for some in (out, out_too):
        method.unlearn(*features_of(method, some.train))
    assert_sums(method, right, atol)
    for some in (out, out_too):  # learned anew, it is what it was
        method.learn(replace(some, classes=range(4, 4), names=()), Context(Seeds(1)))
    assert_sums(method, learned(first, second), atol)


def test_a_class_whose_images_are_all_unlearned_was_never_learned(world):
    learned, stream, atol = summing(world)
    first, second = stream.tasks[:2]
    method = learned(first, second)
    some = np.flatnonzero(second.train.labels == 3)
    kept, out = less(second, some)
    right = learned(first, replace(kept, classes=range(2, 3), names=second.names[:1]))
    method.unlearn(*features_of(method, out.train))
    method.forget(3)
    assert_sums(method, right, atol)


def test_merged_classes_are_as_if_they_had_come_as_one(world):
    learned, stream, atol = summing(world)
    first, second = stream.tasks[:2]
    for c, other in ((0, 1), (1, 2), (0, 3)):

        def number(k, c=c, other=other):
            return c if k == other else k - (k > other)

        tasks = []
        for task in (first, second):
            labels = np.array([number(k) for k in task.train.labels])
            new = [(number(k), name) for k, name in zip(task.classes, task.names, strict=True) if k != other]
            start = min([k for k, _ in new], default=0)
            images = Subset(task.train, np.arange(len(labels)), labels)
            images = Subset(images, order := np.argsort(labels, kind="stable"), labels[order])
            tasks.append(
                replace(
                    task, classes=range(start, start + len(new)), names=tuple(name for _, name in new), train=images
                )
            )
        method = learned(first, second)
        method.merge(c, other)
        assert_sums(method, learned(*tasks), atol)


class Sealed:
    """Images that may be counted but not opened."""

    def __init__(self, images):
        self.labels = images.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError("an image of another task was opened")

    def describe(self, index):
        return f"sealed {index}"


def test_images_of_other_tasks_are_never_opened(world):
    """Nor those without labels by a method that does not learn from such, of whatever task."""
    entry, towers, stream = world
    method = build(entry, towers)
    kept = []
    for task in stream.tasks:
        if entry.card.keeps != "images":  # what was learned is taken away
            for old in kept:
                object.__setattr__(old.train, "source", Sealed(old.train))
                object.__setattr__(old.unlabelled, "source", Sealed(old.unlabelled))
        hidden = Unlabelled(task.train, np.arange(0, len(task.train), 2))
        hidden = hidden if LearnsUnlabelled in entry.capabilities else Sealed(hidden)
        own = replace(
            task,
            train=Subset(task.train, np.arange(len(task.train)), task.train.labels),
            unlabelled=Subset(hidden, np.arange(len(hidden)), hidden.labels),
        )
        kept.append(own)
        method.learn(own, Context(Seeds(1)))
    assert method.scores(method.embed(seen_later(stream, towers)[:2])).shape[1] == len(stream.class_names)


def test_a_method_that_says_so_keeps_no_image_and_no_embedding_of_one(world):
    entry, towers, stream = world
    for number, task in enumerate(stream.tasks, 1):
        method = taught(world, number)
        pixels = torch.cat([pixels for pixels, _ in Loader(task.train, towers.prepare, towers.pixels).ordered()])
        with torch.no_grad():
            rows = towers.image(pixels)
        images = [*looked_for(task, towers), *pixels[:4], *rows[:4], *unit(rows)[:4]]
        if entry.card.exemplar_free:
            refuse_exemplars(method, task, images)
        else:
            with pytest.raises(ExemplarsKept):
                refuse_exemplars(method, task, [*images, *rows, *unit(rows)])


def test_what_is_kept_has_the_size_that_its_row_declares(world):
    entry, towers, stream = world
    method = taught(world, 3)
    k, counts = (
        len(stream.class_names),
        [n for task in stream.tasks for n in np.bincount(task.train.labels).tolist() if n],
    )
    # Of a class with fewer images than exemplars, all of them are kept
    n = sum(min(count, method.config.exemplars) for count in counts) if entry.card.keeps == "exemplars" else sum(counts)
    i = towers.prepare(stream.tasks[0].train[0]).nbytes
    d = towers.dim // 2 if entry.name == "spa" and not towers.has_images else towers.dim  # rows without patches
    assert method.memory_bytes == entry.card.bytes(k, d, n, i, towers.hidden_dim)


def test_an_equal_encoder_name_means_equal_embeddings(world):
    entry, towers, stream = world
    method, pixels = build(entry, towers), seen_later(stream, towers)[:4]
    known = {}
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
        with torch.no_grad():
            embedded = method.embed(pixels)
        assert torch.equal(known.setdefault(method.encoder, embedded), embedded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", METHODS)
def test_an_accelerator_learns_the_same_and_what_it_learned_goes_on_elsewhere(name, towers, small_stream):
    learners = []
    for own in (towers, load_towers("tiny", device="cuda")):
        learners.append(build(METHODS[name], own))
        for task in small_stream.tasks[:2]:
            learners[-1].learn(task, Context(Seeds(1)))
    pixels = seen_later(small_stream, towers)
    plain, there = scores(learners[0], pixels), scores(learners[1], pixels.cuda())
    assert there.device.type == "cuda"
    assert (plain.argmax(1) == there.cpu().argmax(1)).float().mean() >= 0.9
    moved = build(METHODS[name], towers)
    moved.load_state_dict({key: value.cpu() for key, value in learners[1].state_dict().items()})
    torch.testing.assert_close(scores(moved, pixels), there.cpu(), atol=2e-2, rtol=1e-3)
    if METHODS[name].card.keeps != "images":
        moved.learn(small_stream.tasks[2], Context(Seeds(1)))


def test_the_evaluator_takes_the_method(world):
    _, towers, stream = world
    method, evaluator = taught(world, 1), Evaluator(stream, towers)
    first = evaluator.after(0, method)
    assert len(first.accuracy) == 1
    assert sum(first.total) == len(stream.tests[0])
    assert first.future is not None


def test_a_forgotten_class_is_gone_and_the_others_move_up(world):
    entry, towers, stream = world
    method, pixels = taught(world, 2), seen_later(stream, towers)
    before, kept = scores(method, pixels), method.memory_bytes
    method.forget(1)
    after = scores(method, pixels)
    if entry.name not in TOGETHER:
        torch.testing.assert_close(after, torch.cat([before[:, :1], before[:, 2:]], 1), rtol=1e-5, atol=1e-4)
    assert method.memory_bytes < kept or not kept or entry.card.keeps == "second-order"  # which no class has a part of
    if isinstance(method, GaussianScoring):
        assert method.memory.classes == after.shape[1]
    fresh = build(entry, towers)
    fresh.load_state_dict({key: value.clone() for key, value in method.state_dict().items()})
    torch.testing.assert_close(scores(fresh, pixels), after)
    last = stream.tasks[2]
    start = last.classes.start - 1
    labels = last.train.labels - 1
    moved = replace(
        last, classes=range(start, start + len(last.names)), train=Subset(last.train, np.arange(len(labels)), labels)
    )
    method.learn(moved, Context(Seeds(1)))
    assert scores(method, pixels).shape[1] == len(stream.class_names) - 1


def test_every_class_may_be_forgotten_and_learned_again(world):
    entry, towers, stream = world
    method, pixels, task = taught(world, 1), seen_later(stream, towers), stream.tasks[0]
    for _ in task.names:
        method.forget(0)
    assert method.memory_bytes == 0 or entry.card.keeps in ("gaussians", "second-order")  # what is pooled stays
    method.learn(replace(task, index=1), Context(Seeds(1)))
    assert scores(method, pixels).shape[1] == len(task.names)

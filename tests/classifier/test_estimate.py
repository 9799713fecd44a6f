"""The accuracy to expect: what is counted, how it ages as classes come, and that it is near the truth."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from cairn import IncrementalClassifier
from cairn.classifier.advice import accuracy_lines, advice, alike_names
from cairn.classifier.estimate import AccuracyEstimate, ConfusedPair, confusion_counts, short_of_pictures
from cairn.classifier.retention import drawn_shares
from cairn.data.folders import class_folders
from cairn.data.images import Subset
from cairn.data.in_memory import InMemoryImages
from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.stream import Task, task_stream
from cairn.data.templates import DEFAULT
from cairn.experiment.inputs import towers_for
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.towers.catalogue import load_towers
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.training.seeds import Seeds

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

FIRST = np.array([[8.0, 2.0], [1.0, 4.0]])
"""Left-out images of two classes: 8 of 10 and 4 of 5 are classified correctly."""

SECOND = np.zeros((3, 3))
SECOND[2] = [2, 0, 6]
"""Of a third class's 8 images a quarter are taken for the first."""


def test_what_was_counted_is_what_is_told():
    found = AccuracyEstimate().with_task(FIRST, "left out one by one")
    assert found.matrix.tolist() == FIRST.tolist()
    assert found.images.tolist() == [10, 5]
    assert found.by_class.tolist() == [0.8, 0.8]
    assert found.accuracy == pytest.approx(0.8)
    assert found.sources == {"left out one by one": 15}
    assert found.confused == [ConfusedPair(0, 1, 2.0, 1.0)]


def test_old_classes_lose_what_symmetry_says():
    before = AccuracyEstimate().with_task(FIRST, "left out one by one")
    found = before.with_task(SECOND, "left out one by one")
    np.testing.assert_allclose(found.matrix, [[6, 1.5, 2.5], [1, 4, 0], [2, 0, 6]])
    assert found.by_class.tolist() == pytest.approx([0.6, 0.8, 0.75])
    assert found.before == [0.8, 0.8]
    assert found.doubt == pytest.approx([0.8 * 0.25 / 2, 0, 0])


def test_where_there_are_draws_the_mean_of_both_counts():
    before = AccuracyEstimate().with_task(FIRST, "left out one by one")
    drawn = np.array([[0.9, 0.1], [0.0, 1.0]]), np.array([[0.81, 0.09, 0.1], [0.0, 0.9, 0.1]])
    found = before.with_task(SECOND, "left out one by one", drawn)
    assert found.by_class[:2].tolist() == pytest.approx([0.8 * (0.75 + 0.9) / 2, 0.8 * (1 + 0.9) / 2])
    assert found.images.tolist() == [10, 5, 8]
    assert found.doubt == pytest.approx([0.8 * 0.15 / 2, 0.8 * 0.1 / 2, 0])
    better = before.with_task(SECOND, "left out one by one", (drawn[0], np.array([[1.0, 0, 0], [0, 1, 0]])))
    assert better.by_class[1] == pytest.approx(0.8)
    assert better.images[:2].tolist() == [10, 5]


def test_more_images_of_a_known_class_are_added_to_its_own():
    before = AccuracyEstimate().with_task(FIRST, "left out one by one")
    found = before.with_task(np.array([[1.0, 3.0], [0.0, 0.0]]), "a fifth left out")
    assert found.matrix.tolist() == [[9, 5], [1, 4]]
    assert found.sources == {"left out one by one": 15, "a fifth left out": 4}


def test_a_forgotten_class_is_gone_and_one_of_an_older_version_is_not_known():
    found = AccuracyEstimate().for_classes(1).with_task(np.diag([0.0, 5.0]), "left out one by one")
    assert found.by_class.tolist() == pytest.approx([math.nan, 1.0], nan_ok=True)
    assert found.accuracy == 1.0
    both = AccuracyEstimate().with_task(FIRST, "left out one by one").with_task(SECOND, "left out one by one")
    assert both.without_class(0).matrix.tolist() == [[4, 0], [0, 6]]
    assert both.without_class(0).before == [0.8]
    assert both.merged(0, 1).matrix.tolist() == [[12.5, 2.5], [2, 6]]
    assert AccuracyEstimate().accuracy is None


def test_intervals_are_wilsons_and_hold_the_truth():
    found = AccuracyEstimate().with_task(FIRST, "left out one by one")
    expected = binomtest(8, 10).proportion_ci(method="wilson")
    assert found.interval_of(0) == pytest.approx((expected.low, expected.high), abs=1e-4)
    rng, truth, held = np.random.default_rng(1), np.array([0.95, 0.6, 0.4, 0.8]), 0
    n = np.array([12, 40, 25, 30])
    for _ in range(300):
        hits = rng.binomial(n, truth)
        M = np.diag(hits.astype(float))
        M[np.arange(4), (np.arange(4) + 1) % 4] += n - hits
        low, high = AccuracyEstimate().with_task(M, "left out one by one").interval
        held += low <= truth.mean() <= high
    assert 0.92 <= held / 300 <= 0.99


def test_a_class_is_short_of_pictures_by_itself_or_beside_the_others():
    assert short_of_pictures([30, 9, 12]) == [1]
    assert short_of_pictures([100, 49, 120, 8]) == [3]
    assert short_of_pictures([100, 30, 120, 8]) == [3, 1]


def test_blend_leaves_its_images_out_exactly(features):
    """Its scores are those of the same weights with the image's own part in the statistics taken out: near those of a method
    that never saw the image, and far from those of one that did."""
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method="blend", data=features), dataset)
    entry = METHODS["blend"]
    (task, *_) = task_stream(dataset, step=6, order="seed:1").tasks

    def learned(rows):
        method = entry.build(towers, entry.default_config(towers), seed=1)
        images = Subset(task.train, rows, np.asarray(task.train.labels)[rows])
        method.learn(type(task)(task.index, task.classes, task.names, task.templates, images), Context(Seeds(1)))
        return method

    everything = np.arange(len(task.train))
    scores, labels = learned(everything).left_out
    assert labels.tolist() == list(task.train.labels)
    seen = learned(everything)
    for row in (0, 20, 40):
        item = towers.pixels(towers.prepare(task.train[row])[None])
        alone = learned(np.delete(everything, row))
        truth, fitted = (torch.softmax(m.scores(m.embed(item)).double()[0], 0) for m in (alone, seen))
        own = torch.softmax(scores[row], 0)
        assert (own - truth).abs().max() < 0.35 * max((fitted - truth).abs().max(), 0.05)


def test_draws_are_the_same_before_and_after(features):
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method="lda", data=features), dataset)
    entry, states = METHODS["lda"], []
    stream = task_stream(dataset, step=3, order="seed:1")
    method = entry.build(towers, entry.default_config(towers), seed=1)
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
        other = entry.build(towers, entry.default_config(towers), seed=1)
        other.load_state_dict(method.state_dict())
        states.append(other)
    before, after = drawn_shares(states[0], states[1], 1)
    assert before.shape == (3, 3)
    assert after.shape == (3, 6)
    np.testing.assert_allclose(before.sum(1), 1)
    np.testing.assert_allclose(after.sum(1), 1)
    rows = states[0].on_sphere(states[0].memory.draw(200, Seeds(1).generator("retention"), range(3))[0])
    hits = (states[1].row_scores(rows).argmax(1) == torch.arange(3).repeat_interleave(200)).view(3, 200)
    np.testing.assert_allclose(after.diagonal(), hits.double().mean(1))
    assert drawn_shares(None, states[1], 1) is None


@pytest.mark.parametrize(("method", "source"), [("lda", "left out in five parts"), ("blend", "left out one by one")])
def test_every_image_is_counted_once_and_comes_back_from_a_folder(method, source, features, tmp_path):
    dataset = open_dataset(features)
    learner = IncrementalClassifier(method, features)
    rows = [dataset.train[i] for i in range(len(dataset.train))]
    names = [dataset.classes[c] for c in dataset.train.labels]
    for classes in (range(4), range(4, 6)):
        part = [i for i, c in enumerate(dataset.train.labels) if c in classes]
        learner.partial_fit([rows[i] for i in part], [names[i] for i in part])
    estimate = learner.estimate_
    assert list(estimate.sources) == [source]
    np.testing.assert_allclose(estimate.images, learner.counts_, atol=0.05)
    learner.save(tmp_path)
    assert IncrementalClassifier.load(tmp_path, features).estimate_ == estimate
    learner.forget(learner.classes_[1])
    assert len(learner.estimate_.doubt) == 5


def test_old_learners_know_nothing_of_it_until_they_learn_on(tmp_path):
    shutil.copytree(Path(__file__).parent / "old", tmp_path / "old")
    learner = IncrementalClassifier.load(
        tmp_path / "old" / "simplecil", towers=str(tmp_path / "old" / "rows.safetensors")
    )
    assert learner.estimate_.accuracy is None
    assert accuracy_lines(learner.estimate_, learner.classes_, [50] * len(learner.classes_)) == []
    rng = np.random.default_rng(0)
    learner.partial_fit(rng.normal(size=(8, learner.n_features_in_)).astype("float32"), [str(learner.classes_[0])] * 8)
    assert learner.estimate_.images.tolist() == [8] + [0] * (len(learner.classes_) - 1)


def test_what_is_said_of_it():
    before = AccuracyEstimate().with_task(100 * FIRST, "left out one by one")
    found = before.with_task(SECOND, "left out one by one")
    assert accuracy_lines(found, ["oak", "elm", "ash"], [1000, 500, 8]) == [
        "estimated accuracy: 72 % (60 % to 83 %), every class counted the same; from 1,508 pictures left out one by one",
        "short of pictures (fewer than 10, or than half of the median class): 'ash' (8)",
        "classes known before this task: 80 % before, 70 % now; most: 'oak' 80 % before, 60 % now, taken for 'ash'",
    ]


def test_what_to_do_about_a_pair():
    text = np.eye(4, dtype="float32")
    text[1] = text[0] + 0.1 * text[1]
    towers = FeatureTowers(
        name="made", dim=4, logit_scale=20.0, fingerprint="made", names=("cup", "mug", "dog", "car"), text=text
    )
    pairs = [ConfusedPair(0, 1, 3, 2), ConfusedPair(2, 3, 3, 0), ConfusedPair(0, 2, 1, 1)]
    alike = alike_names(towers, ["cup", "mug", "dog", "car"], ["a {}."], pairs)
    assert alike == [True, False, False]
    said = advice(pairs, ["cup", "mug", "dog", "car"], [30, 30, 30, 4], alike)
    assert said[0].startswith("the names mean nearly the same")
    assert said[1] == "learn more pictures of 'car' (it has 4)"
    assert said[2].startswith("look at the pictures")


STREAMS = 8


@pytest.fixture(scope="module")
def photographs():
    """30 classes of CIFAR-100 as mini-clip embeds them, 100 training pictures each: features (30, 100, d), names, towers."""
    if not SHARED.is_dir():
        pytest.skip("the data beside the project is absent")
    found, towers = class_folders(SHARED / "cifar100" / "train"), load_towers(str(SHARED / "mini-clip"), device="cpu")
    labels = found.images.labels
    rng = np.random.default_rng(0)  # the files of a class are sorted by what their pictures show
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:100] for c in range(0, 90, 3)])
    loader = Loader(Subset(found.images, rows, labels[rows]), towers.prepare, towers.pixels)
    z, _ = encode(loader, lambda features, _: features, embed=towers.image)
    names = tuple(found.classes[c] for c in range(0, 90, 3))
    text = towers.class_texts(names, DEFAULT).numpy()
    rows_towers = FeatureTowers(
        name="photographs", dim=towers.dim, logit_scale=towers.logit_scale, fingerprint="p", names=names, text=text
    )
    return z.view(30, 100, -1).numpy(), names, rows_towers


def test_estimates_of_four_weeks_are_within_three_points(photographs):
    """Of photographs, after each of four weeks with five new classes of unequal numbers of pictures, against pictures held out:
    the mean over several streams, for that of one is as uncertain as its pictures are few. Its interval tells how much."""
    z, names, towers = photographs
    entry, errors, inside = METHODS["blend"], np.zeros((STREAMS, 4)), 0
    for stream in range(STREAMS):
        rng, estimate, state = np.random.default_rng(stream), AccuracyEstimate(), None
        order = rng.permutation(30)
        for week in range(4):
            before, method = (entry.build(towers, entry.default_config(towers), seed=1) for _ in range(2))
            for one in (before, method) if state is not None else ():
                one.load_state_dict(state)
            new, count = order[5 * week : 5 * week + 5], rng.integers(30, 46, 5)
            rows = [z[c, i] for c, n in zip(new, count, strict=True) for i in range(n)]
            given = InMemoryImages(rows, np.repeat(np.arange(5 * week, 5 * week + 5), count), z.shape[2])
            task = Task(week, range(5 * week, 5 * week + 5), tuple(names[c] for c in new), DEFAULT, given)
            method.learn(task, Context(Seeds(1)))
            scores, labels = method.left_out
            counts = confusion_counts(scores.argmax(1).numpy(), labels.numpy(), 5 * week + 5)
            estimate = estimate.with_task(counts, "left out one by one", drawn_shares(before, method, 1))
            seen, state = order[: 5 * week + 5], method.state_dict()
            held = torch.from_numpy(z[seen, 45:]).flatten(0, 1)
            hits = method.scores(held).argmax(1) == torch.arange(len(seen)).repeat_interleave(55)
            truth = hits.double().mean().item()
            errors[stream, week] = estimate.accuracy - truth
            low, high = estimate.interval
            inside += low <= truth <= high
    assert (np.abs(errors.mean(0)) < 0.03).all(), errors
    assert inside >= 0.85 * errors.size

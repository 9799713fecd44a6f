"""The accuracy to expect: what is counted, how it ages as classes come, and that it is near the truth."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
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


def test_without_draws_old_classes_lose_what_symmetry_says():
    """A quarter of eight images are two; of the ten of the first class as many, not a quarter."""
    before = AccuracyEstimate().with_task(FIRST, "left out one by one")
    found = before.with_task(SECOND, "left out one by one")
    np.testing.assert_allclose(found.matrix, [[6.4, 1.6, 2], [1, 4, 0], [2, 0, 6]])
    assert found.by_class.tolist() == pytest.approx([0.64, 0.8, 0.75])
    assert found.before == [0.8, 0.8]
    assert found.doubts.tolist() == pytest.approx([0.8 * 0.2 / 2, 0, 0])


BEFORE = np.array([[0.9, 0.1], [0.0, 1.0]])
AFTER = np.array([[0.81, 0.045, 0.145], [0.0, 0.9, 0.1], [0.0, 0.2, 0.8]])
"""Draws of two classes, and of these and a third."""


def test_where_there_are_draws_the_mean_of_both_counts():
    before = AccuracyEstimate().with_task(FIRST, "left out one by one", BEFORE)
    assert before.by_class.tolist() == [0.8, 0.8]
    found = before.with_task(SECOND, "left out one by one", AFTER)
    by_draws, by_symmetry = np.array([0.8 * 0.81 / 0.9, 0.8 * 0.9, 0.75]), np.array([0.64, 0.8, 0.75])
    assert found.by_class.tolist() == pytest.approx(((by_draws + by_symmetry) / 2).tolist())
    assert found.doubts.tolist() == pytest.approx((abs(by_draws - by_symmetry) / 2).tolist())
    assert found.images.tolist() == pytest.approx([10, 5, 8])
    np.testing.assert_allclose(found.by_draws[1], [0.9, 3.6, 0.5])
    better = before.with_task(SECOND, "left out one by one", np.diag([0.99, 1.0, 0.8]))
    assert better.by_draws.diagonal()[:2].tolist() == pytest.approx([8 * 1.1, 4])


def test_a_change_that_is_taken_back_leaves_no_trace():
    """A class that takes most of what there was, and is forgotten; each image counts from where it was left out."""
    before = AccuracyEstimate().with_task(FIRST, "left out one by one", BEFORE)
    worse = before.with_task(SECOND, "left out one by one", np.array([[0.1, 0, 0.9], [0, 0.2, 0.8], [0, 0, 1.0]]))
    assert worse.by_draws.diagonal()[:2].tolist() == pytest.approx([8 / 9, 5 * 0.16])
    back = worse.without_class(2).with_draws(BEFORE)
    np.testing.assert_allclose(back.by_draws, FIRST)
    more = worse.with_task(np.diag([10.0, 0, 0]), "left out one by one", np.diag([0.4, 0.2, 1.0]))
    # 18 of 20 images, left out where .9 and .4 of draws were taken for their class
    assert more.by_draws[0, 0] / 20 == pytest.approx(0.9 * 0.4 / 0.65)


def test_images_taken_out_again_are_not_counted_any_more():
    """Images under a wrong name count as errors until they are unlearned."""
    M = np.array([[8.0, 2.0], [6.0, 5.0]])
    found = AccuracyEstimate().with_task(M, "left out one by one", BEFORE)
    mended = found.without_images(np.array([[0.0, 0.0], [6.0, 0.0]])).with_draws(BEFORE)
    np.testing.assert_allclose(mended.counted, [[8, 2], [0, 5]])
    assert mended.by_class.tolist() == pytest.approx([0.8, 1.0])
    more = found.without_images(np.array([[0.0, 0.0], [8.0, 0.0]]))
    assert more.images.tolist() == pytest.approx([10, 3])


def test_two_classes_that_were_one_are_merged():
    found = (
        AccuracyEstimate()
        .with_task(FIRST, "left out one by one", BEFORE)
        .with_task(SECOND, "left out one by one", AFTER)
    )
    merged = found.merged(0, 2)
    M = found.matrix
    hits = M[0, 0] + M[0, 2] + M[2, 0] + M[2, 2]
    assert merged.by_class[0] == pytest.approx(hits / 18)
    assert merged.with_draws(merged.matrix / merged.images[:, None]).reference[0] == pytest.approx(
        (10 * (0.81 + 0.145) + 8 * 0.8) / 18
    )


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
    np.testing.assert_allclose(both.merged(0, 1).matrix, [[13, 2], [2, 6]])
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


def test_draws_are_from_the_learner_as_it_is(features):
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method="lda", data=features), dataset)
    entry = METHODS["lda"]
    method = entry.build(towers, entry.default_config(towers), seed=1)
    assert drawn_shares(None, 1) is None
    assert drawn_shares(method, 1) is None
    for task in task_stream(dataset, step=3, order="seed:1").tasks[:2]:
        method.learn(task, Context(Seeds(1)))
    shares = drawn_shares(method, 1)
    assert shares.shape == (6, 6)
    np.testing.assert_allclose(shares.sum(1), 1)
    rows = method.on_sphere(method.memory.draw(200, Seeds(1).generator("retention"), range(6))[0])
    hits = (method.row_scores(rows).argmax(1) == torch.arange(6).repeat_interleave(200)).view(6, 200)
    np.testing.assert_allclose(shares.diagonal(), hits.double().mean(1))


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
    found = before.with_task(100 * SECOND, "left out one by one")
    assert accuracy_lines(found, ["oak", "elm", "ash"], [1000, 500, 8]) == [
        "estimated accuracy: 73 % (69 % to 77 %), every class counted the same; from 2,300 pictures left out one by one",
        "short of pictures (fewer than 10, or than half of the median class): 'ash' (8)",
        "classes known before this task: 80 % before, 72 % now; most: 'oak' 80 % before, 64 % now, taken for 'ash'",
    ]


@pytest.mark.parametrize("n", [1, 3, 7, 12, 24, 100, 1000])
def test_classes_that_are_all_right_are_not_the_lowest(n):
    """Nor is an interval beside its own share, whatever rounding does."""
    for hits in (0, n // 3, n):
        found = AccuracyEstimate().with_task(np.array([[hits, n - hits], [0, n]], float), "left out one by one")
        low, high = found.interval_of(0)
        assert low <= hits / n <= high
    found = (
        AccuracyEstimate()
        .with_task(n * np.eye(2), "left out one by one")
        .with_task(n * np.eye(3), "left out one by one")
    )
    assert not [line for line in accuracy_lines(found, ["oak", "elm", "ash"], [50] * 3) if line.startswith("lowest")]


def test_an_estimate_without_a_classs_only_picture_is_said_to_be_too_low():
    found = AccuracyEstimate().with_task(np.array([[3.0, 0], [1, 0]]), "left out one by one")
    (line, *_) = accuracy_lines(found, ["oak", "elm"], [3, 1])
    assert line.endswith("; too low: 1 class with a single picture, scored without it")
    assert "too low" not in accuracy_lines(found, ["oak", "elm"], [3, 2])[0]


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
    told = advice(pairs, ["cup", "mug", "dog", "car"], [30, 30, 30, 4], alike, [2, 4, 1])
    assert told[0] == said[0]  # of five that are mixed up two are known as both
    assert told[1].startswith(
        "4 pictures were learned as both: `cairn merge` if they are one class, else `cairn relabel`"
    )
    assert told[2].startswith("1 picture was learned as both: ")


def test_of_classes_made_of_the_same_pictures_that_is_said_and_not_to_learn_more(tmp_path, cairn):
    """As `learn` prints it and as the learner tells it; after a relabelling nothing is left of it."""
    rng = np.random.default_rng(0)
    for name in ("cup", "mug", "car"):
        (tmp_path / "data" / name).mkdir(parents=True)
        seen = np.random.default_rng(1) if name == "mug" else np.random.default_rng(1 if name == "cup" else 2)
        for i in range(6):
            pixels = seen.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            if name == "mug" and i == 5:
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    status, out, err = cairn("learn", "l", "data", "--method", "simplecil", "--towers", "tiny")
    assert status == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("mixed up most: "))
    assert "'cup' and 'mug'" in line
    assert "; 5 pictures were learned as both: `cairn merge` if they are one class" in line
    assert "learn more" not in out
    mugs = [f"data/mug/{i}.png" for i in range(5)]
    assert cairn("relabel", "l", *mugs, "mug")[0] == 0
    learner = IncrementalClassifier.load(tmp_path / "l")
    (said,) = learner.advice([ConfusedPair(0, 1, 1, 1)])
    assert said.startswith("learn more pictures of 'cup' (it has 1)")


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
            method = entry.build(towers, entry.default_config(towers), seed=1)
            if state is not None:
                method.load_state_dict(state)
            new, count = order[5 * week : 5 * week + 5], rng.integers(30, 46, 5)
            rows = [z[c, i] for c, n in zip(new, count, strict=True) for i in range(n)]
            given = InMemoryImages(rows, np.repeat(np.arange(5 * week, 5 * week + 5), count), z.shape[2])
            task = Task(week, range(5 * week, 5 * week + 5), tuple(names[c] for c in new), DEFAULT, given)
            method.learn(task, Context(Seeds(1)))
            scores, labels = method.left_out
            counts = confusion_counts(scores.argmax(1).numpy(), labels.numpy(), 5 * week + 5)
            estimate = estimate.with_task(counts, "left out one by one", drawn_shares(method, 1))
            seen, state = order[: 5 * week + 5], method.state_dict()
            held = torch.from_numpy(z[seen, 45:]).flatten(0, 1)
            hits = method.scores(held).argmax(1) == torch.arange(len(seen)).repeat_interleave(55)
            truth = hits.double().mean().item()
            errors[stream, week] = estimate.accuracy - truth
            low, high = estimate.interval
            inside += low <= truth <= high
    assert (np.abs(errors.mean(0)) < 0.03).all(), errors
    assert inside >= 0.85 * errors.size

"""Images without labels beside those that a learner is taught."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cairn import IncrementalClassifier
from cairn.classifier.intake import task_fingerprint
from cairn.classifier.learned import Learned
from cairn.data.images import Subset, Unlabelled
from cairn.data.shapes import shapes_dataset
from cairn.data.task import Task
from cairn.errors import InvalidInput, NotFitted, UnreadableImages

LABELLED, LOOSE = 3, 5


@pytest.fixture(scope="module")
def data():
    return shapes_dataset("shapes:dev")


def images_of(data, classes, start, stop):
    rows = [row for c in classes for row in np.flatnonzero(data.train.labels == c)[start:stop]]
    return [data.train[row] for row in rows], [data.classes[data.train.labels[row]] for row in rows]


@pytest.fixture(scope="module")
def two_weeks(data):
    """Images, names and images without labels of two classes each."""
    return [
        (*images_of(data, classes, 0, LABELLED), images_of(data, classes, LABELLED, LABELLED + LOOSE)[0])
        for classes in ((0, 1), (2, 3))
    ]


def learner(towers, method="blend", **settings):
    return IncrementalClassifier(method, towers, settings=settings, device="cpu")


def test_a_learner_learns_from_them(two_weeks, towers, tmp_path):
    held, alone = learner(towers), learner(towers)
    for images, names, loose in two_weeks:
        held.partial_fit(images, names, unlabelled=loose)
        alone.partial_fit(images, names)
    assert (
        held.counts_.tolist() == alone.counts_.tolist() == [LABELLED] * 4
    )  # who counts the others would count guesses
    assert held.method_.memory.counts.sum() == 4 * (LABELLED + LOOSE)
    assert [entry["unlabelled"] for entry in held.history_] == [2 * LOOSE] * 2
    assert all("unlabelled" not in entry for entry in alone.history_)
    assert set(held.estimate_.sources) == {"left out in five parts"}  # with what the others are then taken for
    assert set(alone.estimate_.sources) == {"left out one by one"}
    test = two_weeks[0][2] + two_weeks[1][2]
    assert not np.array_equal(held.predict_proba(test), alone.predict_proba(test))

    held.save(tmp_path / "held.cairn")
    again = IncrementalClassifier.load(tmp_path / "held.cairn", towers)
    assert np.array_equal(again.predict_proba(test), held.predict_proba(test))
    assert again.history_ == held.history_
    last = two_weeks[1]
    again.unlearn(last[0], last[1])  # what it was told is taken out, and with the last image the class
    assert again.classes_.tolist() == held.classes_.tolist()[:2]


def test_what_is_known_with_a_label_is_left_out(two_weeks, towers):
    held, (images, names, loose) = learner(towers), two_weeks[0]
    held.partial_fit(images, names, unlabelled=[*loose, loose[0], images[0]])
    assert held.history_[-1]["unlabelled"] == len(loose)
    assert any("left out: 2 of 12 images without labels" in text for text in held.notices_)
    images, names, _ = two_weeks[1]
    held.partial_fit(images, names, unlabelled=two_weeks[0][0])  # all of them learned with a label in the week before
    assert "unlabelled" not in held.history_[-1]
    assert held.method_.memory.counts[2:].tolist() == [LABELLED] * 2


@pytest.mark.parametrize("method", ["lda", "dmc"])
def test_a_method_that_cannot_by_itself_learns_twice_and_says_so(method, two_weeks, towers):
    few = {"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1} if method == "dmc" else {}
    images, names, loose = two_weeks[0]
    held, alone = learner(towers, method, **few), learner(towers, method, **few)
    for images, names, loose in two_weeks:
        held.partial_fit(images, names, unlabelled=loose)
        alone.partial_fit(images, names)
    assert any(f"{method} learns from labelled images alone, so it learns twice" in text for text in held.notices_)
    assert held.counts_.tolist() == [LABELLED] * 4
    assert [entry["unlabelled"] for entry in held.history_] == [2 * LOOSE] * 2
    assert not np.array_equal(held.predict_proba(loose), alone.predict_proba(loose))
    assert sum(held.estimate_.sources.values()) == sum(alone.estimate_.sources.values())  # of images with labels alone


def test_one_that_keeps_all_images_passes_them_over_and_says_so(two_weeks, towers):
    images, names, loose = two_weeks[0]
    held = learner(towers, "joint", **{"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1})
    held.partial_fit(images, names, unlabelled=loose)
    assert "joint learns from labelled images alone: 10 without labels are not used" in held.notices_
    assert "unlabelled" not in held.history_[-1]


def test_where_images_show_several_classes_all_have_labels(two_weeks, towers):
    images, names, loose = two_weeks[0]
    held = learner(towers)
    with pytest.raises(
        InvalidInput, match="unlabelled: 10 images; where images may show several classes all have labels"
    ):
        held.partial_fit(images, [[name] for name in names], unlabelled=loose)
    with pytest.raises(NotFitted):
        assert not held.classes_


def test_one_that_cannot_be_read_is_as_any_other(two_weeks, towers, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    images, names, loose = two_weeks[0]
    held = learner(towers)
    with pytest.raises(UnreadableImages, match=r"torn\.png"):
        held.partial_fit(images, names, unlabelled=[*loose, tmp_path / "torn.png"])
    held.partial_fit(images, names, unlabelled=[*loose, tmp_path / "torn.png"], on_bad_image="skip")
    assert held.history_[-1]["unlabelled"] == len(loose)


def test_rows_of_embeddings_too():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 12))
    x = np.repeat(centres, 20, 0) + 0.7 * rng.normal(size=(60, 12))
    y, few = np.repeat(["a", "b", "c"], 20), np.arange(60) % 20 < 2
    held = IncrementalClassifier("blend", "rows").partial_fit(x[few], y[few].tolist(), unlabelled=x[~few])
    alone = IncrementalClassifier("blend", "rows").partial_fit(x[few], y[few].tolist())
    assert held.history_[-1]["unlabelled"] == 54
    assert held.score(x[~few], y[~few].tolist()) >= alone.score(x[~few], y[~few].tolist())


def test_unfinished_work_is_of_the_same_images(data):
    """What is gone on with was begun with these images, those without labels among them."""
    rows = np.flatnonzero(data.train.labels == 0)[:6]
    train = Subset(data.train, rows[:2], data.train.labels[rows[:2]])
    task = Task(0, range(1), ("a",), ("{}",), train, unlabelled=Unlabelled(data.train, rows[2:]))
    hashes = [bytes([i]) * 32 for i in range(6)]
    named = [task_fingerprint(Learned(), {}, task, hashes[: 2 + more]) for more in range(4)]
    assert len(set(named)) == 4


def test_a_picture_of_a_folder_is_known_by_its_pixels(two_weeks, towers, tmp_path):
    images, names, loose = two_weeks[0]
    for i, image in enumerate([*loose, images[0]]):
        Image.fromarray(np.asarray(image)).save(tmp_path / f"{i}.png")
    held = learner(towers).partial_fit(images, names, unlabelled=sorted(tmp_path.glob("*.png")))
    assert held.history_[-1]["unlabelled"] == len(loose)


def test_accuracy_is_estimated_without_what_its_labels_taught():
    """Clusters that run into each other: a label tells what its neighbours are taken for, and these would vouch for it again."""
    wrong = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        centres = 0.5 * rng.normal(size=(8, 12))
        x, y = np.repeat(centres, 60, 0) + rng.normal(size=(480, 12)), np.repeat([f"c{c}" for c in range(8)], 60)
        part = np.arange(480) % 60
        few, loose, test = part < 4, (part >= 4) & (part < 34), part >= 34
        held = IncrementalClassifier("blend", "rows").partial_fit(x[few], y[few].tolist(), unlabelled=x[loose])
        wrong.append(abs(held.estimate_.accuracy - held.score(x[test], y[test].tolist())))
    assert np.mean(wrong) < 0.25, wrong

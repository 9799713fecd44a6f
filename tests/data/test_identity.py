"""Pictures that were learned are known again by their content."""

from __future__ import annotations

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cairn import IncrementalClassifier
from cairn.classifier.card import card
from cairn.classifier.folder import NAME
from cairn.data.identity import LearnedPictures, content_hash
from cairn.data.in_memory import InMemoryImages
from cairn.errors import ResultError, counted
from cairn.storage.archive import Archive
from cairn.towers.features import FeatureTowers


def picture(seed, size=(9, 7)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def files(tmp_path):
    """Six different pictures, the first four called oak, the others elm."""
    found = []
    for i in range(6):
        path = tmp_path / "in" / ("oak" if i < 4 else "elm") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
        found.append(path)
    return found


def names_of(files):
    return [file.parent.name for file in files]


@pytest.fixture
def learner(files, towers):
    return IncrementalClassifier("simplecil", towers).partial_fit(files, names_of(files))


def state_of(learner):
    return {key: value.clone() for key, value in learner.method_.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_hash_is_that_of_mode_size_and_pixels():
    image = picture(0)
    assert content_hash(image) == hashlib.sha256(b"RGB 9x7\0" + np.asarray(image).tobytes()).digest()
    # The same bytes in another shape are another picture
    turned = Image.frombytes("RGB", (7, 9), image.tobytes())
    assert content_hash(turned) != content_hash(image)
    row = np.arange(4.0)
    assert content_hash(row) == hashlib.sha256(b"row\0" + row.astype("float32").tobytes()).digest()


def test_files_arrays_and_images_of_the_same_pixels_are_one_picture(files):
    opened = Image.open(files[0]).convert("RGB")
    given = InMemoryImages(
        [files[0], str(files[0]), opened, np.asarray(opened), torch.tensor(np.asarray(opened))], np.zeros(5, int)
    )
    assert len(set(given.content_hashes())) == 1


def test_copies_touched_files_and_other_paths_are_left_out(learner, files, tmp_path, monkeypatch):
    before, history = state_of(learner), len(learner.history_)
    copies = shutil.copytree(tmp_path / "in", tmp_path / "copy")
    again = [copies / file.parent.name / file.name for file in files]
    os.utime(files[0], (1, 1))
    other = tmp_path / "other.bmp"
    Image.open(files[1]).save(other)
    monkeypatch.chdir(tmp_path)
    relative = [file.relative_to(tmp_path) for file in files]
    for given, called in (
        (again, names_of(again)),
        (relative, names_of(files)),
        ([files[0]], ["oak"]),
        ([other], ["oak"]),
    ):
        learner.partial_fit(given, called)
        assert (
            f"left out: {len(given)} of {counted(len(given), 'image')}, already learned as the same class"
            in learner.notices_[-1]
        )
        assert same(state_of(learner), before)
        assert learner.counts_.tolist() == [4, 2]
        assert len(learner.history_) == history


def test_one_picture_more_in_the_folder_is_one_picture_more(learner, files, towers):
    extra = picture(99)
    learner.partial_fit([*files[:4], extra], ["oak"] * 5)
    assert learner.counts_.tolist() == [5, 2]
    assert learner.history_[-1]["images"] == 1
    apart = IncrementalClassifier("simplecil", towers).partial_fit(files, names_of(files)).partial_fit([extra], ["oak"])
    assert same(state_of(learner), state_of(apart))


def test_a_picture_twice_in_a_call_counts_once(files, learner, towers):
    twice = IncrementalClassifier("simplecil", towers).partial_fit(
        [*files, files[0], files[5]], [*names_of(files), "oak", "elm"]
    )
    assert same(state_of(twice), state_of(learner))
    assert "2 of 8 images" in twice.notices_[-1]


def test_again_learns_them(learner, files):
    learner.partial_fit(files[:3], ["oak"] * 3, again=True)
    assert learner.counts_.tolist() == [7, 2]
    assert "3 of 3 images" in learner.notices_[-1]
    assert "once more" in learner.notices_[-1]
    assert learner._learned.pictures.compare(
        InMemoryImages(files, np.zeros(6, int)).content_hashes(), [0] * 6
    ).repeated == [
        0,
        1,
        2,
        3,
    ]


def test_a_relabelled_picture_is_said_to_stay_under_the_old_label(learner, files):
    learner.partial_fit(files[:2], ["elm", "ash"])
    assert learner.counts_.tolist() == [4, 3, 1]
    told = learner.notices_[-1]
    assert "learned under a second class: 2 images" in told
    assert f"{files[0]} as 'elm', also learned as 'oak'" in told
    assert f"{files[1]} as 'ash', also learned as 'oak'" in told
    learner.partial_fit(files[:2], ["elm", "ash"])
    assert "left out: 2 of 2 images, already learned as the same class" in learner.notices_[-1]


def test_one_picture_in_two_classes_of_a_call_is_said(files, towers):
    learner = IncrementalClassifier("simplecil", towers).partial_fit([files[0], files[0]], ["oak", "elm"])
    assert learner.counts_.tolist() == [1, 1]
    assert f"{files[0]} as 'elm', also learned as 'oak'" in learner.notices_[-1]


def test_forgetting_a_class_drops_its_hashes_alone(learner, files):
    learner.partial_fit([files[4]], ["oak"])
    learner.forget("oak")
    assert len(learner._learned.pictures) == 2
    learner.partial_fit(files[4:], ["elm"] * 2)
    assert learner.counts_.tolist() == [2]
    learner.partial_fit(files[:4], ["oak"] * 4)
    assert learner.counts_.tolist() == [2, 4]


def test_a_saved_learner_knows_them_and_says_what_it_keeps(learner, files, towers, tmp_path):
    learner.save(tmp_path / "saved")
    again = IncrementalClassifier.load(tmp_path / "saved", towers)
    assert not again.notices_
    again.partial_fit(files, names_of(files))
    assert again.counts_.tolist() == [4, 2]
    text = (tmp_path / "saved" / "CARD.md").read_text()
    assert text == card(again._record())
    assert "6 hashes (SHA-256 of the pixels)" in text
    assert "not known one by one" not in text


def old(learner, folder):
    """The learner as earlier versions saved it."""
    learner.save(folder)
    found = Archive(folder, NAME).read()
    history = [{key: value for key, value in entry.items() if key != "hashed"} for entry in found.record["history"]]
    record = {key: value for key, value in found.record.items() if key != "picture_hashes"} | {"history": history}
    Archive(folder, NAME).write(record, {"method": found.parts["method"]}, 1)


def test_a_learner_without_hashes_loads_and_says_so(learner, files, towers, tmp_path):
    old(learner, tmp_path / "old")
    again = IncrementalClassifier.load(tmp_path / "old", towers)
    assert "learned without hashes, by an earlier version or in a run: 6 images" in again.notices_[-1]
    again.partial_fit(files[:1], ["oak"])
    assert again.counts_.tolist() == [5, 2]
    again.save(tmp_path / "old")
    text = (tmp_path / "old" / "CARD.md").read_text()
    assert "6 images, not known one by one" in text
    assert "1 image |" in text
    assert (
        "learned without hashes, by an earlier version or in a run: 6 images"
        in IncrementalClassifier.load(tmp_path / "old", towers).notices_[-1]
    )


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda state: state.pop("classes"), "in place of hashes and classes"),
        (lambda state: state.update(classes=state["classes"] + 1), "out of range"),
        (lambda state: state.update(classes=state["classes"] - 1), "out of range"),
        (lambda state: state.update(classes=state["classes"][:-1]), "shapes or types"),
        (lambda state: state.update(hashes=state["hashes"][:, :16]), "shapes or types"),
        (lambda state: state.update(hashes=state["hashes"].float()), "shapes or types"),
        (lambda state: state.update(classes=torch.tensor(3)), "shapes or types"),
    ],
)
def test_hashes_that_do_not_fit_are_refused(spoil, part, learner, towers, tmp_path):
    learner.save(tmp_path)
    found = Archive(tmp_path, NAME).read()
    spoil(found.parts["pictures"])
    Archive(tmp_path, NAME).write(found.record, found.parts)
    with pytest.raises(ResultError, match=part):
        IncrementalClassifier.load(tmp_path, towers)


def test_the_state_comes_back():
    pictures = LearnedPictures().with_more([b"b" * 32, b"a" * 32, b"b" * 32], [0, 2, 1])
    again = LearnedPictures.from_state(pictures.state_dict(), 3)
    assert len(again) == 3
    assert same(again.state_dict(), pictures.state_dict())
    assert again.without_class(0).state_dict()["classes"].tolist() == [1, 0]
    assert len(LearnedPictures.from_state(LearnedPictures().state_dict(), 0)) == 0


def test_rows_of_embeddings_are_known_too():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 8)).astype("float32")
    towers = FeatureTowers(name="made", dim=8, logit_scale=20.0, fingerprint="made", names=("a", "b"), text=None)
    learner = IncrementalClassifier("simplecil", towers).partial_fit(rows, ["a", "a", "b", "b"])
    learner.partial_fit(rows[:2].astype("float64"), ["a", "a"])
    assert learner.counts_.tolist() == [2, 2]

"""Predictions batch by batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cairn import IncrementalClassifier
from cairn.data.feature_store import FeatureStore
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, UnreadableImages
from cairn.towers.catalogue import load_towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three classes, 11 to learn and 23 to ask for; two of these are damaged."""
    root, data = tmp_path_factory.mktemp("stream"), shapes_dataset()
    for part, number in (("train", 11), ("ask", 23)):
        (root / part).mkdir()
        for i in range(number):
            row = np.flatnonzero(data.train.labels == i % 3)[i // 3 + (5 if part == "ask" else 0)]
            Image.fromarray(data.train[row]).save(root / part / f"{i:02d}.png")
    for bad in (4, 17):
        (root / "ask" / f"{bad:02d}.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def towers_once():
    return load_towers("tiny", device="cpu")


@pytest.fixture(scope="module")
def learner(folder, towers_once):
    files = sorted((folder / "train").iterdir())
    return IncrementalClassifier(towers=towers_once, device="cpu").partial_fit(
        files, [f"class {i % 3}" for i in range(len(files))]
    )


def files_of(folder) -> list[Path]:
    return sorted((folder / "ask").iterdir())


@pytest.mark.parametrize("lazily", [False, True])
def test_a_stream_is_the_predictions_in_parts(learner, folder, lazily):
    files = files_of(folder)
    whole = learner.predictions(files, known=True, reasons=2, on_bad_image="skip")
    parts = list(learner.stream((file for file in files) if lazily else files, known=True, reasons=2, batch=3))
    assert [len(part) for part in parts] == [3, 2, 3, 3, 3, 2, 3, 2]
    torch.testing.assert_close(torch.cat([part.scores for part in parts]), whole.scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([part.known_scores() for part in parts]), whole.known_scores(), rtol=1e-3)
    assert np.concatenate([part.positions for part in parts]).tolist() == whole.positions.tolist()
    assert whole.positions.tolist() == [i for i in range(23) if i not in (4, 17)]
    assert {row for part in parts for row in part.unreadable} == set(whole.unreadable) == {4, 17}
    assert [why[0]["name"] for part in parts for why in part.told_reasons()] == list(whole.labels())


def test_more_than_is_read_ahead_keeps_its_positions(learner, folder):
    good = [file for i, file in enumerate(files_of(folder)) if i not in (4, 17)][:3]
    many = good * 12  # 36 batches of one, where 16 are read ahead
    parts = list(learner.stream(many, batch=1))
    assert [int(part.positions[0]) for part in parts] == list(range(36))
    assert [part.labels()[0] for part in parts] == list(learner.predict(good)) * 12


def test_a_generator_is_read_no_further_than_needed(learner, folder):
    good, taken = files_of(folder)[0], []

    def endless():
        while True:
            taken.append(1)
            yield good

    stream = learner.stream(endless(), batch=2)
    next(stream)
    assert len(taken) == 32


def test_learning_between_batches_neither_waits_nor_changes_the_answers(learner, folder):
    import copy

    own, files = copy.deepcopy(learner), files_of(folder)[:4]
    stream = own.stream(files, batch=2)
    first = next(stream)
    own.partial_fit(files[0], "class 9")
    second = next(stream)
    assert len(own.classes_) == 4
    assert list(first.classes) == list(second.classes) == ["class 0", "class 1", "class 2"]


def test_stop_raises_before_the_first_answer_and_names_all(learner, folder):
    with pytest.raises(UnreadableImages) as error:
        next(learner.stream(iter(files_of(folder)), on_bad_image="stop", batch=2))
    assert sorted(error.value.reasons) == [4, 17]
    with pytest.raises(ConfigError, match="batch 0"):
        next(learner.stream([], batch=0))


def passed(towers) -> int:
    return sum(number for what, number in towers.passes.items() if what != "stored")


def test_with_a_store_images_seen_before_need_no_pass(learner, folder, tmp_path, towers_once):
    learner.save(tmp_path / "learner")
    files, store = files_of(folder), FeatureStore(tmp_path / "store")
    expected = learner.predictions(files, on_bad_image="skip")
    first = IncrementalClassifier.load(tmp_path / "learner", towers_once, "cpu", store)
    before = passed(towers_once)
    found = first.predictions(files, on_bad_image="skip")
    assert passed(towers_once) - before == 32  # 21 images, in one pass of a fixed size
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert found.unreadable.keys() == expected.unreadable.keys()

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in files:
        (moved / f"x{file.name}").write_bytes(file.read_bytes())
    again = IncrementalClassifier.load(tmp_path / "learner", towers_once, "cpu", store)
    before = passed(towers_once)
    second = again.predictions(sorted(moved.iterdir()), on_bad_image="skip")
    assert passed(towers_once) == before
    assert torch.equal(second.scores, found.scores)
    assert second.unreadable.keys() == expected.unreadable.keys()


def test_a_method_that_trains_the_tower_has_no_use_for_a_store(folder, tmp_path, towers_once):
    files = sorted((folder / "train").iterdir())
    moving = IncrementalClassifier(
        "dmc", towers_once, settings={"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1}, device="cpu"
    ).partial_fit(files, [f"class {i % 3}" for i in range(len(files))])
    moving.save(tmp_path / "dmc")
    with pytest.raises(ConfigError, match="dmc trains the image tower"):
        IncrementalClassifier.load(tmp_path / "dmc", towers_once, "cpu", FeatureStore(tmp_path / "store"))

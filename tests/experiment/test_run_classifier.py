"""What a run keeps with --keep-learner is a learner like any other: loaded, asked, taught, served and exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cairn import IncrementalClassifier
from cairn.data.shapes import shapes_dataset
from cairn.errors import DataError, ResultError
from cairn.experiment.folder import LEARNER, read_learner, write_learner
from cairn.experiment.run import Outcome, run_stream
from cairn.experiment.schema import RunConfig
from cairn.serve.service import Service
from cairn.storage.archive import Archive

RUN = ("--data", "shapes", "--step", "20", "--limit-train", "4", "--limit-test", "1", "--device", "cpu")
SHORT = ("--set", "stage1.schedule.epochs=1", "--set", "stage2.schedule.epochs=1")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of DMC on two tasks of unequal classes, and the folder of its learner."""
    folder, ended = tmp_path_factory.mktemp("run"), []
    config = RunConfig(
        method="dmc",
        base=12,
        step=28,
        limit_train=3,
        limit_test=1,
        device="cpu",
        seed=3,
        settings=("stage1.schedule.epochs=1", "stage2.schedule.epochs=1"),
    )
    result = run_stream(config, learned=lambda learned: (ended.append(learned), write_learner(folder, learned)))
    return folder / LEARNER, ended[0], result


def shown(ended: Outcome, number: int) -> list[np.ndarray]:
    """Test images as they lie in the data set."""
    return [np.asarray(ended.stream.tests[0][row]) for row in range(number)]


def test_it_answers_as_the_method_does_with_the_temperature_of_the_run(kept):
    folder, ended, result = kept
    learner, images = IncrementalClassifier.load(folder), shown(kept[1], 5)
    towers, method = ended.towers, ended.method
    with torch.no_grad():
        pixels = towers.pixels(torch.stack([towers.prepare(image) for image in images]))
        scores = method.scores(method.embed(pixels)).double()
    assert learner.predict(images).tolist() == [result.class_order[c] for c in scores.argmax(1)]
    stands_out = scores.amax(1) - scores.mean(1)
    p = torch.softmax(scores / (result.temperature[-1] * stands_out.sqrt()[:, None]), 1)
    assert learner.predict_proba(images) == pytest.approx(p.numpy(), abs=1e-6)
    assert ((learner.known_score(images) >= 0) & (learner.known_score(images) <= 1)).all()


def test_it_tells_what_was_learned_and_when(kept):
    folder, _, result = kept
    learner = IncrementalClassifier.load(folder)
    assert learner.classes_.tolist() == result.class_order
    assert learner.counts_.tolist() == [3] * 40
    assert [(len(entry["new"]), entry["images"]) for entry in learner.history_] == [(12, 36), (28, 84)]
    assert learner.seed == 3
    assert any("a run: 120 images" in notice for notice in learner.notices_)


def test_it_learns_on_and_is_saved_anew(kept, tmp_path):
    folder, ended, _ = kept
    learner, images = IncrementalClassifier.load(folder), shown(ended, 6)
    learner.partial_fit(images, ["a class of its own"] * 6)
    learner.save(tmp_path / "more")
    again = IncrementalClassifier.load(tmp_path / "more")
    assert len(again.classes_) == 41
    assert (again.predict_proba(images) == learner.predict_proba(images)).all()


def test_the_service_and_the_reader_of_run_folders_take_it(kept):
    folder, _, result = kept
    service = Service(folder, IncrementalClassifier.load(folder))
    try:
        assert [found["name"] for found in service.classes()] == result.class_order
    finally:
        service.close()
    (folder.parent / "result.json").write_text(result.model_dump_json())
    found, learner = read_learner(folder.parent)
    assert found.method == "dmc"
    assert learner.method_.memory.classes == 40


def test_every_command_takes_it(cairn, tmp_path):
    assert cairn("run", "dmc", *RUN, *SHORT, "--keep-learner", "--out", "run")[0] == 0
    assert cairn("export", "run/learner", "--onnx", "run.onnx")[0] == 0
    assert "40 classes from 160 images" in cairn("inspect", "run/learner")[1]
    name = IncrementalClassifier.load(tmp_path / "run" / "learner").classes_[0]
    assert cairn("forget", "run/learner", name)[0] == 0
    assert "39 classes" in cairn("inspect", "run/learner")[1]


def test_with_a_cache_it_is_that_of_the_towers(cairn, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    assert cairn("run", "lda", *RUN, "--cache", "--keep-learner", "--out", "run")[0] == 0
    images = [np.asarray(shapes_dataset().test[row]) for row in range(3)]
    assert len(IncrementalClassifier.load(tmp_path / "run" / "learner").predict(images)) == 3


def test_of_a_features_file_it_takes_embeddings(cairn, tmp_path, features, embedded_dataset):
    assert cairn("run", "lda", "--data", features, "--step", "2", "--keep-learner", "--out", "run")[0] == 0
    learner = IncrementalClassifier.load(tmp_path / "run" / "learner")
    rows = np.stack([embedded_dataset.test[row] for row in range(len(embedded_dataset.test))])
    names = [embedded_dataset.classes[label] for label in embedded_dataset.test.labels]
    assert learner.score(rows, names) > 0.8
    with pytest.raises(DataError, match="this learner takes embeddings, rows of 16 numbers"):
        learner.predict("picture.png")


def test_a_learner_of_a_features_file_is_learned_by_its_name(features, embedded_dataset):
    learner = IncrementalClassifier("lda", features)
    rows = [embedded_dataset.train[row] for row in range(len(embedded_dataset.train))]
    learner.partial_fit(rows, [embedded_dataset.classes[label] for label in embedded_dataset.train.labels])
    assert learner.predict(rows[0]).tolist() == [embedded_dataset.classes[embedded_dataset.train.labels[0]]]


def test_a_method_that_keeps_images_is_refused_before_it_is_trained(cairn, tmp_path):
    status, _, err = cairn("run", "joint", *RUN, "--keep-learner", "--out", "run")
    assert status == 2
    assert "--keep-learner: method 'joint' keeps images, so it cannot be saved" in err
    assert not list(tmp_path.iterdir())


def test_one_of_an_earlier_version_says_what_to_do(tmp_path, kept):
    Archive(tmp_path, "learner").write({}, {"method": kept[1].method.state_dict()})
    with pytest.raises(ResultError, match="kept by a run of an earlier version; run it again with --keep-learner"):
        IncrementalClassifier.load(tmp_path)

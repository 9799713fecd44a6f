"""Folders that cairn 0.1.0 wrote still load: learners, a run with its learner, and a run that was cut off.

`old/` was made at commit d3862a5 from 56 training rows of six classes (`rows.safetensors`) and, for `dmc`, from nine pictures
of `shapes`; `expected.json` holds what the learners answered then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cairn import IncrementalClassifier
from cairn.data.shapes import shapes_dataset
from cairn.experiment.folder import CHECKPOINT, RunFolder, read_call, read_learner, read_result
from cairn.experiment.run import run_stream
from cairn.storage.files import read_json
from cairn.training.checkpoint import Checkpoint

OLD = Path(__file__).parent / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
TOLERANCE = 2e-3


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old folders to work in: runs name their features file by a path from here."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def drawn(split, classes, number=1):
    return [np.asarray(split[int(row)]) for c in classes for row in np.flatnonzero(split.labels == c)[:number]]


def test_a_learner_of_rows(old):
    learner = IncrementalClassifier.load(old / "simplecil", towers="rows.safetensors")
    rows, expected = load_file(old / "rows.safetensors"), EXPECTED["simplecil"]
    assert learner.classes_.tolist() == expected["classes"]
    assert learner.counts_.tolist() == expected["counts"]
    assert learner.predict_proba(rows["test_features"]) == pytest.approx(
        np.array(expected["probabilities"]), abs=TOLERANCE
    )
    assert learner.known_score(rows["test_features"]) == pytest.approx(np.array(expected["known"]), abs=TOLERANCE)
    again = rows["train_features"][:3]
    learner.partial_fit(again, ["class_0"] * 3)  # known one by one: nothing is learned twice
    assert learner.counts_.tolist() == expected["counts"]
    learner.partial_fit(again + 1, ["class_0"] * 3).save(old / "simplecil")
    assert (
        IncrementalClassifier.load(old / "simplecil", towers="rows.safetensors").counts_[0] == expected["counts"][0] + 3
    )


def test_a_learner_of_pictures(old):
    learner, data, expected = IncrementalClassifier.load(old / "dmc"), shapes_dataset(), EXPECTED["dmc"]
    pictures = drawn(data.test, (0, 1))
    assert learner.classes_.tolist() == expected["classes"]
    assert learner.counts_.tolist() == expected["counts"]
    assert learner.predict_proba(pictures) == pytest.approx(np.array(expected["probabilities"]), abs=TOLERANCE)
    assert learner.known_score(pictures) == pytest.approx(np.array(expected["known"]), abs=TOLERANCE)
    learner.partial_fit(drawn(data.train, (2,), 4), [data.classes[2]] * 4)
    assert learner.counts_.tolist() == [*expected["counts"], 4]


def test_a_run_with_its_learner(old):
    result, learner = read_learner(old / "run")
    assert (result.method, result.seed, len(result.class_order)) == ("dmc", 3, 6)
    scores = learner.method_.scores(torch.from_numpy(load_file(old / "rows.safetensors")["test_features"]))
    torch.testing.assert_close(scores.detach(), torch.tensor(EXPECTED["run"]["scores"]), atol=TOLERANCE, rtol=1e-4)


def test_a_run_that_was_cut_off(old):
    """It goes on within its second task, and ends where the one that was not cut off ended."""
    reference, call = read_result(old / "run"), read_call(old / "unfinished")
    folder = RunFolder(old / "unfinished", call)
    assert folder.finished() is None
    assert read_json(next((old / "unfinished" / CHECKPOINT).glob("*.json")))["record"]["durations"]
    result = run_stream(call.run, checkpoint=Checkpoint(), archive=folder.archive)
    assert result.resumed == 1
    assert result.accuracy == reference.accuracy
    assert result.temperature == pytest.approx(reference.temperature, rel=1e-3)
    assert result.nll == pytest.approx(reference.nll, rel=1e-3)

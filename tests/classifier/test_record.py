"""The record of a learner: what does not fit its schema is one line, and what was saved comes back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cairn import IncrementalClassifier
from cairn.classifier.record import LearnerRecord
from cairn.cli.app import main
from cairn.errors import ResultError, one_line
from cairn.storage.archive import digest
from cairn.storage.schema import validated
from cairn.storage.versions import versions
from cairn.towers.features import FeatureTowers

NAMES = ("owl", "fox", "bear")


@pytest.fixture(scope="module")
def towers():
    text = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    return FeatureTowers(name="made", dim=8, logit_scale=20.0, fingerprint="made", names=NAMES, text=text)


@pytest.fixture
def folder(towers, tmp_path):
    """A learner of three classes, learned in two goes from unequal numbers of rows."""
    rows = np.random.default_rng(1).normal(size=(12, 8)).astype("float32")
    learner = IncrementalClassifier("simplecil", towers, descriptions={"owl": ["two large eyes"]})
    learner.partial_fit(rows[:7], ["owl"] * 4 + ["fox"] * 3)
    learner.partial_fit(rows[7:], ["bear"] * 3 + ["owl"] * 2)
    learner.save(tmp_path / "learner")
    return tmp_path / "learner"


def manifest_of(folder):
    (path,) = folder.glob("learner-*.json")
    return path, json.loads(path.read_text())


def rewrite(folder, change):
    """The record changed, the manifest's own hash made to fit."""
    path, stored = manifest_of(folder)
    del stored["sha256"]
    change(stored["record"])
    path.write_text(json.dumps(stored | {"sha256": digest(stored)}))


def setting(*keys, to):
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


WRONG = {
    "description is a path": (setting("descriptions", to="/etc/hostname"), "descriptions: must be an object"),
    "sentence is a path": (setting("descriptions", "owl", to="/etc/hostname"), "descriptions.owl: must be a valid array"),
    "no sentence": (setting("descriptions", "owl", to=[]), "descriptions.owl: "),
    "empty sentence": (setting("descriptions", "owl", to=[" "]), "descriptions.owl.0: must not be empty"),
    "reference is a text": (setting("references", to=["nan"]), "references.0: must be a valid number, not 'nan'"),
    "negative count": (setting("counts", 1, to=-1), "counts.1: must be greater than or equal to 1, not -1"),
    "count of a truth value": (setting("counts", 1, to=True), "counts.1: must be a valid integer, not True"),
    "count of a fraction": (setting("counts", 1, to=2.5), "counts.1: "),
    "a count too many": (setting("counts", to=[6, 3, 3, 1]), "counts: 4 of them for 3 classes"),
    "counts that nobody learned": (setting("counts", to=[600, 3, 3]), "counts: more images than the history tells of"),
    "no template": (setting("templates", to=[]), "templates: "),
    "template without a place": (setting("templates", to=["a photo"]), "templates.0: must hold {} once"),
    "templates are a text": (setting("templates", to="a photo of a {}."), "templates: must be a valid array"),
    "towers are a list": (setting("towers", "name", to=["x"]), "towers.name: must be a valid string, not ['x']"),
    "towers are a text": (setting("towers", to="tiny"), "towers: "),
    "unknown precision": (setting("towers", "precision", to="int8"), "towers.precision: must be 'float32' or 'bfloat16'"),
    "history is a text": (setting("history", to="junk"), "history: must be a valid array"),
    "history of texts": (setting("history", to=["junk"]), "history.0: "),
    "history of another date": (setting("history", 0, "date", to="junk"), "history.0.date: "),
    "history of other classes": (setting("history", 0, "new", to=["wolf"]), "history: the classes that were learned"),
    "history of negative images": (setting("history", 0, "images", to=-1), "history.0.images: "),
    "name with a control character": (setting("classes", 0, to="\x1b[2J"), "classes.0: holds a control character"),
    "name twice": (setting("classes", to=["owl", "owl", "bear"]), "classes: a name is there twice"),
    "seed is a text": (setting("seed", to="1"), "seed: must be a valid integer, not '1'"),
    "method is a number": (setting("method", to=3), "method: must be a valid string, not 3"),
    "unknown setting": (setting("config", "shots", to=1), "settings of the learner: unknown key 'shots'"),
    "unknown key": (setting("colour", to=1), "unknown key 'colour'; damaged or edited by hand"),
    "unknown key with an escape": (setting("towers", "a\x1b", to=1), "unknown key 'towers.a\\x1b'"),
    "missing key": (lambda record: record.pop("classes"), "classes: field required"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_one_line(change, said, folder, towers, monkeypatch, capsys):
    rewrite(folder, change)
    with pytest.raises(ResultError) as caught:
        IncrementalClassifier.load(folder, towers)
    message = str(caught.value)
    assert one_line(message) == message
    assert f"'{folder}': " in message
    assert said in message
    if "settings of" in said:  # only whoever builds the method reads these
        return
    monkeypatch.setattr("sys.argv", ["cairn", "inspect", str(folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_number_that_is_none_is_refused(towers, folder):
    """JSON cannot hold it, a learner in memory can."""
    learner = IncrementalClassifier.load(folder, towers)
    learner._learned = replace(learner._learned, references=[0.5, float("nan")], referenced_among=[3, 3])
    before = sorted(folder.iterdir())
    with pytest.raises(ResultError, match=r"references\.1: must be a finite number, not nan"):
        learner.save(folder)
    assert sorted(folder.iterdir()) == before


def test_what_a_newer_version_added_is_named_and_the_version_told(folder, towers):
    def newer(record):
        record["versions"]["cairn"] = "99.1.0"
        record["halo"] = 3

    rewrite(folder, newer)
    with pytest.raises(ResultError, match=r"unknown key 'halo'; made by a newer version, cairn 99\.1\.0 \(this is "):
        IncrementalClassifier.load(folder, towers)
    rewrite(folder, lambda record: record.pop("halo"))  # newer, and nothing in it is unknown
    assert list(IncrementalClassifier.load(folder, towers).classes_) == list(NAMES)


@pytest.mark.parametrize("other", ["0.0.1", versions()["cairn"], "0", "junk", ""])
def test_older_and_odd_versions_are_not_newer(other, folder, towers):
    def changed(record):
        record["versions"]["cairn"] = other
        record["halo"] = 3

    rewrite(folder, changed)
    with pytest.raises(ResultError, match=r"unknown key 'halo'; damaged or edited by hand"):
        IncrementalClassifier.load(folder, towers)


def test_a_record_comes_back_as_it_was_saved(folder, towers):
    learner = IncrementalClassifier.load(folder, towers)
    assert (list(learner.classes_), learner.counts_.tolist()) == (list(NAMES), [6, 3, 3])
    assert learner.descriptions == {"owl": ["two large eyes"]}
    assert [(entry["new"], entry["again"], entry["images"]) for entry in learner.history_] == [
        (["owl", "fox"], [], 7),
        (["bear"], ["owl"], 5),
    ]
    learner.forget("fox")
    learner.save(folder)
    again = IncrementalClassifier.load(folder, towers)
    assert (list(again.classes_), again.counts_.tolist()) == (["owl", "bear"], [6, 3])
    assert again.history_ == learner.history_
    assert again.history_[-1]["forgotten"] == 1


def test_an_older_record_without_references_loads(folder, towers):
    rewrite(folder, lambda record: record.pop("references"))
    assert IncrementalClassifier.load(folder, towers).references_ == []


def test_the_schema_converts_nothing(folder):
    stored = manifest_of(folder)[1]["record"]
    record = validated(LearnerRecord, stored, "record")
    assert record.model_dump(mode="json", exclude_unset=True) == stored

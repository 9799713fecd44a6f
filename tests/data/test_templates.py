"""Prompt templates: one check, wherever they enter."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cairn import Dataset, IncrementalClassifier, Task
from cairn.cli.app import main
from cairn.data.catalogue import CATALOGUE
from cairn.data.descriptions import written_by
from cairn.data.embeddings import features_dataset, save_features
from cairn.data.images import Subset
from cairn.data.templates import DEFAULT, prompt_templates
from cairn.errors import CairnError, DataError
from cairn.experiment.inputs import prompted

GOOD = "a sketch of a {}."
BAD = {
    "another field": "a photo of a {label}.",
    "a field beside": "a photo of a {} in {place}.",
    "twice": "a {} is a {}.",
    "none": "a photo.",
    "escaped": "a {{}}.",
    "numbered": "a {0}.",
    "empty": "",
}


def rows():
    values = np.arange(6, dtype="float32").reshape(3, 2)
    return {
        "train_features": values,
        "train_labels": np.arange(3),
        "test_features": values,
        "test_labels": np.arange(3),
    }


def in_file(template, tmp_path):
    file = tmp_path / "f.safetensors"
    save_features(file, **rows(), class_names=["a", "b", "c"], templates=[GOOD])
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["templates"] = json.dumps([template])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return features_dataset(file).templates


def of_run(template, tmp_path):
    return prompted(of_classes(DEFAULT), template).templates


def saved(template, tmp_path):
    save_features(tmp_path / "f.safetensors", **rows(), class_names=["a", "b", "c"], templates=template)
    return features_dataset(tmp_path / "f.safetensors").templates


def of_classes(template):
    nothing = Subset([], np.array([], int), np.array([], int))
    return Dataset("made", ("a",), nothing, nothing, template)


def of_task(template, tmp_path):
    return Task(0, range(1), ("a",), template, Subset([], np.array([], int), np.array([], int))).templates


def learned(templates):
    images = [np.full((8, 8, 3), grey, np.uint8) for grey in (0, 250)]
    held = IncrementalClassifier("zero-shot", "tiny", templates=templates).partial_fit(images, ["a", "b"])
    return tuple(held._record().templates)


ENTRANCES = {
    "the check itself": lambda template, _: prompt_templates(template),
    "IncrementalClassifier": lambda template, _: learned(template),
    "a list of IncrementalClassifier": lambda template, _: learned([template]),
    "run": of_run,
    "a features file": in_file,
    "save_features": saved,
    "a data set": lambda template, _: of_classes(template).templates,
    "a task": of_task,
}


@pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES)
def test_a_template_has_one_place_for_the_class_and_a_text_is_one_template(enter, tmp_path):
    assert enter(GOOD, tmp_path) == (GOOD,)
    for template in BAD.values():
        with pytest.raises(CairnError, match=r"must hold \{\} once") as caught:
            enter(template, tmp_path)
        assert f"'{template}'" in str(caught.value)


def test_what_is_no_text_or_no_template_at_all():
    for given, part in (((), "at least one"), ([3], "must be a text"), ([None], "must be a text")):
        with pytest.raises(CairnError, match=part):
            prompt_templates(given)


@pytest.mark.parametrize("template", ["a photo of a {label}.", "{} {}"])
def test_the_commands_refuse_it_before_anything_is_there(template, tmp_path, monkeypatch, capsys):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").touch()
    out = tmp_path / "out"
    for words in (("learn", out, tmp_path / "in", "--towers", "tiny"), ("run", "zero-shot", "--out", out)):
        monkeypatch.setattr("sys.argv", ["cairn", *map(str, words), "--template", template])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert "must hold {} once" in capsys.readouterr().err
        assert not out.exists()


def test_class_texts_of_a_lone_text_are_those_of_one_template(towers):
    names = ["red square", "blue circle"]
    assert torch.equal(towers.class_texts(names, GOOD), towers.class_texts(names, [GOOD]))
    with pytest.raises(CairnError, match=r"must hold \{\} once"):
        towers.class_texts(names, ["a photo of a {label}."])


def test_templates_of_the_catalogue():
    for row in CATALOGUE.values():
        assert prompt_templates(row.templates) == row.templates
    assert prompt_templates(DEFAULT) == DEFAULT


def test_a_lone_sentence_is_one_sentence():
    assert written_by("me", {"fox": "a bushy tail"}).of(["fox"]) == (("a bushy tail",),)
    for wrong in ("", [], [3], ["fine", " "]):
        with pytest.raises(DataError, match="descriptions of 'fox'"):
            written_by("me", {"fox": wrong})

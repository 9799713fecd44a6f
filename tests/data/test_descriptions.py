from __future__ import annotations

import json

import pytest

from cairn.data.descriptions import read_descriptions, written_by
from cairn.data.folders import folder_dataset
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import task_stream
from cairn.errors import DataError

SAID = {"cat": ("whiskers", "a tail"), "dog": ("a wet nose",)}


def test_sentences_are_found_by_name_whatever_the_order(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(written_by("me", SAID).model_dump_json())
    assert read_descriptions(file).of(["dog", "cat"]) == (("a wet nose",), ("whiskers", "a tail"))


def test_missing_classes_are_listed():
    with pytest.raises(DataError, match=r"none for 2 of 3 classes: 'cow', 'pig'; run `cairn describe`"):
        written_by("me", SAID).of(["cow", "cat", "pig"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ('{"schema_version": 9}', "schema version 9, this cairn reads 1"),
        ('{"classes": {"cat": {"sentences": []}}}', "classes.cat.sentences"),
        ('{"classes": {"cat": {"sentences": [" "]}}}', "a sentence is empty"),
        ('{"classes": {"cat": {"sentence": ["x"]}}}', "classes.cat"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, says):
    file = tmp_path / "d.json"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        read_descriptions(file)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(DataError, match="no such file; write one with `cairn describe`"):
        read_descriptions(tmp_path / "d.json")


@pytest.mark.parametrize("part", ["stream", "dev"])
def test_the_drawn_world_describes_its_classes_without_naming_them(part):
    data = shapes_dataset(part)
    for name, sentences in zip(data.classes, data.descriptions.of(data.classes), strict=True):
        assert len(sentences) == len(set(sentences)) == 6
        assert not any(name in sentence for sentence in sentences)
    assert len(set(data.descriptions.of(data.classes))) == len(data.classes)


def test_a_folder_brings_its_descriptions_and_tasks_carry_them(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for name in SAID:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "a.png")
    assert task_stream(folder_dataset(tmp_path), step=1).tasks[0].descriptions is None
    (tmp_path / "descriptions.json").write_text(json.dumps(written_by("me", SAID).model_dump(mode="json")))
    task = task_stream(folder_dataset(tmp_path), step=1, order="natural").tasks[1]
    assert task.descriptions.of(task.names) == (("a wet nose",),)

"""What is written and read back has a strict schema: nothing is converted, no impossible number and no unknown key is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cairn.config import parsed
from cairn.data.descriptions import read_descriptions, written_by
from cairn.embed.plan import PLAN, stored_plan
from cairn.errors import CairnError, DataError, ResultError
from cairn.experiment.folder import CALL, RESULT, Call, read_call, read_result
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.storage.archive import Archive, digest
from cairn.storage.files import read_json, write_json
from cairn.training.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def result(features, tmp_path):
    """A result as JSON, and the file it is read from."""
    found = run_stream(RunConfig(method="simplecil", data=features, step=2)).model_dump(mode="json")
    return found, tmp_path / RESULT


def test_every_stored_result_is_read():
    files = sorted((ROOT / "results").rglob(RESULT))
    assert files
    for file in files:
        stored = read_json(file)
        if isinstance(texts := stored["run"]["settings"], list):  # in results of earlier versions
            stored["run"]["settings"] = dict(parsed(texts))
        assert read_result(file).model_dump(mode="json", exclude_unset=True) == stored


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("last", 1.5, "last: must be less than or equal to"),
        ("seen_accuracy", [0.5, -0.5, 0.5], "seen_accuracy.1: must be greater than or equal to 0, not -0.5"),
        ("resumed", -1, "resumed: must be greater than or equal to 0, not -1"),
        ("memory_bytes", -8, "memory_bytes: "),
        ("seconds", -1.0, "seconds: "),
        ("task_sizes", [2, 0, 2], "task_sizes.1: "),
        ("seed", "1", "seed: must be a valid integer, not '1'"),
        ("seed", True, "seed: must be a valid integer, not True"),
        ("class_order", "abc", "class_order: must be a valid array"),
        ("towers", {"name": ["x"], "fingerprint": "1"}, "towers.name: must be a valid string, not ['x']"),
        ("towers", {"name": "x", "fingerprint": "1", "colour": 1}, "unknown key 'towers.colour'"),
        ("tower_passes", {"images": -1, "text_tokens": 0}, "tower_passes.images: "),
        ("halo", 1, "unknown key 'halo'; damaged or edited by hand"),
    ],
)
def test_a_wrong_result_is_one_line(result, key, value, said):
    found, file = result
    write_json(file, found | {key: value})
    with pytest.raises(ResultError) as caught:
        read_result(file)
    assert said in str(caught.value)


def test_a_result_of_a_newer_version_says_so(result):
    found, file = result
    write_json(file, found | {"halo": 1, "versions": found["versions"] | {"cairn": "99.0"}})
    with pytest.raises(ResultError, match=r"unknown key 'halo'; made by a newer version, cairn 99\.0"):
        read_result(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint_seconds", -1), ("seeds", ["1"]), ("cache", "no"), ("checkpoint_seconds", "60"), ("halo", 1)],
)
def test_a_wrong_call_is_one_line(features, tmp_path, key, value):
    call = Call(run=RunConfig(method="dmc", data=features, step=2), checkpoint_seconds=60).model_dump(mode="json")
    write_json(tmp_path / CALL, call)
    assert read_call(tmp_path).run.data == features
    write_json(tmp_path / CALL, call | {key: value})
    with pytest.raises(ResultError, match=rf"{key}.*; use the version that wrote it, or begin again"):
        read_call(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("resumed", -1, "resumed: must be greater than or equal to 0"),
        ("resumed", "1", "resumed: must be a valid integer"),
        ("durations", ["1"], "durations.0: must be a valid number"),
        ("seconds", -1, "seconds: "),
        ("passes", {"learning": {"images": -1}}, "passes.learning.images: "),
        ("evaluations", [{"accuracy": ["1"]}], "evaluations.0."),
        ("halo", 1, "unknown key 'halo'"),
    ],
)
def test_a_wrong_checkpoint_is_one_line(features, tmp_path, key, value, said):
    config, archive, checkpoint = (
        RunConfig(method="simplecil", data=features, step=2),
        Archive(tmp_path, "run"),
        Checkpoint(),
    )
    run_stream(config, checkpoint=checkpoint, archive=archive)
    checkpoint.save()
    path = tmp_path / "run-000001.json"
    stored = read_json(path)
    del stored["sha256"]
    stored["record"][key] = value
    path.write_text(json.dumps(stored | {"sha256": digest(stored)}))
    with pytest.raises(ResultError) as caught:
        run_stream(config, checkpoint=Checkpoint(), archive=Archive(tmp_path, "run"))
    assert f"'{tmp_path}': the checkpoint: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m | {"colour": 1}, "unknown key 'colour'"),
        (lambda m: m | {"parts": {"a": m["parts"]["a"] | {"bytes": -1}}}, "parts.a.bytes: "),
        (lambda m: m | {"parts": {"a": m["parts"]["a"] | {"sha256": "F" * 64}}}, "parts.a.sha256: "),
        (lambda m: m | {"parts": {"a": m["parts"]["a"] | {"link": "x"}}}, "unknown key 'parts.a.link'"),
        (lambda m: m | {"parts": {"../a": m["parts"]["a"]}}, "parts.../a"),
        (lambda m: m | {"record": []}, "record: "),
    ],
)
def test_a_wrong_manifest_is_one_line(tmp_path, change, said):
    import torch

    Archive(tmp_path, "x").write({"b": 1}, {"a": {"t": torch.ones(2)}})
    path = tmp_path / "x-000001.json"
    stored = read_json(path)
    del stored["sha256"]
    stored = change(stored)
    path.write_text(json.dumps(stored | {"sha256": digest(stored)}))
    with pytest.raises(ResultError) as caught:
        Archive(tmp_path, "x").read()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d | {"classes": {"owl": {"sentences": "/etc/hostname"}}}, "classes.owl.sentences: must be a valid array"),
        (lambda d: d | {"classes": {"owl": {"sentences": [3]}}}, "classes.owl.sentences.0: must be a valid string, not 3"),
        (lambda d: d | {"classes": {"owl": {"sentences": ["x"], "colour": 1}}}, "unknown key 'classes.owl.colour'"),
        (lambda d: d | {"schema_version": 2}, "schema version 2, this cairn reads 1"),
        (lambda d: d | {"schema_version": True}, "schema_version: must be a valid integer, not True"),
    ],
)  # fmt: skip
def test_wrong_descriptions_are_one_line(tmp_path, change, said):
    path = tmp_path / "d.json"
    write_json(path, change(written_by("me", {"owl": ["two large eyes"]}).model_dump(mode="json")))
    with pytest.raises(DataError) as caught:
        read_descriptions(path)
    assert said in str(caught.value)


def test_a_plan_that_does_not_fit_is_nobody_s(tmp_path):
    write_json(tmp_path / PLAN, {"schema_version": 1, "config": {}})
    assert stored_plan(tmp_path) is None
    with pytest.raises(CairnError):
        read_result(tmp_path / PLAN)

"""Nothing let in: what comes from a file is refused in one line or read right; it runs nothing, hangs nothing, and reaches
nothing outside of its folder."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save

import cairn
import cairn.storage.files
from cairn.cli.app import main
from cairn.config import with_settings
from cairn.data.descriptions import read_descriptions, written_by
from cairn.data.embeddings import features_dataset
from cairn.data.stream import class_order
from cairn.errors import CairnError, DataError, ResultError, one_line
from cairn.experiment.folder import (
    CALL,
    CHECKPOINT,
    EVENTS,
    LEARNER,
    LOCK,
    RESULT,
    Call,
    RunFolder,
    read_call,
    read_learner,
    read_result,
    write_learner,
)
from cairn.experiment.inputs import prepared
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import Archive, digest
from cairn.storage.files import read_json, write_json
from cairn.storage.tensors import read_tensors
from cairn.training.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for part in ("cairn", "experiments", "benchmarks") for path in sorted((ROOT / part).rglob("*.py"))]


@pytest.fixture(autouse=True)
def in_time():
    """Ten seconds for a test of files that want to keep us."""
    import signal

    def late(number, frame):
        raise TimeoutError("more than ten seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(call, *parts, kind=CairnError):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert one_line(text) == text
    for part in parts:
        assert part in text


def called(monkeypatch, capsys, *words):
    """What the command says, in one line, on its way out with status 2."""
    monkeypatch.setattr("sys.argv", ["cairn", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("cairn: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def learner(features, tmp_path):
    """The folder of a run that kept its learner."""
    folder = tmp_path / "run"
    config = RunConfig(method="simplecil", data=features, step=2)
    result = run_stream(config, learned=partial(write_learner, folder))
    write_json(folder / RESULT, result.model_dump(mode="json"))
    return folder


@pytest.fixture
def call(features, tmp_path):
    """A folder in which a run is under way."""
    folder = tmp_path / "under-way"
    folder.mkdir()
    write_json(
        folder / CALL, Call(run=RunConfig(method="dmc", data=features, step=2), checkpoint_seconds=60).model_dump()
    )
    return folder


def part_of(learner):
    (path,) = (learner / LEARNER).glob("*method*.safetensors")
    return path


def sealed(learner, content):
    """The learner's tensors replaced by these bytes, and every hash made to fit."""
    import hashlib

    path, manifest = part_of(learner), learner / LEARNER / "learner-000001.json"
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"learner-method-{sha256[:16]}.safetensors"
    path.unlink()
    path.with_name(name).write_bytes(content)
    stored = read_json(manifest)
    del stored["sha256"]
    stored["parts"]["method"] = {"file": name, "bytes": len(content), "sha256": sha256}
    manifest.write_text(json.dumps(stored | {"sha256": digest(stored)}))


# --- tensors ----------------------------------------------------------------------------------------------------------


def file(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


BROKEN = {
    "empty": b"",
    "three bytes": b"abc",
    "another magic": b"PK\x03\x04" + bytes(40),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "header beyond the file": file(one(), bytes(8), length=2**63),
    "header of 2^64 - 1": file(one(), bytes(8), length=2**64 - 1),
    "header of 100 MB": file(one(), bytes(8), length=10**8 + 1),
    "header of nothing": file(b"", bytes(8)),
    "header that is no JSON": file(b"{not json", bytes(8)),
    "header that is a list": file([1, 2], bytes(8)),
    "header that is deep": file(b'{"a":' * 50_000, bytes(8)),
    "header in another encoding": file(b'{"a\xff": {}}', bytes(8)),
    "key twice": file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                      bytes(8)),
    "overlap": file(one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
    "gap": file(one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, bytes(20)),
    "beyond the end": file(one(data_offsets=[0, 4096]), bytes(8)),
    "backwards": file(one(data_offsets=[8, 0]), bytes(8)),
    "negative": file(one(data_offsets=[-8, 0]), bytes(8)),
    "shape too large": file(one(shape=[3]), bytes(8)),
    "shape overflows": file(one(shape=[2**32, 2**32, 2**32]), bytes(8)),
    "shape overflows to nothing": file(one(shape=[2**63, 2], data_offsets=[0, 0])),
    "shape negative": file(one(shape=[-2]), bytes(8)),
    "shape of a text": file(one(shape="2"), bytes(8)),
    "huge number": file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "unknown type": file(one(dtype="F99"), bytes(8)),
    "type of a number": file(one(dtype=1), bytes(8)),
    "half a character": file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "bytes behind": file(one(), bytes(9)),
    "metadata of numbers": file(one() | {"__metadata__": {"a": 1}}, bytes(8)),
}  # fmt: skip
ODD = {
    "nothing in it": save({}),
    "NaN": save({"prototypes": torch.full((6, 16), float("nan")), "counts": torch.ones(6, dtype=torch.int64)}),
    "infinite": save({"prototypes": torch.full((6, 16), float("inf")), "counts": torch.ones(6, dtype=torch.int64)}),
    "a class too few": save({"prototypes": torch.ones(5, 16), "counts": torch.ones(5, dtype=torch.int64)}),
    "too narrow": save({"prototypes": torch.ones(6, 1), "counts": torch.ones(6, dtype=torch.int64)}),
    "no matrix": save({"prototypes": torch.ones(96), "counts": torch.ones(6, dtype=torch.int64)}),
    "whole numbers": save({"prototypes": torch.ones(6, 16, dtype=torch.int64), "counts": torch.ones(6, dtype=torch.int64)}),
    "complex": save({"prototypes": torch.ones(6, 16, dtype=torch.complex64), "counts": torch.ones(6)}),
    "eight bits": save({"prototypes": torch.ones(6, 16).to(torch.float8_e4m3fn), "counts": torch.ones(6)}),
    "another name": save({"prototype": torch.ones(6, 16), "counts": torch.ones(6, dtype=torch.int64)}),
    "a name with a line in it": save({"proto\ntypes": torch.full((6, 16), float("nan"))}),
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_safetensors_is_refused_everywhere(content, learner, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(lambda: read_tensors(path), f"'{path}'", kind=ResultError)
    refused(lambda: features_dataset(path), f"features file '{path}'", kind=DataError)
    sealed(learner, content)
    refused(lambda: read_learner(learner), kind=ResultError)


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_tensors_of_another_learner_are_refused_whatever_their_hash(content, learner):
    sealed(learner, content)
    refused(lambda: read_learner(learner), kind=ResultError)


def test_a_learner_that_was_not_touched_is_read(learner):
    sealed(learner, part_of(learner).read_bytes())
    result, found = read_learner(learner)
    assert found.method_.means.means.shape == (len(result.class_order), 16)


def test_a_learner_whose_hash_does_not_fit_is_refused(learner):
    content = bytearray(part_of(learner).read_bytes())
    content[-1] ^= 1
    part_of(learner).write_bytes(content)
    refused(
        lambda: read_learner(learner),
        "damaged: its SHA-256 is not the one in the manifest",
        "no undamaged copy is left",
    )


@pytest.mark.parametrize(
    "key", ["anchors", "image.map.weight", "image.version", "texts.residual0", "memory.means", "memory.counts"]
)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1] if x.ndim else x.repeat(2), lambda x: x.new_zeros(1, 1, 1), lambda x: None,
        lambda x: x.double() * 1e38 if x.is_floating_point() else x.float(),
        lambda x: x.new_full(x.shape, 3e38) if x.is_floating_point() else x.to(torch.int8) - 100,
    ],
    ids=["shorter", "of one", "gone", "other type", "beyond"],
)  # fmt: skip
def test_a_learner_of_two_stages_is_tried_before_it_is_trusted(key, change, features, tmp_path):
    """Refused, or its scores are finite and one per class."""
    from cairn.storage.tensors import serialized

    folder, states = tmp_path / "run", []
    quick = ("stage1.schedule.epochs=1", "stage2.schedule.epochs=1")
    config = RunConfig(method="dmc", data=features, step=2, settings=quick)
    result = run_stream(config, learned=lambda m: (states.append(m.method.state_dict()), write_learner(folder, m)))
    write_json(folder / RESULT, result.model_dump(mode="json"))
    changed = {name: change(value) if name == key else value for name, value in states[0].items()}
    assert key in changed
    content = {name: value for name, value in changed.items() if value is not None}
    sealed(folder, b"".join(map(bytes, serialized(content))))
    if (found := read_or_refused(lambda: read_learner(folder))) is not None:
        with torch.no_grad():
            scores = found[1].method_.scores(found[1].method_.embed(torch.randn(4, 16)))
        assert scores.shape == (4, 6)
        assert torch.isfinite(scores).all()


# --- JSON -------------------------------------------------------------------------------------------------------------

TEXTS = {
    "empty": b"", "nothing": b"null", "number": b"7", "text": b'"x"', "list": b"[]", "object": b"{}", "cut off": b'{"a": 1',
    "deep list": b"[" * 200_000, "deep object": b'{"a":' * 200_000, "deep and closed": b'{"run":' + b"[" * 900 + b"]" * 900 + b"}",
    "NaN": b'{"schema_version": NaN}', "infinite": b'{"schema_version": 1e999}', "huge": b'{"schema_version": ' + b"9" * 10_000 + b"}",
    "large": b'{"schema_version": 99999999999999999999999}', "twice": b'{"schema_version": 1, "schema_version": 1}',
    "newer": b'{"schema_version": 2}', "half a character": b'{"schema_version": 1, "\\ud800": "\\udc00"}',
    "bytes": bytes(range(256)), "zeros": bytes(1000), "UTF-16": '{"a": 1}'.encode("utf-16"), "pickle": b"\x80\x04]\x94.",
}  # fmt: skip


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_what_is_no_document_is_refused_everywhere(content, learner, call, features, tmp_path):
    for folder, name, read in (
        (learner, f"{LEARNER}/learner-000001.json", read_learner),
        (learner, RESULT, read_learner),
        (learner, RESULT, read_result),
        (call, CALL, read_call),
    ):
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        refused(lambda folder=folder, read=read: read(folder), kind=ResultError)
        (folder / name).write_bytes(sound)
    path = tmp_path / "x.json"
    path.write_bytes(content)
    refused(lambda: class_order(str(path), ["a", "b"]), str(path))
    if content != b"{}":  # nothing is described, which may be
        refused(lambda: read_descriptions(path), f"descriptions '{path}'", kind=DataError)


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("suffix", ["txt", "yaml"])
def test_a_class_order_is_one_in_any_form(content, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    refused(lambda: class_order(str(path), ["a", "b"]), str(path))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    | st.sampled_from(["", "dmc", "none", "/etc/passwd", "../..", "x" * 5000, 2**70, -1, 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def changes(document, data):
    """A document with one to three of its values, at any depth, exchanged or gone."""
    document = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 3))):
        node = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
                node = node[key]
            elif data.draw(st.booleans()):
                node[key] = data.draw(ANY)
                break
            else:
                del node[key]
                break
    return document


def read_or_refused(read):
    """What was read; None where a single line says why not."""
    try:
        return read()
    except CairnError as error:
        message = str(error)
    assert one_line(message) == message
    return None


EXAMPLES = hypothesis_settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(data=st.data())
def test_calls_of_other_types_are_refused_or_right(data, call, features):
    sound = Call(run=RunConfig(method="dmc", data=features, step=2), checkpoint_seconds=60).model_dump(mode="json")
    document = changes(sound, data)
    (call / CALL).write_text(json.dumps(document))
    if (found := read_or_refused(lambda: read_call(call))) is None:
        return
    json.dumps(found.model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()
    if found.run.data == features and (made := read_or_refused(lambda: prepared(found.run))) is not None:
        json.dumps(made.settings.model_dump(mode="json"), allow_nan=False)
        assert sum(len(task.classes) for task in made.stream.tasks) == 6


@EXAMPLES
@given(data=st.data())
def test_results_of_other_types_are_refused_or_right(data, learner):
    path = learner / RESULT
    sound = path.read_text()
    path.write_text(json.dumps(changes(json.loads(sound), data)))
    read_or_refused(lambda: read_result(learner))
    found = read_or_refused(lambda: read_learner(learner))
    assert found is None or found[1].method_.means.means.shape == (len(found[0].class_order), 16)
    path.write_text(sound)


@EXAMPLES
@given(data=st.data())
def test_manifests_of_other_types_are_refused_or_right(data, learner):
    path = learner / LEARNER / "learner-000001.json"
    sound = path.read_text()
    document = changes(json.loads(sound), data)
    document.pop("sha256", None)
    path.write_text(json.dumps(document | {"sha256": digest(document)}))
    found = read_or_refused(lambda: read_learner(learner))
    assert found is None or found[1].method_.means.means.shape == (6, 16)
    path.write_text(sound)


@pytest.fixture
def cut(features, tmp_path):
    """A finished run and the checkpoint of its end."""
    config, archive = RunConfig(method="simplecil", data=features, step=2), Archive(tmp_path / "cut", "run")
    checkpoint = Checkpoint(steps=10**9)
    result = run_stream(config, checkpoint=checkpoint, archive=archive)
    checkpoint.save()
    return result, tmp_path / "cut" / "run-000001.json"


@EXAMPLES
@given(data=st.data())
def test_checkpoints_of_other_types_are_refused_or_right(data, cut):
    result, path = cut
    sound = path.read_text()
    document = changes(json.loads(sound), data)
    document.pop("sha256", None)
    path.write_text(json.dumps(document | {"sha256": digest(document)}))
    read = Archive(path.parent, "run")
    found = read_or_refused(lambda: run_stream(result.run, checkpoint=Checkpoint(), archive=read))
    assert found is None or len(found.accuracy) == len(result.accuracy)
    path.write_text(sound)


@EXAMPLES
@given(data=st.data())
def test_descriptions_of_other_types_are_refused_or_right(data, tmp_path):
    path = tmp_path / "d.json"
    sound = written_by("me", {"cat": ("whiskers",), "dog": ("a wet nose", "a tail")}).model_dump(mode="json")
    path.write_text(json.dumps(changes(sound, data)))
    found = read_or_refused(lambda: read_descriptions(path))
    if found is not None:
        assert all(sentence.strip() for sentences in found.of(found.classes) for sentence in sentences)


PATHS = st.sampled_from(
    ["stage1.tuning", "stage1.tuning.rank", "stage1.schedule.lr", "stage1.schedule.epochs", "stage2.text", "drift", "drift.lam",
     "probes", "covariance", "shrinkage", "template_weight", "stage1", "stage1.classes", "kind", ""]
) | st.text(max_size=20)  # fmt: skip
LETTERS = st.text(max_size=30) | st.text(alphabet="[]{}:,&*!?-|>'\"\n #%@`0123456789.eExXo_~<=abl", max_size=30)


@hypothesis_settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.builds("{}={}".format, PATHS, LETTERS) | st.text(max_size=30), min_size=1, max_size=3))
def test_settings_are_refused_or_right(assignments):
    config = read_or_refused(lambda: with_settings(METHODS["dmc-ot"].config(), assignments))
    if config is not None:
        stored = config.model_dump(mode="json")
        json.dumps(stored, allow_nan=False)
        assert type(config).model_validate(stored) == config


@pytest.mark.parametrize(
    "text",
    [
        "probes=0x" + "f" * 20_000, "probes=" + "9" * 5000, "stage1.schedule.lr=nan", "stage1.schedule.lr=.inf",
        "stage1.schedule.clip=1e999", "stage1={schedule: {lr: .nan}}", "drift=2020-13-45", "drift=[" * 1000, "drift=!!timestamp x",
        "drift=!!python/object/apply:os.mkdir [made-by-yaml]", "drift=[&a [x, x], &b [*a, *a]]", "probes=1:30:x",
        "stage1.schedule.lr=" + "x" * 2**21, "drift=\ud800", "\udc80=1", "=", "",
    ],
)  # fmt: skip
def test_settings_that_are_made_to_hurt_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: with_settings(METHODS["dmc-ot"].config(), [text]))
    assert not list(tmp_path.iterdir())


# --- what is no file --------------------------------------------------------------------------------------------------


def linked(path, outside):
    path.unlink()
    path.symlink_to(outside)


def to_itself(path, outside):
    path.unlink()
    path.symlink_to(path)


def piped(path, outside):
    path.unlink()
    os.mkfifo(path)


def a_folder(path, outside):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [linked, to_itself, piped, a_folder])
def test_links_pipes_and_folders_in_place_of_files(change, learner, call, features, tmp_path):
    """Of a run's own files not even a link to a copy is followed; a file that a user names may be one."""
    for path, read in (
        (part_of(learner), lambda: read_learner(learner)),
        (call / CALL, lambda: read_call(call)),
        (learner / LEARNER / "learner-000001.json", lambda: read_learner(learner)),
        (learner / RESULT, lambda: read_learner(learner)),
    ):
        sound = path.read_bytes()
        outside = tmp_path / "outside"
        outside.write_bytes(sound)
        change(path, outside)
        refused(read, kind=ResultError)
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(sound)
    names = {"order.json": '["a", "b"]', "d.json": "{}", "x.safetensors": Path(features).read_bytes()}
    reads = (lambda path: class_order(str(path), ["a", "b"]), read_descriptions, features_dataset)
    for (name, content), read in zip(names.items(), reads, strict=True):
        path, outside = tmp_path / name, tmp_path / f"outside-{name}"
        for place in (path, outside):
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        change(path, outside)
        if change is linked:
            read(path)
        else:
            refused(lambda read=read, path=path: read(path))


@pytest.mark.parametrize("name", [EVENTS, LOCK, CHECKPOINT, LEARNER])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_run_writes_into_its_own_folder_alone(name, kind, call, tmp_path, monkeypatch, capsys):
    """A folder from somebody else may have a link where a run wants to write."""
    outside = tmp_path / "outside"
    outside.mkdir() if name in (CHECKPOINT, LEARNER) else outside.write_text("kept")
    (call / name).symlink_to(outside) if kind == "link" else os.mkfifo(call / name)
    sound = read_json(call / CALL)
    sound["keep_learner"] = True
    write_json(call / CALL, sound)
    if kind == "link" or name in (EVENTS, LEARNER):
        assert f"'{call}" in called(monkeypatch, capsys, "run", "--resume", call)
    else:  # it is only in the way
        monkeypatch.setattr("sys.argv", ["cairn", "run", "--resume", str(call)])
        main()
        assert (call / RESULT).is_file()
    assert not any(outside.iterdir()) if outside.is_dir() else outside.read_text() == "kept"


def test_a_lock_that_is_a_pipe_keeps_nobody(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    folder = RunFolder(tmp_path, Call(run=RunConfig(method="dmc"), checkpoint_seconds=60))
    read_or_refused(folder.open)
    folder.close()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"method": "x\ny"}, {"data": "a" * 5000}, {"data": "~nobody/x"}, {"data": "x\0y"}, {"data": "../../etc/passwd"},
        {"data": "/dev/zero"}, {"data": "/dev/stdin"}, {"order": "/dev/zero"}, {"order": "a" * 5000}, {"order": "x\0"},
        {"settings": ["stage1.schedule.lr=nan"]}, {"towers": "../x"}, {"step": 10**30}, {"step": -1}, {"base": 2**64},
        {"validation": 1e308}, {"limit_train": -(2**63)}, {"device": "cuda:99999999999999999999", "data": "shapes"},
        {"towers": "a" * 5000, "data": "shapes"}, {"towers": "x\ny/z\0", "data": "shapes"}, {"template": "{} {}"},
    ],
    ids=repr,
)  # fmt: skip
def test_a_call_from_somebody_else_is_one_line_and_leaves_nothing(change, call, monkeypatch, capsys):
    stored = read_json(call / CALL)
    (call / CALL).write_text(json.dumps(stored | {"run": stored["run"] | change}))
    called(monkeypatch, capsys, "run", "--resume", call)
    assert [path.name for path in call.iterdir()] == [CALL]


@pytest.mark.parametrize(
    "change", [{"checkpoint_seconds": -1}, {"checkpoint_seconds": "x"}, {"seeds": [-1]}, {"seeds": 7}]
)
def test_so_is_one_that_asks_for_what_there_is_not(change, call, monkeypatch, capsys):
    (call / CALL).write_text(json.dumps(read_json(call / CALL) | change))
    assert next(iter(change)) in called(monkeypatch, capsys, "run", "--resume", call)


# --- code in data -----------------------------------------------------------------------------------------------------

RUNS_CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "pandas",
}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen"} | {
    f"yaml.{name}" for name in ("unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all")
}
"""Whole names: `model.eval()` is none of them."""


def dotted(node):
    """'a.b.c' of an attribute or a name, else ''."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def opened_doors(tree):
    """Places in a module where data could run, as texts."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "torch" and {"load", "save"} & {alias.name for alias in node.names}:
                yield f"{node.lineno}: from torch import load or save"
        yield from (f"{node.lineno}: imports {name}" for name in modules if name.split(".")[0] in RUNS_CODE)
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        root, _, last = name.rpartition(".")
        if name in CALLS:
            yield f"{node.lineno}: {name}"
        if (
            last == "load"
            and root in ("np", "numpy")
            and ast.unparse(given.get("allow_pickle", ast.Constant(False))) != "False"
        ):
            yield f"{node.lineno}: {name} with pickle"
        if name == "yaml.load":
            loader = ast.unparse(given.get("Loader") or (node.args[1] if len(node.args) > 1 else ast.Constant(None)))
            if not issubclass(getattr(cairn.storage.files, loader, type(None)), yaml.SafeLoader):
                yield f"{node.lineno}: yaml.load without a safe loader"
        for word in ("trust_remote_code", "weights_only"):
            if word in given and ast.unparse(given[word]) != str(word == "weights_only"):
                yield f"{node.lineno}: {name}({word})"
        if last == "from_pretrained" and ("trust_remote_code" not in given or root.startswith("Auto")):
            yield f"{node.lineno}: {name} that may run code of a repository"
        weights = last == "from_pretrained" and "Tokenizer" not in root and "Config" not in root
        if weights and ast.unparse(given.get("use_safetensors", ast.Constant(False))) != "True":
            yield f"{node.lineno}: {name} that may read pickles"
        if any(keyword == "shell" for keyword in given):
            yield f"{node.lineno}: {name} in a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_is_run(path):
    assert list(opened_doors(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib", "import dill as d", "import torch\ntorch.load('x')",
        "from torch import load", "torch.save(x, 'x')", "np.load('x', allow_pickle=True)", "yaml.load(x)",
        "yaml.load(x, yaml.Loader)", "yaml.load(x, Loader=yaml.UnsafeLoader)", "yaml.unsafe_load(x)", "eval('1')", "exec('x = 1')",
        "AutoModel.from_pretrained('x')", "AutoModel.from_pretrained('x', use_safetensors=False)", "__import__('x')",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=True)", "load_dataset('x', trust_remote_code=True)",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=False)", "CLIPTokenizer.from_pretrained('x')",
        "CLIPConfig.from_pretrained('x', revision='y')",
        "subprocess.run('x', shell=True)", "os.system('x')", "import shelve", "import marshal",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(code):
    assert list(opened_doors(ast.parse(code)))


def test_pickled_weights_are_not_opened(tmp_path, monkeypatch):
    """A checkpoint with a pickle beside its config: named, and left closed."""
    from cairn.towers.catalogue import load_towers

    made = tmp_path / "made-by-pickle"
    pickle = b"cos\nmkdir\n(V" + str(made).encode() + b"\ntR."
    tiny = ROOT / "cairn" / "towers" / "tiny"
    for spec, names in (
        ("", ("pytorch_model.bin", "model.pt")),
        ("open_clip:", ("open_clip_pytorch_model.bin", "x.pt")),
    ):
        folder = tmp_path / f"weights{len(spec)}"
        folder.mkdir()
        for path in tiny.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}})
        )
        for name in names:
            (folder / name).write_bytes(pickle)
        refused(lambda spec=spec, folder=folder: load_towers(f"{spec}{folder}"))
    assert not made.exists()


# --- chance -----------------------------------------------------------------------------------------------------------


def test_three_hundred_damaged_inputs_are_refused_or_right():
    """`tests/stress/fuzz.py` does ten thousand."""
    import signal

    signal.alarm(0)  # it has one of its own for each
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "stress" / "fuzz.py", "--cases", "300", "--seed", "7"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    report = json.loads(done.stdout)
    assert report["cases"] == 300
    assert report["broken"] == []

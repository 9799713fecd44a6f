"""Generations on disk: two are kept, the newest sound one is read, and whatever happens meanwhile one is whole."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from itertools import count

import pytest
import torch

import cairn.storage.archive
from cairn.errors import ResultError
from cairn.storage.archive import SCHEMA_VERSION, Archive, Newer, digest
from cairn.storage.files import read_json, write_chunks, write_json
from cairn.storage.tensors import serialized


def state(value):
    return {"a": torch.full((20, 3), float(value)), "b": torch.arange(4) + value}


def write(folder, value, **parts):
    Archive(folder, "run").write({"n": value}, {"learner": state(value), **parts})


def number(folder):
    """The `n` of what is read, with parts that belong to it."""
    found = Archive(folder, "run").read()
    assert torch.equal(found.parts["learner"]["a"], state(found.record["n"])["a"])
    return found.record["n"]


def manifests(folder):
    return sorted(path.name for path in folder.glob("run-*.json"))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def only_what_is_named(folder):
    """Every file is a manifest, or in one."""
    named = {entry["file"] for name in manifests(folder) for entry in read_json(folder / name)["parts"].values()}
    return files(folder) == sorted(named | set(manifests(folder)))


def tampered(path, seal=True, **changes):
    """Another manifest in place of this one, its own hash made to fit unless `seal` is false."""
    manifest = read_json(path) | changes
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"sha256": digest(manifest) if seal else "0" * 64}))


# --- generations ------------------------------------------------------------------------------------------------------


def test_nothing_is_read_from_nothing(tmp_path):
    archive = Archive(tmp_path / "none", "run")
    assert not archive
    assert archive.read() is None
    archive.clear()
    assert not (tmp_path / "none").exists()


def test_what_is_written_is_read(tmp_path):
    record = {"text": "wörter", "list": [1, 2.5, None, {"deep": True}]}
    Archive(tmp_path, "run").write(record, {"learner": state(1), "fit-task=0-stage=1": {}})
    found = Archive(tmp_path, "run").read()
    assert found.record == record
    assert found.damaged == []
    assert found.parts.keys() == {"learner", "fit-task=0-stage=1"}
    assert all(torch.equal(found.parts["learner"][key], value) for key, value in state(1).items())


def test_two_are_kept_and_the_newest_is_read(tmp_path):
    for value in range(1, 5):
        write(tmp_path, value, **{f"work-{value}": state(-value)})
        assert number(tmp_path) == value
    assert manifests(tmp_path) == ["run-000003.json", "run-000004.json"]
    assert only_what_is_named(tmp_path)


def test_they_go_on_after_the_millionth(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "run-000001.json").rename(tmp_path / "run-999999.json")
    for value in (2, 3):
        write(tmp_path, value)
        assert number(tmp_path) == value
    assert manifests(tmp_path) == ["run-1000000.json", "run-1000001.json"]


def test_two_archives_in_a_folder_leave_each_other_alone(tmp_path):
    write(tmp_path, 1)
    Archive(tmp_path, "other").write({}, {"learner": state(7)})
    (tmp_path / "run-notes.txt").touch()
    for value in (2, 3, 4):
        write(tmp_path, value)
    assert torch.equal(Archive(tmp_path, "other").read().parts["learner"]["b"], state(7)["b"])
    Archive(tmp_path, "run").clear()
    assert [name for name in files(tmp_path) if name.startswith("run")] == ["run-notes.txt"]


def test_an_unchanged_part_is_not_written_again(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        cairn.storage.archive, "serialized", lambda tensors: (written.append(len(tensors)), serialized(tensors))[1]
    )
    archive, learner = Archive(tmp_path, "run"), state(1)
    archive.write({"n": 1}, {"learner": learner, "work": {"x": torch.ones(1)}})
    first = {path.name: path.stat().st_ino for path in tmp_path.glob("run-learner-*")}
    written.clear()
    archive.write({"n": 1}, {"learner": learner, "work": {"x": torch.zeros(1)}})
    assert set(written) == {1}
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("run-learner-*")} == first
    (tmp_path / next(iter(first))).unlink()  # somebody took it away: then it is
    archive.write({"n": 1}, {"learner": learner})
    assert number(tmp_path) == 1


def one_back(last, before):
    """The state before, saying what was taken back; None for one that is the same as the last."""
    return None if before["n"] == last["n"] else {**before, "taken back": last["n"]}


def write_three(folder):
    for value in (1, 2, 3):
        Archive(folder, "run").write({"n": value}, {"learner": state(value), "same": {"x": torch.ones(2)}}, keep=3)


def test_back_is_the_generation_before_under_its_own_record(tmp_path):
    write_three(tmp_path)
    sizes = Archive(tmp_path, "run").bytes_of_each()
    assert sizes == {
        number: sum(part["bytes"] for part in read_json(tmp_path / f"run-00000{number}.json")["parts"].values())
        for number in (1, 2, 3)
    }
    for value, left in ((2, [1, 3]), (1, [3])):
        assert Archive(tmp_path, "run").back(one_back)
        found = Archive(tmp_path, "run").read()
        assert (number(tmp_path), found.record["taken back"], found.damaged) == (value, value + 1, [])
        assert list(Archive(tmp_path, "run").bytes_of_each()) == left
        assert only_what_is_named(tmp_path)
    before = files(tmp_path)
    assert not Archive(tmp_path, "run").back(one_back)
    assert not Archive(tmp_path / "none", "run").back(one_back)
    assert files(tmp_path) == before
    write(tmp_path, 4)
    assert manifests(tmp_path) == ["run-000003.json", "run-000004.json"]


def test_what_is_passed_on_the_way_back_is_removed(tmp_path):
    for value in (1, 2, 2):
        Archive(tmp_path, "run").write({"n": value}, {"learner": state(value)}, keep=3)
    assert Archive(tmp_path, "run").back(one_back)
    assert number(tmp_path) == 1
    assert manifests(tmp_path) == ["run-000003.json"]
    assert only_what_is_named(tmp_path)


@pytest.mark.parametrize("what", ["run-000003.json", "run-000002.json", "run-learner-{}.safetensors"])
def test_there_is_no_way_back_over_what_is_damaged(tmp_path, what):
    write_three(tmp_path)
    digest_of = read_json(tmp_path / "run-000002.json")["parts"]["learner"]["sha256"]
    (tmp_path / what.format(digest_of[:16])).write_bytes(b"{}")
    before = files(tmp_path)
    with pytest.raises(ResultError):
        Archive(tmp_path, "run").back(one_back)
    assert files(tmp_path) == before


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("failure", ["kill", "interrupt", "full"])
def test_the_way_back_may_end_at_every_call_to_the_system(tmp_path, failure, after):
    """The newest or the one before is there, whole; and called again it comes to the same."""
    failures = {
        "kill": Dead(),
        "interrupt": KeyboardInterrupt(),
        "full": OSError(errno.ENOSPC, "No space left on device"),
    }
    places = 0
    for at in count(1):
        folder = tmp_path / str(at)
        write_three(folder)
        with pytest.MonkeyPatch.context() as patch:
            machine, raised = Machine(patch, at, after, failures[failure], failure == "kill"), None
            try:
                assert Archive(folder, "run").back(one_back)
            except (Dead, KeyboardInterrupt, ResultError) as error:
                raised = error
        if not machine.struck:
            break
        places += 1
        assert number(folder) in ((2, 3) if raised else (2,))
        assert Archive(folder, "run").read().damaged == []
        if number(folder) == 3:
            assert Archive(folder, "run").back(one_back)
        assert number(folder) == 2
        assert Archive(folder, "run").back(one_back)  # and one more, over what an end in the middle may have left
        assert number(folder) == 1
        assert only_what_is_named(folder)
        assert len(manifests(folder)) == 1
    assert places > 5


def test_clearing_leaves_no_folder(tmp_path):
    for value in (1, 2):
        write(tmp_path / "checkpoint", value)
    (tmp_path / "checkpoint" / ".run-learner-0.safetensors.0.part").touch()
    Archive(tmp_path / "checkpoint", "run").clear()
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a" * 101, "a\n"])
def test_a_part_is_no_path(tmp_path, name):
    with pytest.raises(ValueError, match="part"):
        Archive(tmp_path, "run").write({}, {name: state(1)})
    assert files(tmp_path) == []


# --- damage -----------------------------------------------------------------------------------------------------------


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def linked(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def piped(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = (flipped, cut, emptied, linked, piped, a_folder)


@pytest.mark.parametrize("damage", [*DAMAGES, gone])
@pytest.mark.parametrize("part", [True, False], ids=["part", "manifest"])
def test_a_damaged_generation_is_named_and_skipped(tmp_path, damage, part):
    for value in (1, 2):
        write(tmp_path, value)
    newest = tmp_path / "run-000002.json"
    target = tmp_path / read_json(newest)["parts"]["learner"]["file"] if part else newest
    damage(target)
    assert number(tmp_path) == 1
    found = Archive(tmp_path, "run").read()
    assert [target.name in text for text in found.damaged] == ([] if (damage, part) == (gone, False) else [True])
    assert all(text.isprintable() for text in found.damaged)
    for value in (3, 4):  # and is no hindrance
        write(tmp_path, value)
        assert number(tmp_path) == value


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_damaged_it_is_said(tmp_path, damage):
    for value in (1, 2):
        write(tmp_path, value)
    for path in list(tmp_path.glob("*.safetensors")):
        damage(path)
    with pytest.raises(ResultError, match="no undamaged copy is left in"):
        Archive(tmp_path, "run").read()


def test_every_single_byte_counts(tmp_path):
    """A flip anywhere in the newest generation is seen, and the one before is taken."""
    for value in (1, 2):
        Archive(tmp_path, "run").write({"n": value}, {"learner": {"a": torch.tensor([float(value)])}})
    newest = tmp_path / "run-000002.json"
    for path in (newest, tmp_path / read_json(newest)["parts"]["learner"]["file"]):
        sound = path.read_bytes()
        for at in range(len(sound)):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
            try:
                found = Archive(tmp_path, "run").read()
            except Newer:  # the one byte that is the version
                assert sound[at : at + 1] == str(SCHEMA_VERSION).encode()
            else:
                assert found.record["n"] == 1 or json.loads(path.read_bytes()) == json.loads(sound)
        path.write_bytes(sound)


@pytest.mark.parametrize("seal", [True, False])
def test_what_a_later_version_wrote_is_not_passed_over(tmp_path, seal):
    """Going on from the generation before would lose what the later version learned."""
    for value in (1, 2):
        write(tmp_path, value)
    tampered(tmp_path / "run-000002.json", seal, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(ResultError, match=r"schema_version 2, this cairn reads up to 1; use the version that wrote it"):
        Archive(tmp_path, "run").read()


GOOD = {"file": "", "bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": value} for value in (True, 0, -1, 1.0, "1", None, [], {})
    ] + [
        {"record": value} for value in (None, [], "x", 1)
    ] + [
        {"parts": value} for value in (
            None, [], "x", {"learner": None}, {"learner": []}, {"learner": {}}, {"learner": GOOD}, {"../x": GOOD},
            {"learner": GOOD | {"file": "../outside.safetensors"}}, {"learner": GOOD | {"file": "/etc/passwd"}},
            {"learner": GOOD | {"file": ["run-learner-0000000000000000.safetensors"]}},
            {"../x": GOOD | {"file": "run-../x-0000000000000000.safetensors"}},
            {"learner\n": GOOD | {"file": "run-learner\n-0000000000000000.safetensors"}},
            {"learner": GOOD | {"file": "run-learner-0000000000000000.safetensors", "bytes": True}},
            {"learner": GOOD | {"file": "run-learner-0000000000000000.safetensors", "bytes": 1e300}},
            {"learner": GOOD | {"file": "run-learner-0000000000000000.safetensors", "sha256": "0" * 16}},
            {"learner": GOOD | {"file": "run-learner-0000000000000000.safetensors"}},
        )
    ],
    ids=repr,
)  # fmt: skip
def test_a_manifest_whose_hash_fits_may_still_be_none(tmp_path, changes):
    """Who changes a manifest may hash it again: it still leads to no file but a part's own."""
    write(tmp_path / "in", 1)
    (tmp_path / "outside.safetensors").write_bytes(b"".join(map(bytes, serialized(state(1)))))
    tampered(tmp_path / "in" / "run-000001.json", **changes)
    before = files(tmp_path / "in")
    with pytest.raises(ResultError) as error:
        Archive(tmp_path / "in", "run").read()
    assert str(error.value).isprintable()
    assert files(tmp_path / "in") == before
    write(tmp_path / "in", 2)
    assert number(tmp_path / "in") == 2
    assert files(tmp_path) == ["in", "outside.safetensors"]


def test_another_file_under_a_part_s_name_is_refused(tmp_path):
    for value in (1, 2):
        write(tmp_path, value)
    one, other = sorted(tmp_path.glob("*.safetensors"))
    one.write_bytes(other.read_bytes())
    damaged = [name for name in manifests(tmp_path) if one.name in (tmp_path / name).read_text()]
    assert f"run-00000{number(tmp_path)}.json" not in damaged


# --- an end at any point ----------------------------------------------------------------------------------------------


class Dead(BaseException):
    """As a kill is: what comes after it is not done either."""


CALLS = [(os, name) for name in ("open", "replace", "fsync", "unlink", "mkdir")]


class Machine:
    """Counts calls to the system; at the one that is given something happens, before it is done or after."""

    def __init__(self, patch, at, after, failure, for_good):
        self.at, self.after, self.failure, self.for_good, self.calls = at, after, failure, for_good, 0
        for module, name in CALLS:
            patch.setattr(module, name, self.counted(getattr(module, name)))
        patch.setattr(
            cairn.storage.archive, "write_chunks", lambda path, chunks: write_chunks(path, self.counting(chunks))
        )

    @property
    def struck(self):
        return self.calls >= self.at

    def counted(self, call):
        def counting(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at and self.after:
                call(*args, **kwargs)
            if self.calls == self.at or (self.for_good and self.struck):
                raise self.failure
            return call(*args, **kwargs)

        return counting

    def counting(self, chunks):
        for chunk in chunks:
            self.counted(lambda: None)()
            yield chunk


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("failure", "for_good"),
    [(Dead(), True), (KeyboardInterrupt(), False), (OSError(errno.ENOSPC, "No space left on device"), False)],
    ids=["kill", "interrupt", "full"],
)
def test_at_every_call_to_the_system_it_may_end(tmp_path, failure, for_good, after):
    """The generation before stays readable, or the new one is there; and the next write leaves no litter."""
    places = 0
    for at in count(1):
        folder = tmp_path / str(at)
        write(folder, 1)
        write(folder, 2, work=state(-2))
        with pytest.MonkeyPatch.context() as patch:
            machine, raised = Machine(patch, at, after, failure, for_good), None
            try:
                write(folder, 3, work=state(-3))
            except (Dead, KeyboardInterrupt, ResultError) as error:
                raised = error
        if not machine.struck:
            break
        places += 1
        assert number(folder) in ((2, 3) if raised else (3,))
        assert Archive(folder, "run").read().damaged == []
        if isinstance(raised, ResultError):
            assert str(raised).isprintable()
            assert re.search(r"No space left on device; free some space|does not read back", str(raised))
        write(folder, 4)
        assert number(folder) == 4
        assert only_what_is_named(folder)
        assert len(manifests(folder)) == 2
    assert places > 25


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = files(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(ResultError, match="No space left on device; free some space or give another folder"):
                write(tmp_path, 2)
        assert files(tmp_path) == before
    assert number(tmp_path) == 1


def test_a_disk_that_may_only_be_read(tmp_path, monkeypatch):
    write(tmp_path, 1)
    plain = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_CREAT | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return plain(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ResultError, match="Read-only file system; give another folder"):
        write(tmp_path, 2)
    assert number(tmp_path) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is open to root")
def test_a_folder_that_may_only_be_read(tmp_path):
    write(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ResultError, match="Permission denied; change its permissions or give another folder"):
            write(tmp_path, 2)
        assert number(tmp_path) == 1
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("what", ["part", "manifest"])
def test_a_disk_that_does_not_keep_what_it_was_given(tmp_path, monkeypatch, what):
    write(tmp_path, 1)
    plain, before = os.replace, files(tmp_path)

    def forgetful(source, target):
        if str(target).endswith(".json") == (what == "manifest"):
            os.truncate(source, os.stat(source).st_size - 2)
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", forgetful)
        with pytest.raises(ResultError, match="does not read back as it was written; check the disk"):
            write(tmp_path, 2)
    assert files(tmp_path) == before
    assert number(tmp_path) == 1


def test_what_could_not_be_read_is_not_written(tmp_path):
    write(tmp_path, 1)
    before = files(tmp_path)
    for record, value in (({}, float("nan")), ({"x": float("inf")}, 1.0), ({"x": "\ud800"}, 1.0)):
        with pytest.raises(ResultError):
            Archive(tmp_path, "run").write(record, {"learner": {"a": torch.tensor([value])}})
        assert files(tmp_path) == before


# --- file systems that are really full --------------------------------------------------------------------------------

FILLING = """
import os, resource, signal, sys
from pathlib import Path
import torch
from cairn.storage.archive import Archive
from cairn.errors import ResultError

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
archive = Archive(folder, "run")
archive.write({"n": 1}, {"learner": {"a": torch.ones(10)}})
before = sorted(os.listdir(folder))
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    archive.write({"n": 2}, {"learner": {"a": torch.ones(10)}, "work": {"b": torch.ones(1_000_000)}})
except ResultError as error:
    print(error)
assert sorted(os.listdir(folder)) == before, os.listdir(folder)
assert Archive(folder, "run").read().record == {"n": 1}
"""


def filled(folder, limit=0):
    done = subprocess.run([sys.executable, "-c", FILLING, str(folder), str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_limit_on_the_size_of_files(tmp_path):
    said = filled(tmp_path, limit=100_000)
    assert re.fullmatch(r"'.*': cannot be written: File too large; free some space or give another folder\n", said)


@pytest.fixture
def small_disk(tmp_path):
    """One megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted by this user")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a file system is mounted by root")
def test_a_disk_that_is_full(small_disk):
    said = filled(small_disk)
    assert re.fullmatch(
        r"'.*': cannot be written: No space left on device; free some space or give another folder\n", said
    )


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a file system is mounted by root")
def test_a_disk_that_became_read_only(small_disk):
    write(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ResultError, match="Read-only file system; give another folder"):
        write(small_disk, 2)
    with pytest.raises(ResultError, match="Read-only file system"):
        write_json(small_disk / "result.json", 1)
    assert number(small_disk) == 1

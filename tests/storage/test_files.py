"""Files are whole or not there; what is read is plain, short, finite, and runs nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from cairn.errors import LETTERS, CairnError, ResultError
from cairn.storage.files import (
    JSON_BYTES,
    folder_to_fill,
    make_folder,
    open_append,
    read_bytes,
    read_json,
    read_yaml,
    sha256_of,
    unwritable,
    write_chunks,
    write_json,
)
from cairn.storage.tensors import Layout, TensorFile, TensorWriter, read_tensors, serialized


def refused(call, *parts):
    """The call raises one line that holds these parts."""
    with pytest.raises(ResultError) as error:
        call()
    text = str(error.value)
    assert text.isprintable()
    for part in parts:
        assert part in text
    return text


# --- writing ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """No error, an end."""


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x"), Stop()])
@pytest.mark.parametrize("when", ["at once", "half-way", "fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, when):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def fails(*args):
        raise failure

    def chunks():
        if when == "half-way":
            yield b"half"
        if when in ("at once", "half-way"):
            raise failure
        yield b"all"

    expected = ResultError if isinstance(failure, OSError) else type(failure)
    with monkeypatch.context() as patch:
        if when in ("fsync", "replace"):
            patch.setattr(os, when, fails)
        with pytest.raises(expected) as error:
            write_chunks(path, chunks())
    if expected is ResultError:
        says = f"'{path}': cannot be written: No space left on device; free some space or give another folder"
        assert str(error.value) == says
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space or give another folder"), (errno.EDQUOT, "free some space or give another folder"),
        (errno.EFBIG, "free some space or give another folder"), (errno.ENOENT, "make its folder or give another folder"),
        (errno.ENOTDIR, "give another folder"), (errno.EROFS, "give another folder"), (errno.EIO, "give another folder"),
        (errno.EACCES, "change its permissions or give another folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_comes_with_a_remedy_that_fits(tmp_path, number, remedy):
    path = tmp_path / "a.json"
    assert str(unwritable(path, OSError(number, "so"))) == f"'{path}': cannot be written: so; {remedy}"


def test_a_missing_folder_is_no_lack_of_space(tmp_path):
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(ResultError, match=r"No such file or directory; make its folder or give another folder$"):
        write_json(path, 1)


def test_a_file_has_the_rights_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "a.json").symlink_to(tmp_path / "other")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "other").read_text() == "kept"
    assert not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize("name", ["no/such/folder/a.json", "x" * 300])
def test_where_nothing_can_be_written_is_said(tmp_path, name):
    refused(lambda: write_json(tmp_path / name, 1), "cannot be written", "give another folder")


def failing(folder: Path) -> float:
    """Of what is made to fill a folder, which is there by then."""
    return 1 / (1 - folder.is_dir())


def test_a_folder_of_which_nothing_comes_goes_again(tmp_path):
    (tmp_path / "there").mkdir()
    for place in ("there", "there/new", "new/below/it"):
        with pytest.raises(ZeroDivisionError), folder_to_fill(tmp_path / place):
            failing(tmp_path / place)
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with folder_to_fill(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("text")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with pytest.raises(ZeroDivisionError), folder_to_fill(tmp_path / "new"):
        failing(tmp_path / "new")
    assert (tmp_path / "new" / "file").exists()


def test_a_folder_to_fill_is_one_that_can_be_written_to(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr("cairn.storage.files.os.open", refused)
    for place in ("there", "new"):
        with pytest.raises(ResultError, match=place), folder_to_fill(tmp_path / place):
            pytest.fail("nothing is begun")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: make_folder(tmp_path / "file" / "folder"), "cannot be written", "give another folder")


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": "\ud800"}])
def test_what_json_cannot_hold_is_not_written(tmp_path, value):
    refused(lambda: write_json(tmp_path / "a.json", value), "holds what JSON cannot", "leave that out")
    assert not list(tmp_path.iterdir())


def test_a_growing_file_is_a_plain_one(tmp_path):
    with open_append(tmp_path / "lines", append=False) as file:
        file.write(json.dumps("\udc80", ensure_ascii=False) + "\n")
    with open_append(tmp_path / "lines", append=True) as file:
        file.write("2\n")
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == ["\udc80", 2]
    (tmp_path / "link").symlink_to(tmp_path / "lines")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=name):
            open_append(tmp_path / name, append=True)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"1 2", "not JSON"), (b"\xff\xfe1\x00", "not JSON"), (b"[1]\0", "not JSON"),
        (b"NaN", "NaN is no JSON"), (b"[-Infinity]", "-Infinity is no JSON"), (b"1e999", "1e999 is no JSON"),
        (b"9" * 5000, "not JSON"), (b'{"a": 1, "a": 2}', "a key is there twice"), (b'[{"x": {"a": 1, "a": 1}}]', "twice"),
        (b'"\\ud800"', "surrogates not allowed"), (b'{"\\udc80": 1}', "surrogates not allowed"), (b'"\xed\xa0\x80"', "utf-8"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 deep"), (b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
        (b"[" * 100_000, "not JSON"), (b'{"a":' * 100_000, "not JSON"),
    ],
)  # fmt: skip
def test_json_is_read_as_strictly_as_it_is_written(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    refused(lambda: read_json(tmp_path / "a.json"), f"'{tmp_path / 'a.json'}'", says)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"[" * 100 + b"]" * 100, None), (b'\xef\xbb\xbf{"a": 1}', {"a": 1}), (b'"\\ud83d\\ude00"', "\U0001f600"),
        ('"\U0001f600"'.encode(), "\U0001f600"), (b"1e308", 1e308), (b'{"a": 1, "b": {"a": 1}}', {"a": 1, "b": {"a": 1}}),
    ],
)  # fmt: skip
def test_json_that_is_unusual_is_read(tmp_path, content, value):
    (tmp_path / "a.json").write_bytes(content)
    found = read_json(tmp_path / "a.json")
    assert value is None or found == value


def test_only_plain_files_are_read(tmp_path):
    """Nobody waits for a pipe, and a link leads nowhere unless it may."""
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "link", links=True) == b"1"
    for name, says in (
        ("link", "a link, which is not followed"),
        ("loop", "a link, which is not followed"),
        ("pipe", "not a regular file"),
        (".", "Is a directory"),
        ("none", "No such file"),
    ):
        refused(lambda name=name: read_bytes(tmp_path / name), says)
    for name in ("loop", "pipe", ".", "none"):
        refused(lambda name=name: read_bytes(tmp_path / name, links=True))
    refused(lambda: read_bytes(tmp_path / "file", limit=0), "1 bytes where at most 0 are expected")
    refused(lambda: sha256_of(tmp_path / "none"), "cannot be read")


def test_a_file_that_claims_to_be_huge_is_not_read(tmp_path):
    """Holes cost nothing on the disk."""
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 43)
    refused(lambda: read_json(tmp_path / "a.json"), f"at most {JSON_BYTES} are expected")
    refused(lambda: read_bytes(tmp_path / "a.json"), "does not fit into memory")


def test_no_handle_is_left_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for name in (".", "pipe", "none"):
            refused(lambda name=name: read_bytes(tmp_path / name))
        with pytest.raises(OSError, match="pipe"):
            open_append(tmp_path / "pipe", append=False)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "text",
    [
        "*a", "&a [*a]", "[&a [x, x], [*a, *a]]", "2020-13-45", "0x_", "!!timestamp x", "!!python/object/apply:os.getpid []",
        "!!python/name:os.system", "!!binary x", "? [a]", "a: [", "[" * 3000, "\0", "\ud800", "0x" + "f" * 20_000, "x" * 2**21,
        "--- 1\n--- 2",
    ],
)  # fmt: skip
def test_yaml_that_is_more_than_values_is_refused(text):
    with pytest.raises(ValueError, match=r"\S"):
        read_yaml(text)


def test_yaml_values_are_read():
    assert read_yaml("{a: 1, b: [x, 2.5, null, true]}") == {"a": 1, "b": ["x", 2.5, None, True]}


# --- tensors ----------------------------------------------------------------------------------------------------------


def headed(header, following=0):
    """A file of a header and zeros."""
    return len(header).to_bytes(8, "little") + header + bytes(following)


def entry(**changes):
    """The header of a tensor `x` of two floats, with changes."""
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


TENSORS = {
    "one": torch.tensor(3.5), "flags": torch.tensor([True, False, True]), "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.zeros(0, 4), "wide": torch.arange(6, dtype=torch.float64).view(2, 3), "turned": torch.arange(6.0).view(2, 3).T,
    "half": torch.ones(3, dtype=torch.bfloat16), "learned": torch.ones(2, requires_grad=True), "long": torch.tensor([2**40]),
    "wörter": torch.ones(1),
}  # fmt: skip


def test_what_is_written_is_safetensors(tmp_path):
    write_chunks(tmp_path / "a.safetensors", serialized(TENSORS, {"who": "me"}))
    for read in (load_file, read_tensors):
        found = read(tmp_path / "a.safetensors")
        assert found.keys() == TENSORS.keys()
        for key, value in TENSORS.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value.detach())


def test_equal_tensors_are_equal_bytes_in_any_order():
    turned = dict(reversed(TENSORS.items()))
    assert b"".join(map(bytes, serialized(TENSORS))) == b"".join(map(bytes, serialized(turned)))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.tensor([1.0, float("nan")])}, "'a' holds values that are not finite"),
        ({"a": torch.tensor(float("-inf"), dtype=torch.bfloat16)}, "'a' holds values that are not finite"),
        ({"a\nb": torch.tensor(float("inf"))}, r"'a\nb' holds values"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' is of C64, which is not read"),
        ({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "'a' is of F8_E4M3, which is not read"),
    ],
)
def test_tensors_that_are_none_are_refused(tmp_path, tensors, says):
    (tmp_path / "a.safetensors").write_bytes(save(tensors))
    refused(lambda: read_tensors(tmp_path / "a.safetensors"), says)


def test_tensors_of_another_hash_or_longer_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_chunks(path, serialized(TENSORS))
    assert read_tensors(path, sha256_of(path), path.stat().st_size)
    refused(lambda: read_tensors(path, "0" * 64), "damaged: its SHA-256 is not the one in the manifest")
    refused(lambda: read_tensors(path, None, 10), "where at most 10 are expected")


HEADERS = {
    "no length": (b"\x03\0\0", "a header of 3 bytes in 3"),
    "longer than the file": (b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes in 10"),
    "no JSON": (headed(b"{ "), "JSONDecodeError"),
    "a list": (headed(b"[]"), "TypeError"),
    "a key twice": (headed(b'{"a": 1, "a": 1}'), "a key is there twice"),
    "no shape": (headed(entry(shape=None)), "TypeError"),
    "negative shape": (headed(entry(shape=[-1, -2]), 8), "shape [-1, -2]"),
    "shape of truth values": (headed(entry(shape=[True, 2]), 8), "shape [True, 2]"),
    "shape beyond 64 bits": (headed(entry(shape=[2**63, 0], data_offsets=[0, 0])), "shape [9223372036854775808, 0]"),
    "a gap": (headed(entry(data_offsets=[4, 12]), 12), "'x' of shape (2,) from byte 4 to 12"),
    "another size": (headed(entry(data_offsets=[0, 4]), 4), "'x' of shape (2,) from byte 0 to 4"),
    "reversed": (headed(entry(shape=[0], data_offsets=[8, 0]), 8), "from byte 8 to 0"),
    "cut short": (headed(entry(), 7), "bytes where"),
    "too long": (headed(entry(), 9), "bytes where"),
    "unknown type": (headed(entry(dtype="F99"), 8), "'x' is of F99, which is not read"),
    "metadata is a number": (headed(json.dumps({"__metadata__": {"a": 1}}).encode()), "metadata that is no text"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), HEADERS.values(), ids=HEADERS)
def test_headers_that_do_not_fit_their_file_are_refused(tmp_path, content, says):
    """By both readers; two tensors that overlap leave a gap or an end that is not the file's."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, TensorFile):
        refused(lambda read=read: read(path), says)


def test_a_mapped_file_gives_what_was_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_chunks(path, serialized(TENSORS, {"who": "me"}))
    file = TensorFile(path)
    assert file.header.metadata == {"who": "me"}
    assert file.tensors(["half"]).keys() == {"half"}
    for key, value in TENSORS.items():
        assert torch.equal(file.tensors()[key], value.detach())
        if value.dtype != torch.bfloat16:
            found = file.array(key)
            assert found.dtype == value.detach().numpy().dtype
            assert np.array_equal(found, value.detach().numpy())


def test_tensors_that_start_at_odd_bytes_are_read(tmp_path):
    """As other programs may write them: the header is not padded."""
    header = entry()
    path = tmp_path / "a.safetensors"
    path.write_bytes((len(header) + 1).to_bytes(8, "little") + header + b" " + np.float32([1, 2]).tobytes())
    assert TensorFile(path).tensors()["x"].tolist() == [1, 2]
    assert TensorFile(path).array("x").tolist() == [1, 2]
    assert read_tensors(path)["x"].tolist() == [1, 2]


def test_rows_are_written_in_turn(tmp_path):
    """Equal, byte for byte, to the tensors written whole."""
    wide, narrow = np.arange(12, dtype="<i8").reshape(4, 3), np.arange(4, dtype="<f2").reshape(4, 1)
    path, layouts = (
        tmp_path / "a.safetensors",
        {key: Layout.of(v.dtype, v.shape) for key, v in (("n", narrow), ("w", wide))},
    )
    with path.open("wb") as file:
        writer = TensorWriter(file, layouts, {"who": "me"})
        for rows in (slice(0, 3), slice(3, 4)):
            writer.append("n", narrow[rows])
            writer.append("w", wide[rows])
        writer.close()
    whole = b"".join(
        map(bytes, serialized({"w": torch.from_numpy(wide), "n": torch.from_numpy(narrow)}, {"who": "me"}))
    )
    assert path.read_bytes() == whole
    assert writer.size == len(whole)


def test_rows_too_many_or_too_few_are_refused(tmp_path):
    rows = np.zeros((2, 2), dtype="<f4")
    with (tmp_path / "a.safetensors").open("wb") as file:
        writer = TensorWriter(file, {"x": Layout.of(rows.dtype, (3, 2))}, {})
        writer.append("x", rows)
        with pytest.raises(ValueError, match="'x': more rows than its shape has"):
            writer.append("x", rows)
        with pytest.raises(ValueError, match="'x': 8 bytes are missing"):
            writer.close()


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_is_one_line_of_some_length_whatever_was_in_a_file():
    text = str(CairnError("a\nb\r\x1b[2J\udc80" + "x" * 10**6 + "; the remedy"))
    assert text.isprintable()
    assert text.startswith(r"a\nb\r\x1b[2J\udc80x")
    assert text.endswith("x; the remedy")
    assert len(text) < LETTERS + 50

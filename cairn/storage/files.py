"""Files that are whole or not there, and that run nothing when they are read: JSON and YAML's plain values."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import yaml

from cairn.errors import ResultError

JSON_BYTES = 64 * 2**20
"""Longest JSON file that is read."""

YAML_LETTERS = 2**20
"""Longest YAML text that is read: its parser is slow."""

DEPTH = 100
"""Lists in lists, at most: whoever goes through a value by recursion gets to its end."""

ELSEWHERE = "give another folder"
"""What to do where a place cannot be written and never will be."""

_NO_SURPRISE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""A link is not followed; nobody waits for the other end of a pipe."""


# --- writing ----------------------------------------------------------------------------------------------------------


def unwritable(path: Path, error: OSError, elsewhere: str = ELSEWHERE) -> ResultError:
    """The error to raise; its remedy follows from the system's error, `elsewhere` is how to have another place."""
    remedy = f"{_REMEDIES[error.errno]} or {elsewhere}" if error.errno in _REMEDIES else elsewhere
    return ResultError(f"'{path}': cannot be written: {error.strerror or error}; {remedy}")


_REMEDIES = {
    errno.ENOENT: "make its folder",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
}


def make_folder(path: Path, elsewhere: str = ELSEWHERE) -> None:
    """Raises ResultError if the folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error, elsewhere) from None


@contextmanager
def folder_to_fill(path: Path) -> Iterator[None]:
    """The folder, which can be written to, before it is known what to write. If nothing comes of it, a new one goes again. Raises
    ResultError if it cannot be made or written to."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        with atomic_write(path / ".room"):
            pass
        (path / ".room").unlink()
        yield
    except BaseException:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


@contextmanager
def atomic_write(path: Path, elsewhere: str = ELSEWHERE) -> Iterator[Path]:
    """A path to write to, beside `path`; on leaving it is flushed to the disk and renamed, so that a reader sees the old
    file or the new one. If anything fails, the old file stays and nothing else does. Raises ResultError for OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        # Made here and by nobody before: what is written to is no link that someone laid
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error, elsewhere) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _flush_folder(folder: Path) -> None:
    """So that a rename outlives a power cut; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_chunks(path: Path, chunks: Iterable[Any]) -> None:
    """Bytes, one piece after the other, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all. Raises ResultError for what JSON cannot hold: NaN, and text that is not UTF-8."""
    try:
        content = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ResultError(f"'{path}': holds what JSON cannot: {error}; leave that out") from None
    write_chunks(path, [content])


def open_append(path: Path, append: bool) -> TextIO:
    """A text file that is written line by line, no link and no pipe; what is not UTF-8 becomes JSON's escape. Raises
    OSError."""
    return open(
        path,
        "a" if append else "w",
        encoding="utf-8",
        errors="backslashreplace",
        opener=lambda name, flags: os.open(name, flags | _NO_SURPRISE, 0o666),
    )


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def open_regular(path: Path, links: bool = False) -> Iterator[BinaryIO]:
    """A regular file to read from: no pipe, no link unless `links`. Raises ResultError, also for what fails while it is
    open."""
    extra = _NO_SURPRISE & ~(getattr(os, "O_NOFOLLOW", 0) if links else 0)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ResultError(f"'{path}': not a regular file; put one in its place")
            yield file
    except OSError as error:
        reason = "a link, which is not followed" if not links and path.is_symlink() else error.strerror
        raise ResultError(f"'{path}': cannot be read: {reason}") from None
    except MemoryError:
        raise ResultError(f"'{path}': does not fit into memory") from None


def read_bytes(path: Path, limit: int | None = None, links: bool = False) -> bytes:
    """A regular file, no link unless `links`, of at most `limit` bytes. Raises ResultError."""
    with open_regular(path, links) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ResultError(f"'{path}': {size} bytes where at most {limit} are expected")
        return file.read()


def read_json(path: Path, links: bool = False) -> Any:
    """Raises ResultError for what is no JSON, as strict as it is written: UTF-8, every key once, every number finite."""
    content = read_bytes(path, JSON_BYTES, links)
    try:
        return parsed_json(content)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"'{path}': not JSON: {error}") from None


def parsed_json(content: bytes) -> Any:
    """The same of bytes. Raises ValueError or RecursionError."""
    text = content.decode("utf-8-sig")
    value = json.loads(text, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_once)
    _shallow(value)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character may be written as an escape
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_yaml(text: str) -> Any:
    """A value in YAML without aliases, which make much of little. Raises ValueError."""
    if len(text) > YAML_LETTERS:
        raise ValueError(f"{len(text)} letters where at most {YAML_LETTERS} are expected")
    try:
        value = yaml.load(text, _NoAliases)
        str(value)  # a number may have more digits than Python shows
    except Exception as error:  # a date without a month, a set of lists: its constructors raise what they like
        raise ValueError(str(error) or type(error).__name__) from None
    return value


class _NoAliases(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def sha256_of(path: Path) -> str:
    """Raises ResultError for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ResultError(f"'{path}': cannot be read: {error.strerror}") from None


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text[:40])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {DEPTH} deep")

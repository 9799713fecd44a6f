"""A matrix that is made in parts: each one a file of its own, whole or not there, and the one file that comes of them.

train-000000.safetensors   `rows` (n, d); in its metadata the plan that it belongs to and the SHA-256 of its bytes
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from cairn.errors import ResultError
from cairn.storage.files import atomic_write, safetensors_header, write_chunks

CODES = {np.dtype("<i8"): "I64", np.dtype("<f4"): "F32", np.dtype("<f2"): "F16"}

SUFFIX = ".safetensors"

NAME = re.compile(r"(text|rows|(train|test)-[0-9]{6,})")
"""What a part may be called: nothing else in the folder is ours."""


class Parts:
    """The parts in `folder` that belong to the plan called `key`. Two writers of one part write the same."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def write(self, name: str, rows: np.ndarray) -> None:
        """Whole or not at all. Raises ResultError where it cannot be written."""
        rows = np.ascontiguousarray(rows)
        about = {"plan": self.key, "sha256": hashlib.sha256(rows).hexdigest()}
        header = safetensors_header([("rows", CODES[rows.dtype], rows.shape, rows.nbytes)], about)
        write_chunks(self.path(name), [header, rows])

    def read(self, name: str, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray | None:
        """The rows; None if they are not there, not whole, or of another plan."""
        try:
            with safe_open(self.path(name), framework="numpy") as file:
                about = file.metadata() or {}
                rows = file.get_tensor("rows") if about.get("plan") == self.key else None
        except Exception:  # not there, or whatever a parser makes of damaged bytes
            return None
        if rows is None or rows.shape != shape or rows.dtype != dtype:
            return None
        return rows if hashlib.sha256(rows).hexdigest() == about.get("sha256") else None

    def present(self) -> set[str]:
        """Names of the files that are there, whole or not."""
        return {path.stem for path in self.folder.glob(f"*{SUFFIX}") if NAME.fullmatch(path.stem)}

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                self.path(name).unlink()

    def clear(self) -> None:
        """Remove every part, and what writers that were killed have left."""
        self.remove(self.present())
        for path in self.folder.glob(f".*{SUFFIX}.*.part"):
            with suppress(OSError):
                path.unlink()


class Column(NamedTuple):
    """A tensor of a file, in pieces that follow one another."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]

    @classmethod
    def of(cls, values: np.ndarray) -> Column:
        return cls(values.dtype, values.shape, [np.ascontiguousarray(values)])

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


def write_columns(path: Path, columns: Mapping[str, Column], about: Mapping[str, str]) -> int:
    """One safetensors file, whole or not at all, with a piece at most in memory; its bytes. It is laid out as
    `cairn.storage.tensors.serialized` does it. Raises ResultError where it cannot be written, or does not read back."""
    ordered = sorted(columns.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header = safetensors_header(
        ((name, CODES[column.dtype], column.shape, column.bytes) for name, column in ordered), about
    )
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            file.write(header)
            for _, column in ordered:
                for piece in _counted(column):
                    file.write(piece)
            size = file.tell()
        _require_readable(temporary, path, columns)
    return size


def _counted(column: Column) -> Iterator[np.ndarray]:
    written = 0
    for piece in column.pieces:
        written += piece.nbytes
        yield piece
    if written != column.bytes:
        raise ValueError(f"{written} bytes for a tensor of {column.bytes}")


def _require_readable(temporary: Path, path: Path, columns: Mapping[str, Column]) -> None:
    """By safetensors' own reader, which refuses a file whose length is not that of its tensors."""
    try:
        with safe_open(temporary, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except Exception as error:
        raise ResultError(f"'{path}': does not read back as it was written ({error}); check the disk") from None
    if found != {name: (CODES[column.dtype], tuple(column.shape)) for name, column in columns.items()}:
        raise ResultError(f"'{path}': does not read back as it was written; check the disk")

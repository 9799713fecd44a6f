"""A matrix that is made in parts: each one a file of its own, whole or not there, and the one file that comes of them.

train-000000.safetensors   `rows` (n, d); in its metadata the plan that it belongs to and the SHA-256 of its bytes
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cairn.errors import ResultError
from cairn.storage.files import atomic_write, write_chunks
from cairn.storage.tensors import Layout, TensorFile, TensorWriter, serialized

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
        about = {"plan": self.key, "sha256": hashlib.sha256(rows.data).hexdigest()}
        write_chunks(self.path(name), serialized({"rows": torch.from_numpy(rows)}, about))

    def read(self, name: str, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray | None:
        """The rows; None if they are not there, not whole, or of another plan."""
        try:
            file = TensorFile(self.path(name))
        except ResultError:
            return None
        about = file.header.metadata
        if about.get("plan") != self.key or "rows" not in file:
            return None
        rows = np.array(file.array("rows"))
        if rows.shape != shape or rows.dtype != dtype:
            return None
        return rows if hashlib.sha256(rows.data).hexdigest() == about.get("sha256") else None

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


def write_columns(path: Path, columns: Mapping[str, Column], about: Mapping[str, str]) -> int:
    """One safetensors file, whole or not at all, with a piece at most in memory; its bytes. It is laid out as
    `cairn.storage.tensors.serialized` does it. Raises ResultError where it cannot be written, or does not read back."""
    layouts = {name: Layout.of(column.dtype, column.shape) for name, column in columns.items()}
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            writer = TensorWriter(file, layouts, about)
            for name, column in columns.items():
                for piece in column.pieces:
                    writer.append(name, piece)
            writer.close()
        try:
            found = {name: layout for name, (layout, _) in TensorFile(temporary).header.tensors.items()}
        except ResultError:
            found = {}
        if found != layouts:
            raise ResultError(f"'{path}': does not read back as it was written; check the disk")
    return writer.size

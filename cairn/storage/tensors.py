"""The safetensors codec: every tensor that is written to disk or read from it passes here.

A file is 8 bytes of length, a JSON header of that length (name -> type, shape, first and last byte; `__metadata__`), then the
tensors' bytes, little-endian and without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cairn.errors import ResultError
from cairn.storage.files import open_regular, parsed_json, read_bytes

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
"""What is written, and what is read: no type beside these."""

_TYPES = {code: dtype for dtype, code in CODES.items()}

HEADER_BYTES = 100 * 10**6
"""Longest header that is read, as in the safetensors library."""

METADATA = "__metadata__"


class Layout(NamedTuple):
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: np.dtype, shape: Sequence[int]) -> Layout:
        return cls(torch.from_numpy(np.empty(0, dtype)).dtype, tuple(shape))

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Header(NamedTuple):
    """What a file says of itself: every tensor with the byte at which it starts, counted from the file's beginning."""

    tensors: dict[str, tuple[Layout, int]]
    metadata: dict[str, str]


# --- writing ----------------------------------------------------------------------------------------------------------


def _header(layouts: Mapping[str, Layout], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """How a file begins, and where each tensor starts, in the file's order: the widest types first, as safetensors has it, so
    that every tensor begins at a multiple of its width; then by name."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    ends = {}
    end = 0
    for name, layout in sorted(layouts.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        ends[name], end = end, end + layout.nbytes
        header[name] = {"dtype": CODES[layout.dtype], "shape": list(layout.shape), "data_offsets": [ends[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in ends.items()}


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """A safetensors file in pieces. Equal tensors give equal bytes, in whatever order they come."""
    header, starts = _header(
        {name: Layout(value.dtype, value.shape) for name, value in tensors.items()}, metadata or {}
    )
    yield header
    for name in starts:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class TensorWriter:
    """A safetensors file written rows by rows, of several tensors in turn: none of them is ever whole in memory."""

    def __init__(self, file: BinaryIO, layouts: Mapping[str, Layout], metadata: Mapping[str, str]):
        header, self._next = _header(layouts, metadata)
        self._end = {name: self._next[name] + layout.nbytes for name, layout in layouts.items()}
        self._file, self.size = file, len(header) + sum(layout.nbytes for layout in layouts.values())
        file.write(header)

    def append(self, name: str, rows: np.ndarray) -> None:
        """The next rows of a tensor, of its own type. Raises ValueError if it has no room for them."""
        if self._next[name] + rows.nbytes > self._end[name]:
            raise ValueError(f"'{name}': more rows than its shape has")
        self._file.seek(self._next[name])
        self._file.write(np.ascontiguousarray(rows).data)
        self._next[name] += rows.nbytes

    def close(self) -> None:
        """Raises ValueError for a tensor that lacks rows."""
        for name, end in self._end.items():
            if self._next[name] != end:
                raise ValueError(f"'{name}': {end - self._next[name]} bytes are missing")


# --- reading ----------------------------------------------------------------------------------------------------------


def _parsed(path: Path, head: bytes, size: int) -> Header:
    """The header of a file of `size` bytes that begins with `head`. Raises ResultError unless its tensors fill the rest of the
    file, without gaps or overlaps."""
    length = int.from_bytes(head[:8], "little")
    if size < 10 or not 2 <= length <= min(size - 8, HEADER_BYTES):
        raise _none(path, "empty" if not size else f"a header of {length} bytes in {size}")
    try:
        stored = parsed_json(head[8 : 8 + length])
        metadata = stored.pop(METADATA, {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata that is no text")
        found = {name: _entry(name, entry) for name, entry in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _none(path, f"{type(error).__name__}: {error}") from None
    end = 0
    for name, (layout, start, stop) in sorted(found.items(), key=lambda item: item[1][1:]):
        if start != end or stop - start != layout.nbytes:
            raise _none(path, f"'{name[:80]}' of shape {layout.shape} from byte {start} to {stop}")
        end = stop
    if 8 + length + end != size:
        raise _none(path, f"{size} bytes where {8 + length + end} are expected")
    return Header({name: (layout, 8 + length + start) for name, (layout, start, _) in found.items()}, metadata)


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[Layout, int, int]:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise ValueError(f"'{name[:80]}': shape {shape}, bytes {start} to {stop}")
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"'{name[:80]}' is of {entry['dtype']}, which is not read")
    return Layout(_TYPES[entry["dtype"]], tuple(shape)), start, stop


def _none(path: Path, why: str) -> ResultError:
    return ResultError(f"'{path}': not a safetensors file, or a damaged one: {why}")


class TensorFile:
    """A safetensors file that is mapped, not read: pages are loaded when their values are asked for. A link is followed.

    Raises ResultError for a file that cannot be read or is not what its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path, links=True) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), HEADER_BYTES))
        self.header, self._size = _parsed(path, head, size), size

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def array(self, name: str) -> np.ndarray:
        """A view of the file, which cannot be written to. NumPy has no bfloat16: TypeError."""
        layout, start = self.header.tensors[name]
        empty = torch.empty(layout.shape if not layout.nbytes else 0, dtype=layout.dtype).numpy()
        return np.memmap(self.path, empty.dtype, "r", start, layout.shape) if layout.nbytes else empty

    def tensors(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Views of the file (all tensors, or these): it must not change as long as they are in use."""
        mapped = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        found = {}
        for name in self.header.tensors if names is None else names:
            layout, start = self.header.tensors[name]
            values = mapped[start : start + layout.nbytes]
            if start % layout.dtype.itemsize:
                values = values.clone()
            found[name] = values.view(layout.dtype).reshape(layout.shape)
        return found


def read_tensors(path: Path, sha256: str | None = None, limit: int | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Raises ResultError for a file that is damaged, longer than `limit`, is not the one whose hash was given, or holds a type
    or a number that is none.
    """
    content = read_bytes(path, limit)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ResultError(f"'{path}': damaged: its SHA-256 is not the one in the manifest")
    header, values = _parsed(path, content, len(content)), np.frombuffer(content, dtype=np.uint8)
    tensors = {}
    for name, (layout, start) in header.tensors.items():
        # Copied into memory that torch aligns: a product's last bits depend on where a tensor begins
        tensors[name] = torch.empty(layout.shape, dtype=layout.dtype)
        tensors[name].reshape(-1).view(torch.uint8).numpy()[:] = values[start : start + layout.nbytes]
    require_finite(path, tensors)
    return tensors


def first_not_finite(rows: Tensor) -> int | None:
    """Number of the first row that holds NaN or an infinity."""
    wrong = (~rows.isfinite()).flatten(1).any(1).nonzero()
    return int(wrong[0]) if len(wrong) else None


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ResultError naming a tensor that holds NaN or an infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ResultError(f"'{path}': '{key[:80]}' holds values that are not finite")

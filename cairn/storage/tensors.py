"""Tensors in safetensors files: written piece by piece, read into memory of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from cairn.errors import ResultError
from cairn.storage.files import read_bytes, safetensors_header

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
"""What is written, and what is read: no type beside these."""


def serialized(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> Iterator[Any]:
    """A safetensors file in pieces. Equal tensors give equal bytes, in whatever order they come."""
    # The widest types first, as safetensors has it: every tensor then begins at a multiple of its width
    rows = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    yield safetensors_header(((key, CODES[value.dtype], value.shape, value.nbytes) for key, value in rows), about or {})
    for _, value in rows:
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def first_not_finite(rows: Tensor) -> int | None:
    """Number of the first row that holds NaN or an infinity."""
    wrong = (~rows.isfinite()).flatten(1).any(1).nonzero()
    return int(wrong[0]) if len(wrong) else None


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ResultError naming a tensor that holds NaN or an infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ResultError(f"'{path}': '{key[:80]}' holds values that are not finite")


def read_tensors(path: Path, sha256: str | None = None, limit: int | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Raises ResultError for a file that is damaged, longer than `limit`, is not the one whose hash was given, or holds a type
    or a number that is none.
    """
    content = read_bytes(path, limit)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ResultError(f"'{path}': damaged: its SHA-256 is not the one in the manifest")
    try:
        # Cloned into aligned memory: a product's last bits depend on where a tensor begins
        tensors = {key: value.clone() for key, value in load(content).items()}
    except Exception as error:  # whatever a parser makes of hostile bytes
        raise ResultError(f"'{path}': no safetensors file: {error or 'empty'}") from None
    for key, value in tensors.items():
        if value.dtype not in CODES:
            raise ResultError(
                f"'{path}': '{key[:80]}' is of {str(value.dtype).removeprefix('torch.')}, which is not read"
            )
    require_finite(path, tensors)
    return tensors

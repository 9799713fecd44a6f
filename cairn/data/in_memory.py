"""Images that somebody holds: files, pictures in memory, rows of embeddings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from cairn.data.decoding import ONE_PICTURE, check, decoded, picture_of, reason, rgb
from cairn.data.identity import content_hash
from cairn.errors import InvalidInput, one_line


@dataclass(frozen=True, eq=False)
class Reduced:
    """A picture of which less is kept than was decoded: `values` as uint8 (h, w, 3), `content` the hash of the whole."""

    values: np.ndarray
    content: bytes


@dataclass(frozen=True, eq=False)
class Deferred:
    """A picture of a data set, read whenever it is asked for: `read` gives a file or the bytes of one, a PIL image or an array;
    `name` is for messages."""

    read: Callable[[], Any]
    name: str


Item = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor | Reduced | Deferred
"""A file, a PIL image, uint8 values (h, w, 3), (h, w, 4) or (h, w), or where embeddings are learned a row (d,)."""


@runtime_checkable
class ArrayLike(Protocol):
    """What NumPy takes for an array, such as a table of pandas."""

    def __array__(self) -> np.ndarray: ...


def items_of(given: Item | Iterable[Item], width: int | None = None) -> list[Item]:
    """The single images or rows in what was given: one, or several in a list, a generator or an array.

    With `width` rows of embeddings are expected: (width,) is one, (n, width) are n. Otherwise an array (h, w) or (h, w, 3)
    is one picture and (n, h, w, 3) are n. Raises InvalidInput for anything else.
    """
    if isinstance(given, (str, bytes, os.PathLike, Image.Image, Reduced, Deferred)):
        return [given]
    if not isinstance(given, (np.ndarray, torch.Tensor)):
        if not isinstance(given, (Iterable, ArrayLike)):
            raise InvalidInput(
                f"images: {_short(given)}; give a file, a PIL image, an array, or several of them in a list"
            )
        if not isinstance(given, ArrayLike):
            return list(given)
        given = np.asarray(given)  # a table of pandas, whose items are its columns' names
    if width is not None and np.iscomplexobj(given):
        raise InvalidInput("rows: Complex data not supported; give rows of real numbers")
    numeric = isinstance(given, torch.Tensor) or given.dtype.kind in "fiub"
    if not numeric and width is None:  # an array of paths
        return np.ravel(given).tolist()
    single = (1,) if width is not None else (2, 3)
    if given.ndim in single:
        return [given]
    if given.ndim == max(single) + 1:
        return list(given)
    expected = (
        f"rows of {width} numbers, (n, {width})" if width is not None else f"{ONE_PICTURE}, several as (n, h, w, 3)"
    )
    raise InvalidInput(f"images: an array of shape {tuple(given.shape)}; {expected}")


class InMemoryImages:
    """Images as they were handed over, labelled by class number. A file is opened when it is asked for.

    With `width` the items are rows of so many numbers, in place of pictures. With `side` JPEG files are decoded at a fraction of
    their size (see `decoded`); what they are known by is made of them whole.
    """

    def __init__(self, items: Sequence[Item], labels: np.ndarray, width: int | None = None, side: int | None = None):
        self.items, self.labels, self.width, self.side = items, labels, width, side

    def __len__(self) -> int:
        return len(self.items)

    def taken(self, rows: Sequence[int] | np.ndarray) -> InMemoryImages:
        """Those items, in that order."""
        labels = self.labels[np.asarray(rows, dtype=np.int64)]
        return InMemoryImages([self.items[row] for row in rows], labels, self.width, self.side)

    def reduced(self, side: int) -> InMemoryImages:
        """The same items, JPEG files decoded with that side."""
        return InMemoryImages(self.items, self.labels, self.width, side)

    def __getitem__(self, index: int) -> Any:
        """A PIL image in RGB or a float32 row (width,). Raises InvalidInput naming the item that is neither."""
        return self._picture(index, self.side) if self.width is None else self._row(index)

    def _picture(self, index: int, side: int | None) -> Image.Image:
        item = self.items[index]
        if isinstance(item, Deferred):
            try:
                item = item.read()
                if isinstance(item, BytesIO):
                    return decoded(item, side)
            except Exception as error:  # whatever a data set's own reading may raise
                raise InvalidInput(
                    f"image '{item.name}': cannot be read ({reason(error)}); replace or leave it out"
                ) from None
        if isinstance(item, (str, os.PathLike)):
            try:
                return decoded(Path(item), side)
            except Exception as error:  # a decoder fed with damaged bytes may raise anything
                raise InvalidInput(
                    f"image '{one_line(str(item))}': cannot be read ({reason(error)}); replace or leave it out"
                ) from None
        if isinstance(item, Image.Image):
            try:
                return rgb(item)
            except Exception as error:  # of a file that is decoded only now
                raise InvalidInput(
                    f"image {index}: cannot be read ({reason(error)}); open it again or leave it out"
                ) from None
        if isinstance(item, Reduced):
            return Image.fromarray(item.values)
        if not isinstance(item, (np.ndarray, torch.Tensor)):
            raise InvalidInput(f"image {index}: {_short(item)}; give a file, a PIL image or an array")
        try:
            return picture_of(item)
        except InvalidInput as error:
            raise InvalidInput(f"image {index}: {error}") from None

    def _row(self, index: int) -> np.ndarray:
        item = self.items[index]
        try:
            if isinstance(item, (str, bytes, os.PathLike, Image.Image)):
                raise ValueError
            row = np.asarray(item, dtype=np.float32)
        except (TypeError, ValueError):
            raise InvalidInput(
                f"row {index}: {_short(item)}; this learner takes embeddings, rows of {self.width} numbers"
            ) from None
        if row.shape != (self.width,):
            raise InvalidInput(
                f"row {index}: shape {row.shape}; this learner takes embeddings, rows of {self.width} numbers"
            )
        if not np.isfinite(row).all():
            raise InvalidInput(
                f"row {index}: an embedding that is not finite (NaN or inf); embed it again or leave it out"
            )
        return row

    def check(self, index: int) -> None:
        """Raises what opening would raise; pixels in memory are taken as they are."""
        item = self.items[index]
        if self.width is None and isinstance(item, (str, os.PathLike)):
            check(Path(item))
        else:
            self[index]

    def describe(self, index: int) -> str:
        item = self.items[index]
        if isinstance(item, Deferred):
            return item.name
        return (
            os.fspath(item)
            if isinstance(item, (str, os.PathLike))
            else f"{'image' if self.width is None else 'row'} {index}"
        )

    def identity(self, index: int) -> bytes:
        """What an embedding in a store is found by: a hash of the file's bytes, or of what is in memory. Raises InvalidInput
        for a file that cannot be read."""
        item = self.items[index]
        if not isinstance(item, (str, os.PathLike)):
            return self._content(index)
        try:
            return b"file\0" + hashlib.sha256(Path(item).read_bytes()).digest()
        except OSError as error:
            raise InvalidInput(f"image '{one_line(str(item))}': {error.strerror}; replace or leave it out") from None

    def content_hashes(self) -> list[bytes]:
        """By which the items are known again, see `cairn.data.identity`; decoded eight at a time. Raises what opening one
        raises."""
        with ThreadPoolExecutor(max_workers=8) as pool:
            return list(pool.map(self._content, range(len(self))))

    def _content(self, index: int) -> bytes:
        """The hash of all that the item is, at whatever size it is decoded otherwise."""
        item = self.items[index]
        if isinstance(item, Reduced):
            return item.content
        return content_hash(self._picture(index, None) if self.width is None else self._row(index))


def _short(value: Any) -> str:
    return f"{type(value).__name__} {one_line(repr(value))[:60]}"

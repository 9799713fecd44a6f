"""Images that somebody holds: files, pictures in memory, rows of embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cairn.data.folders import check, decoded, rgb
from cairn.errors import DataError, one_line

Item = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, an array (h, w, 3) or (h, w) of uint8, or where embeddings are learned a row (d,)."""


class Given:
    """Images as they were handed over, labelled by class number. A file is opened when it is asked for."""

    def __init__(self, items: Sequence[Item], labels: np.ndarray):
        self.items, self.labels = items, labels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, (str, Path)):
            try:
                return decoded(Path(item))
            except Exception as error:  # a decoder fed with damaged bytes may raise anything
                reason = one_line(str(error) or type(error).__name__)
                raise DataError(f"image '{one_line(str(item))}': cannot be read ({reason})") from None
        if isinstance(item, Image.Image):
            return rgb(item)
        array = np.asarray(item)
        if array.ndim == 1:
            if not np.isfinite(array).all():
                raise DataError(f"image {index}: an embedding that is not finite; embed it again or leave it out")
            return array
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
            raise DataError(
                f"image {index}: an array of {array.dtype} {array.shape}; give uint8 (h, w, 3), (h, w, 4) or (h, w)"
            )
        return rgb(Image.fromarray(array))

    def check(self, index: int) -> None:
        """Raises what opening would raise; pixels in memory are taken as they are."""
        item = self.items[index]
        if isinstance(item, (str, Path)):
            check(Path(item))
        else:
            self[index]

    def describe(self, index: int) -> str:
        item = self.items[index]
        return str(item) if isinstance(item, (str, Path)) else f"image {index}"

    def identity(self, index: int) -> bytes:
        item = self.items[index]
        if isinstance(item, (str, Path)):
            found = Path(item).stat()
            return f"{item}\0{found.st_size}\0{found.st_mtime_ns}".encode("utf-8", "surrogateescape")
        return hashlib.sha256(np.asarray(item).tobytes()).digest()

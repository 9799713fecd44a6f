"""From an encoded file, or what somebody holds, to a picture in RGB."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cairn.data.picture_files import readable_formats
from cairn.errors import InvalidInput, one_line

CHANNELS = (3, 4)
ONE_PICTURE = "give a picture as uint8 (h, w, 3), (h, w, 4) or (h, w)"


def decoded(file: Path | IO[bytes], side: int | None = None) -> Image.Image:
    """The image as `rgb` gives it. Raises whatever the decoder raises, and refuses a decompression bomb by its header.

    With `side` a JPEG is decoded at the smallest of its fractions (to an eighth) that has so many pixels along either side: the
    decoder leaves out frequencies that a smaller picture does not show. A smaller JPEG, and any other kind, is decoded whole.
    """
    with Image.open(file, formats=readable_formats()) as image:
        _refuse_bomb(image)
        if side is not None:
            image.draft(None, (side, side))
        return rgb(image)


def decoded_within(
    file: Path | IO[bytes], pixels: int, side: int | None = None, every_kind: bool = False
) -> Image.Image:
    """As `decoded`, of at most so many `pixels`. A plain JPEG, which is decoded row by row, may have more. With `side`, for whoever
    needs no more than so many pixels along either side, it is decoded at the smallest of its fractions (to an eighth) that
    has them, and what is decoded counts. With `every_kind` other JPEGs are decoded so as well, but count whole."""
    with Image.open(file, formats=readable_formats()) as image:
        _refuse_bomb(image)
        plain = image.format == "JPEG" and not image.info.get("progressive")  # of a progressive one all is held at once
        width, height = image.size
        if side is not None and (plain or every_kind):
            image.draft(None, (side, side))
        if plain:
            width, height = image.size
        if (not plain or side is not None) and width * height > pixels:
            raise Image.DecompressionBombError(f"{width} x {height} pixels, where {pixels:,} are the most")
        return rgb(image)


def check(file: Path | IO[bytes]) -> None:
    """Raises what `decoded` would raise, at less cost: a PNG's checksums stand for its pixels, a JPEG is made small."""
    with Image.open(file, formats=readable_formats()) as image:
        _refuse_bomb(image)
        if image.format == "PNG":
            image.verify()
        else:
            image.draft(None, (1, 1))  # a JPEG's bytes are all read, but 1 pixel in 64 is made; others stay as they are
            rgb(image)


def _refuse_bomb(image: Image.Image) -> None:
    """Raises DecompressionBombError where Pillow only warns; it raises by itself from twice its limit on."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"{pixels} pixels exceed the limit of {limit}")


def rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, turned as its EXIF orientation says; of an animation, the current (first) frame.

    Transparent parts lie on white, 16-bit greys keep their high byte, floats in [0, 1] become 0..255 (other floats
    and integers beyond 16 bits are stretched over their range). Raises ValueError for floats that are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels that are not finite (NaN or inf)")
    if mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255
    elif mode != "F" and low >= 0 and high <= 65535:  # older Pillow opens a 16-bit PNG in mode "I"
        scaled = values // 256
    else:
        scaled = (values - low) * (255 / max(high - low, 1e-12))
    return scaled.astype(np.uint8)


def reason(error: Exception) -> str:
    """Why something could not be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # its message is the path once more, or an address in memory
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line((str(error).splitlines() or [""])[0]) or type(error).__name__


def picture_of(item: Any) -> Image.Image:
    """A PIL image, or uint8 values (h, w, 3), (h, w, 4) or (h, w), as `rgb` gives them. Raises InvalidInput for other values, and
    whatever the decoder raises of a file that is decoded only now."""
    if isinstance(item, Image.Image):
        return rgb(item)
    array = np.asarray(item)
    pictured = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in CHANNELS)
    if not (pictured and array.dtype == np.uint8 and array.size):
        hint = "channels last, as from transpose(1, 2, 0); " if array.ndim == 3 and array.shape[0] in CHANNELS else ""
        raise InvalidInput(f"an array of {array.dtype} {array.shape}; {hint}{ONE_PICTURE}")
    image = Image.fromarray(array)
    return image if image.mode == "RGB" else rgb(image)

"""Where the object of an image lies in what a tower sees of it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from PIL import Image

from cairn.data.images import Images, mask_of
from cairn.errors import DataError
from cairn.towers.cached import opened
from cairn.towers.protocol import Towers


def mask_in_view(images: Images, index: int, towers: Towers) -> Bool[np.ndarray, "s s"] | None:
    """The mask of an item, as `in_view`; None where it is not known, or the towers see no images but their embeddings."""
    source, place = opened(images, index)
    mask = mask_of(source, place) if towers.has_images else None
    if mask is None:
        return None
    item, called = source[place], f"mask of {source.describe(place)}"
    width, height = item.size if isinstance(item, Image.Image) else np.asarray(item).shape[1::-1]
    if np.ndim(mask) != 2:
        raise DataError(f"{called}: of shape {np.shape(mask)}; give ({height}, {width}), true where the object is")
    return in_view(np.asarray(mask, dtype=bool), (width, height), towers, called)


def in_view(
    mask: Bool[np.ndarray, "h w"], size: tuple[int, int], towers: Towers, called: str
) -> Bool[np.ndarray, "s s"]:
    """The mask of an image of this size (width, height), resized and cropped as the tower does with the image. Where it fills an
    image up there is no object. The mask may be larger or smaller than the image, as long as its sides are in proportion.

    Raises DataError, which begins with what it is `called`, for one of another shape.
    """
    (height, width), scale = mask.shape, mask.shape[1] / size[0]
    if abs(height - scale * size[1]) > 1 + scale:  # sides are whole numbers, of a reduced JPEG too
        raise DataError(
            f"{called}: {width} x {height} for a picture of {size[0]} x {size[1]}; make it of the picture as it is seen, turned "
            "upright"
        )

    def seen(part: np.ndarray) -> np.ndarray:
        drawn = Image.fromarray(part * np.uint8(255))
        drawn = drawn if drawn.size == size else drawn.resize(size, Image.Resampling.BILINEAR)
        return towers.prepare(drawn.convert("RGB"))[0].numpy()

    return seen(mask) > seen(~mask)  # what is filled up is as bright in both

"""A frozen image tower that sees each image once ever: towers and a stream that look embeddings up in a store.

Methods, loaders and evaluation stay as they are. An item of a placed collection is not an image but its place, (number of
the collection, row); `prepare` and `pixels` pass places on, and where the towers are asked for embeddings, those of the
whole collection are looked up or computed. What is no place goes through the tower as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cairn.data.feature_store import Batch, FeatureStore, Kind, Rows, image_ids
from cairn.data.images import Images, LabelSets, Subset, mask_of, source_of
from cairn.data.loading import Loader
from cairn.data.stream import TaskStream
from cairn.errors import NotFinite, one_line
from cairn.storage.tensors import first_not_finite
from cairn.towers.fingerprint import weights_part
from cairn.towers.preprocessing import preprocessing_of
from cairn.towers.protocol import Towers
from cairn.types import Attention, Features, Pixels, Precision

BATCH = 32
"""Images in every pass whose rows are kept; a smaller rest is filled up. In passes of one size, what an image gives does
not depend on the images beside it, and so not on who asked for it first."""


class Placed:
    """A collection whose items are their places. Opens nothing."""

    def __init__(self, images: Images, number: int):
        self.images, self.number, self.labels = images, number, images.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([self.number, index])

    def describe(self, index: int) -> str:
        return self.images.describe(index)

    def identity(self, index: int) -> bytes:
        return self.images.identity(index)

    def mask(self, index: int) -> np.ndarray | None:
        return mask_of(self.images, index)

    @cached_property
    def ids(self) -> np.ndarray:
        return image_ids(self.images)


def opened(images: Images, index: int) -> tuple[Images, int]:
    """As `source_of`, of an item that may be the place of another: the collection that opens it."""
    source, place = source_of(images, index)
    while isinstance(source, Placed):
        source, place = source_of(source.images, place)
    return source, place


class CachedTowers:
    """`towers`, with the embeddings of placed images in `store`. For methods that leave the image tower as it is.

    `passes` has one more count, `stored`: images whose embeddings the store held, in place of a pass. `data` is what the
    store's listing calls the images.
    """

    def __init__(self, towers: Towers, store: FeatureStore, data: str = "?"):
        self.towers, self.store = towers, store
        self.name, self.dim, self.logit_scale = towers.name, towers.dim, towers.logit_scale
        self.hidden_dim = towers.hidden_dim
        self.fingerprint, self.passes = towers.fingerprint, towers.passes
        self.has_images, self.has_text = towers.has_images, towers.has_text
        self.text, self.tokens, self.word_tokens = towers.text, towers.tokens, towers.word_tokens
        self.class_texts = towers.class_texts
        self.vision, self.vision_and_patches = towers.vision, towers.vision_and_patches
        self.text_tower, self.preprocessing = towers.text_tower, preprocessing_of(towers)
        self.device, self.revision = towers.device, towers.revision
        self.precision: Precision = towers.precision
        self.source, self.notices = towers.source, towers.notices
        self.passes.setdefault("stored", 0)
        self._maker = f"{weights_part(towers.fingerprint)}-{towers.precision}-{towers.device.type}"
        self._about = {"data": data, "towers": towers.name}
        self._collections: list[Placed] = []
        self._rows: dict[tuple[int, Kind], Rows] = {}

    def placed(self, images: Images) -> Placed:
        self._collections.append(Placed(images, len(self._collections)))
        return self._collections[-1]

    def prepare(self, item: Any) -> Tensor:
        return item if _is_place(item) else self.towers.prepare(item)

    def pixels(self, prepared: Tensor) -> Pixels:
        return prepared if _is_place(prepared) else self.towers.pixels(prepared)

    def image(self, pixels: Pixels) -> Features:
        return self._looked_up(pixels, "image")[0] if _is_place(pixels) else self.towers.image(pixels)

    def image_and_hidden(self, pixels: Pixels) -> tuple[Features, Float[Tensor, "n w"]]:
        """Of images alone: the store holds no hidden rows, and the methods that ask for them are not given places."""
        return self.towers.image_and_hidden(pixels)

    def image_and_patches(
        self, pixels: Pixels, attention: Attention = "native"
    ) -> tuple[Features, Float[Tensor, "n p d"]]:
        if _is_place(pixels):
            image, patches = self._looked_up(pixels, attention)
            return image, patches
        return self.towers.image_and_patches(pixels, attention)

    def patches(self, pixels: Pixels) -> Float[Tensor, "n p d"]:
        return self.image_and_patches(pixels)[1]

    def _looked_up(self, places: Tensor, kind: Kind) -> tuple[Tensor, ...]:
        """Embeddings, and patches unless `kind` is image, in the order of the places."""
        numbers, indices = places.cpu().numpy().T
        parts = ("image",) if kind == "image" else ("image", "patches")
        found: list[np.ndarray] = []
        for number in np.unique(numbers):
            here, rows = numbers == number, self._held(int(number), kind)
            taken = [getattr(rows, part)(indices[here]).astype(np.float32, copy=False) for part in parts]
            found = found or [np.empty((len(places), *rows.shape[1:]), rows.dtype) for rows in taken]
            for whole, some in zip(found, taken, strict=True):
                whole[here] = some
        return tuple(torch.from_numpy(rows).to(self.towers.device) for rows in found)

    def _held(self, number: int, kind: Kind) -> Rows:
        """Rows of a whole collection, from the store or else from the tower."""
        if (number, kind) not in self._rows:
            images = self._collections[number]
            rows = self.store.rows(
                self._maker, kind, images.ids, lambda missing: self._computed(images.images, missing, kind), self._about
            )
            self.passes["stored"] += rows.found
            self._rows[number, kind] = rows
        return self._rows[number, kind]

    @torch.no_grad()
    def _computed(self, images: Images, rows: np.ndarray, kind: Kind) -> Iterator[Batch]:
        part, done = Subset(images, rows, images.labels[rows]), 0

        def finite(found: Tensor) -> np.ndarray:  # what is stored is stored for good
            if (row := first_not_finite(found)) is not None:
                raise NotFinite(f"embedding of {one_line(part.describe(start + row))} is not finite; try float32")
            return found.cpu().numpy()

        for pixels, _ in Loader(part, self.towers.prepare, self.towers.pixels, batch=BATCH, cache_bytes=0):
            n, start = len(pixels), done
            done += n
            whole = torch.cat([pixels, pixels[-1:].expand(BATCH - n, *pixels.shape[1:])])
            if kind == "image":
                yield finite(self.towers.image(whole)[:n]), None
            else:
                z, p = self.towers.image_and_patches(whole, kind)
                yield finite(z[:n]), finite(p[:n])


def _is_place(item: Any) -> bool:
    """Pixels are floats, prepared images bytes; whole numbers are places."""
    return isinstance(item, Tensor) and item.dtype == torch.int64


def kept(stream: TaskStream, towers: Towers, store: FeatureStore) -> tuple[TaskStream, CachedTowers]:
    """The stream with places for images, and the towers that know them. For methods that leave the image tower as it is."""
    knowing = CachedTowers(towers, store, stream.name)

    def placed(images: Images) -> Images:
        found = knowing.placed(images)
        return LabelSets.of(found, images.targets) if isinstance(images, LabelSets) else found

    tasks = []
    for task in stream.tasks:
        if task.label_sets is None:
            tasks.append(replace(task, train=placed(task.train)))
        else:
            sets = LabelSets.of(knowing.placed(task.label_sets), task.label_sets.targets)
            tasks.append(replace(task, train=sets.copies(), label_sets=sets))
        if task.unlabelled is not None:
            tasks[-1] = replace(tasks[-1], unlabelled=placed(task.unlabelled))
    return replace(stream, tasks=tuple(tasks), tests=tuple(map(placed, stream.tests))), knowing

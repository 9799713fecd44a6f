"""The way from files to batches: opening in the first epoch, and from the second on what was kept.

Drawn JPEGs of 256 x 256 in a folder, prepared for a tower of 224 x 224; what is counted are the uint8 batches, as they go
to the tower's device. The plain form keeps a dictionary of prepared images, has one thread open a whole batch, and stacks
the batch image by image.

The first epoch is with one worker and with as many as the loader takes by itself; the first batch is what training waits
for before its first step. Later epochs are read as fast as they come, also at the small resolution of the embedded towers,
where an image is little and the steps around it weigh more.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Measured, Row, in_turns
from PIL import Image
from torch import Tensor

from cairn.data.folders import FolderImages
from cairn.data.loading import Loader
from cairn.towers.preprocessing import Preprocessing

SIZES = {
    "full": {"images": 2000, "repeats": 5, "later_repeats": 31},
    "quick": {"images": 400, "repeats": 1, "later_repeats": 15},
    "tiny": {"images": 12, "repeats": 1, "later_repeats": 1},
}
BATCH, RESOLUTION, SMALL = 128, 224, 56
FILE = 256
"""Height and width of the files."""


class Plain:
    """The plain form of a loader: a dictionary of prepared images, a thread to a batch, a stack image by image."""

    def __init__(self, images: FolderImages, prepare: Callable[[Any], Tensor], *, workers: int):
        self.images, self.prepare, self.workers = images, prepare, workers
        self.kept: dict[int, Tensor] = {}

    def _stack(self, indices: list[int]) -> Tensor:
        for i in indices:
            if i not in self.kept:
                self.kept[i] = self.prepare(self.images[i])
        return torch.stack([self.kept[i] for i in indices])

    def epoch(self, rng: torch.Generator) -> Iterator[Tensor]:
        with ThreadPoolExecutor(self.workers) as pool:
            ahead: deque = deque()
            for chunk in torch.randperm(len(self.images), generator=rng).split(BATCH):
                ahead.append(pool.submit(self._stack, chunk.tolist()))
                if len(ahead) > 2:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def drawn_files(folder: Path, number: int) -> FolderImages:
    """JPEGs of soft colours with grain: about as large, and as long to decode, as photographs of that size."""
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(number)]
    for name in names:
        soft = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((FILE, FILE), Image.BICUBIC)
        grainy = np.asarray(soft) + rng.normal(0, 6, (FILE, FILE, 1))
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
    return FolderImages(folder, ["."], names, np.zeros(number, dtype=np.int64))


def ordered() -> torch.Generator:
    """The same order for every form."""
    return torch.Generator().manual_seed(0)


def unchanged(prepared: Tensor) -> Tensor:
    return prepared


def read(batches: Iterator[Any]) -> int:
    """Batches read to the end."""
    return sum(1 for _ in batches)


def measured(images: int, repeats: int, later_repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        files = drawn_files(Path(folder), images)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / images
        return {"images": images, "file_bytes": size} | compared(files, repeats, later_repeats)


def compared(files: FolderImages, repeats: int, later_repeats: int) -> dict[str, Any]:
    prepare = Preprocessing(size=RESOLUTION).prepare
    whole = len(files) * prepare(files[0]).nbytes

    def fresh(images: FolderImages = files, workers: int | None = None, size: int = RESOLUTION) -> Loader:
        """Nothing opened yet, and room for everything."""
        return Loader(
            images, Preprocessing(size=size).prepare, unchanged, batch=BATCH, workers=workers, cache_bytes=whole
        )

    workers, few = fresh().workers, FolderImages(files.root, files.folders, files.names[:BATCH], files.labels[:BATCH])
    opening = in_turns(
        {
            "one worker": lambda: read(fresh(workers=1).epoch(ordered())),
            "all workers": lambda: read(fresh().epoch(ordered())),
        },
        repeats,
        warm=False,
    )
    first = in_turns(
        {
            "by one thread": lambda: read(Plain(few, prepare, workers=workers).epoch(ordered())),
            "by all workers": lambda: read(fresh(few).epoch(ordered())),
        },
        repeats,
        warm=False,
    )
    found = {"opening": opening, "first batch": first}
    same = True
    for size in (RESOLUTION, SMALL):
        plain, ours = Plain(files, Preprocessing(size=size).prepare, workers=workers), fresh(size=size)
        for expected, (got, _) in zip(plain.epoch(ordered()), ours.epoch(ordered()), strict=True):
            same &= torch.equal(expected, got)
        found[f"kept, {size}"] = in_turns(
            {
                "stacked image by image": lambda plain=plain: read(plain.epoch(ordered())),
                "picked from one array": lambda ours=ours: read(ours.epoch(ordered())),
            },
            later_repeats,
        )
        for expected, (got, _) in zip(plain.epoch(ordered()), ours.epoch(ordered()), strict=True):
            same &= torch.equal(expected, got)
    return {"workers": workers, "equal": same} | {what: told(taken, len(files)) for what, taken in found.items()}


def told(taken: dict[str, Measured], images: int) -> dict[str, Any]:
    return {
        way: {"seconds": own.seconds, "all_seconds": own.all_seconds, "images_per_second": images / own.seconds}
        for way, own in taken.items()
    }


def rows(report: dict[str, Any]) -> list[Row]:
    same = "bit for bit" if report["equal"] else "OTHER BATCHES"
    number, workers = f"{report['images']:,}", f"{report['workers']} worker{'s' * (report['workers'] > 1)}"
    items = {
        "opening": f"first epoch of {number} JPEGs of {FILE} x {FILE}, for {RESOLUTION} x {RESOLUTION}",
        "first batch": f"a first batch of such files, {min(BATCH, report['images'])} images",
        f"kept, {RESOLUTION}": f"a later epoch, {number} kept images of {RESOLUTION} x {RESOLUTION}",
        f"kept, {SMALL}": f"a later epoch, {number} kept images of {SMALL} x {SMALL}",
    }
    made = []
    for key, item in items.items():
        (plain, theirs), (ours, own) = report[key].items()
        rate = (
            ""
            if key == "first batch"
            else f"; {own['images_per_second']:,.0f} images/s ({theirs['images_per_second']:,.0f})"
        )
        made.append(
            Row(item, plain, theirs["seconds"], ours.replace("all workers", workers), own["seconds"], equal=same + rate)
        )
    return made

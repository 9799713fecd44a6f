"""From lazy images to batches of tensors: opened off the main thread, once if they fit in memory."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cairn.data.task import Images
from cairn.errors import InvalidInput

AHEAD = 3
"""Batches under way when one is asked for; the others still are while that one is in use."""

MOST_WORKERS = 8
"""Threads share Python's lock between the calls that decode and resize: more of them would mostly wait for it."""

LEAST_KEPT, MOST_KEPT = 256 << 20, 8 << 30
UNKNOWN_MEMORY = 1 << 30
"""Taken for available where the system does not tell."""


def usable_cores() -> int:
    """Cores that this process may run on, which in a container or a batch job can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that is not in use now. On Linux what the system would give back of its file cache counts as available: once
    many images were read, almost nothing else would be."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return UNKNOWN_MEMORY


def room_for_images() -> int:
    """Bytes of prepared images that a loader keeps if nobody says how many: a quarter of the available memory, but at
    least 256 MiB and at most 8 GiB."""
    # Loaders of training images and of test images live at once, each with a quarter of what is left when it asks: that
    # never adds up to all of it. 256 MiB (1,700 images of 224 x 224) are less than the towers take themselves; in
    # 8 GiB are 57,000 images, more than most tasks have, and the rest of a large machine belongs to others.
    return min(MOST_KEPT, max(LEAST_KEPT, available_bytes() // 4))


class Loader:
    """Batches of a collection, as a tower takes them.

    `prepare` turns an opened item into what is kept (uint8 at the tower's resolution), `pixels` a stack of those into
    the tower's input. Prepared items are kept while they fit into `cache_bytes`, so that only the first epoch decodes.
    `waited` counts the seconds that whoever iterates stood still because a batch was not there yet.

    Processes that learn side by side share batches out: of whole ones, number b is for process b modulo their number, and of
    a batch in an epoch each has a part of the rows. An item is kept by the process that its batch in order is for.
    """

    def __init__(
        self,
        images: Images,
        prepare: Callable[[Any], Tensor],
        pixels: Callable[[Tensor], Tensor],
        *,
        batch: int = 128,
        workers: int | None = None,
        cache_bytes: int | None = None,
    ):
        self.images, self.batch = images, batch
        self.workers = workers or min(usable_cores(), MOST_WORKERS)
        self.labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        self.waited = 0.0
        self._prepare, self._pixels, self._cache_bytes = prepare, pixels, cache_bytes
        # Row i is item i, for as many of the first items as fit. Made with the first item, which knows the shape. Numpy
        # copies rows in the thread that asks, where torch would give every worker a team of threads of its own, and takes
        # large arrays in large pages.
        self._kept: np.ndarray | None = None
        self._filled = np.zeros(len(images), dtype=bool)
        self._making = threading.Lock()

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def prepared(self, index: int) -> Tensor:
        """The item as it is kept. Raises InvalidInput, which names it, for what is no picture."""
        item = self.images[index]
        try:
            return self._prepare(item)
        except InvalidInput as error:
            raise InvalidInput(f"{self.images.describe(index)}: {error}") from None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.ordered()

    def ordered(self, skip: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """In the collection's own order, of all but the first `skip` batches every `step`-th."""
        order = np.arange(len(self.images))
        return self._batches(map(_Rows, self._cut(order, skip, step)))

    def epoch(self, rng: torch.Generator, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """In an order drawn from `rng`, all but the first `skip` batches."""
        return self._epoch(rng, skip, (0, 1))

    def epochs(
        self, rngs: Sequence[torch.Generator], skip: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """One epoch for each generator; of the first one, `skip` batches are left out. With `share` (number, of how many) only
        that part of every batch is opened; a part without rows has no pixels."""
        return (self._epoch(rng, 0 if i else skip, share) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator, skip: int, share: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=rng).numpy()
        return self._batches(self._part(rows, *share) for rows in self._cut(order, skip))

    def _cut(self, order: np.ndarray, skip: int, step: int = 1) -> Iterator[np.ndarray]:
        """The indices of each batch."""
        starts = range(skip * self.batch, len(order), step * self.batch)
        return (order[start : start + self.batch] for start in starts)

    def _part(self, indices: np.ndarray, number: int, parts: int) -> _Rows:
        """One of `parts` equal parts of a batch, as far as that goes of the items that this process keeps."""
        if parts == 1:
            return _Rows(indices)
        home = indices // self.batch % parts
        part = np.array_split(np.argsort(home, kind="stable"), parts)[number]
        return _Rows(indices[part], home[part] == number)

    def _batches(self, batches: Iterator[_Rows]) -> Iterator[tuple[Tensor, Tensor]]:
        pool = ThreadPoolExecutor(self.workers)
        ahead: deque[_Batch] = deque()
        try:
            for rows in batches:
                ahead.append(_Batch(self, rows, pool))
                if len(ahead) == AHEAD:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next(self, ahead: deque[_Batch]) -> tuple[Tensor, Tensor]:
        batch = ahead.popleft()
        began = time.perf_counter()
        try:
            stack = batch.result()
        finally:
            self.waited += time.perf_counter() - began
        labels = self.labels[torch.from_numpy(batch.indices)]
        return self._pixels(stack) if len(labels) else stack, labels

    def _rows(self, like: np.ndarray) -> np.ndarray:
        """Where items like this one are kept. Memory is taken page by page as rows are written, not here."""
        with self._making:
            if self._kept is None:
                room = room_for_images() if self._cache_bytes is None else self._cache_bytes
                rows = min(len(self.images), room // max(1, like.nbytes))
                self._kept = np.empty((rows, *like.shape), like.dtype)
            return self._kept


class _Rows(NamedTuple):
    """Items of a batch, and which of them are to be kept: all, or those marked."""

    indices: np.ndarray
    keep: np.ndarray | None = None


class _Batch:
    """Items on their way to being a stack. The missing ones are shared out to all workers, so that the batch is there
    sooner; the worker that is done last puts it together."""

    def __init__(self, loader: Loader, rows: _Rows, pool: ThreadPoolExecutor):
        self.loader, (self.indices, self.keep) = loader, rows
        self._passing: dict[int, np.ndarray] = {}
        self._stack = torch.empty(0)
        self._lock = threading.Lock()
        missing = np.flatnonzero(~loader._filled[self.indices])
        share = max(1, -(-len(missing) // loader.workers))
        # Where nothing is missing there is one part, an empty one: the stack is made off the main thread all the same
        parts = [missing[start : start + share] for start in range(0, max(1, len(missing)), share)]
        self._left = len(parts)
        self._parts: list[Future] = [pool.submit(self._work, part) for part in parts]

    def result(self) -> Tensor:
        """The stack, when it is there. An item that cannot be opened raises its own error, the first item first."""
        for part in self._parts:
            part.result()
        return self._stack

    def _work(self, part: np.ndarray) -> None:
        self._open(part)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._stack = self._together()

    def _open(self, part: np.ndarray) -> None:
        """Open the items at these positions of the batch: into their row, or where there is none, for this batch alone."""
        loader = self.loader
        for position, index in zip(part.tolist(), self.indices[part].tolist(), strict=True):
            prepared = loader.prepared(index).numpy()
            kept = loader._rows(like=prepared)
            if index < len(kept) and (self.keep is None or self.keep[position]):
                kept[index] = prepared
                loader._filled[index] = True
            else:
                self._passing[position] = prepared

    def _together(self) -> Tensor:
        kept = self.loader._kept
        if kept is None or not len(self.indices):
            return torch.empty(0)
        stack = _rows_for_device((len(self.indices), *kept.shape[1:]), kept.dtype)
        rows = stack.numpy()
        if not self._passing:
            # No index is out of range, and only where those are clipped does numpy write into `rows` at once
            np.take(kept, self.indices, axis=0, out=rows, mode="clip")
            return stack
        inside = self.indices < len(kept)
        rows[inside] = kept[self.indices[inside]]
        for position, prepared in self._passing.items():
            rows[position] = prepared
        return stack


def _rows_for_device(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """Uninitialised memory for a batch. Where an accelerator is in use it is page-locked: a copy to the device then needs no
    stop on the way, and the processor goes on meanwhile."""
    if torch.cuda.is_initialized():
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype))

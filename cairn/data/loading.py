"""From lazy images to batches of tensors: opened off the main thread, once if they fit in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cairn.data.images import Images

CACHE_BYTES = 1 << 30


class Loader:
    """Batches of a collection, as a tower takes them.

    `prepare` turns an opened item into what is kept (uint8 at the tower's resolution), `pixels` a stack of those into
    the tower's input. Prepared items are kept while they fit into `cache_bytes`, so that only the first epoch decodes.
    """

    def __init__(
        self,
        images: Images,
        prepare: Callable[[Any], Tensor],
        pixels: Callable[[Tensor], Tensor],
        *,
        batch: int = 128,
        workers: int = 2,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.images, self.batch, self.workers = images, batch, workers
        self.labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        self._prepare, self._pixels = prepare, pixels
        self._kept: dict[int, Tensor] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def _open(self, index: int) -> Tensor:
        if (kept := self._kept.get(index)) is not None:
            return kept
        prepared = self._prepare(self.images[index])
        size = prepared.numel() * prepared.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[index] = prepared
        return prepared

    def _stack(self, indices: list[int]) -> Tensor:
        return torch.stack([self._open(i) for i in indices])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """In the collection's own order."""
        return self._batches(torch.arange(len(self.images)))

    def epoch(self, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """In an order drawn from `rng`."""
        return self._batches(torch.randperm(len(self.images), generator=rng))

    def epochs(self, rngs: Sequence[torch.Generator]) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        return map(self.epoch, rngs)

    def _batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = iter(order.split(self.batch))
        with ThreadPoolExecutor(self.workers) as pool:
            ahead: deque = deque()
            try:
                for chunk in chunks:
                    ahead.append((chunk, pool.submit(self._stack, chunk.tolist())))
                    if len(ahead) > self.workers:
                        yield self._next(ahead)
                while ahead:
                    yield self._next(ahead)
            finally:
                for _, future in ahead:
                    future.cancel()

    def _next(self, ahead: deque) -> tuple[Tensor, Tensor]:
        chunk, future = ahead.popleft()
        return self._pixels(future.result()), self.labels[chunk]


@torch.no_grad()
def encoded(loader: Loader, image: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings (n x d, as `image` gives them) and labels (n) of the whole collection, in its order, on the CPU."""
    pairs = [(image(pixels).cpu(), labels) for pixels, labels in loader]
    return torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs])

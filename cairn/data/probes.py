"""Images that no task holds, made of those that it does: they show how an encoder moves where its images are not.

An encoder's motion is a property of the encoder, not of the data: any image shows it. Old classes lie where the current
images are not, so the motion there is better asked for than extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations

import torch
from torch import Tensor

from cairn.data.loading import Loader
from cairn.types import Pixels

EXCHANGES = torch.tensor([order for order in permutations(range(3)) if order != (0, 1, 2)])
"""The five ways to exchange colour channels."""


@dataclass(frozen=True)
class Probes:
    """`copies` altered copies of every image of a loader, in its order, the same every time they are asked for.

    A copy has its colour channels exchanged, and half of it comes from another copy. Altered are the tower's pixels, batch
    by batch: nothing is decoded twice where the loader keeps images.
    """

    loader: Loader
    copies: int
    draws: Callable[[int], torch.Generator]
    """The randomness of copy number c, afresh at each call."""

    @property
    def labels(self) -> Tensor:
        """Those of the images that the probes were made of."""
        return self.loader.labels.repeat(self.copies)

    def __iter__(self) -> Iterator[tuple[Pixels, Tensor]]:
        for copy in range(self.copies):
            rng = self.draws(copy)
            for pixels, labels in self.loader:
                yield halved(exchanged(pixels, rng), rng), labels

    def ordered(self, skip: int = 0, step: int = 1) -> Iterator[tuple[Pixels, Tensor]]:
        """Of all but the first `skip` batches every `step`-th; the others are made and passed over, since what follows depends
        on their draws."""
        return islice(iter(self), skip, None, step)


def exchanged(pixels: Pixels, rng: torch.Generator) -> Pixels:
    """Every image with its colour channels in another order, one of the five at random."""
    order = EXCHANGES[torch.randint(len(EXCHANGES), (len(pixels),), generator=rng)].to(pixels.device)
    return pixels.gather(1, order[:, :, None, None].expand_as(pixels))


def halved(pixels: Pixels, rng: torch.Generator) -> Pixels:
    """Every image with one half (upper, lower, left or right, at random) from another image of the batch."""
    n, _, height, width = pixels.shape
    other = pixels[torch.randperm(n, generator=rng).to(pixels.device)]
    which = torch.randint(4, (n,), generator=rng)
    rows, columns = torch.arange(height)[:, None] < height // 2, torch.arange(width)[None] < width // 2
    halves = torch.stack([m.expand(height, width) for m in (rows, ~rows, columns, ~columns)])
    return torch.where(halves[which][:, None].to(pixels.device), other, pixels)

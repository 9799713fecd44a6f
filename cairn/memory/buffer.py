"""Prepared items of a stream that is seen once, at most so many of them: a sample of what came by.

Unlike the other memories it holds images as they are. So it belongs to a method's own state, and what is in it is declared.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from cairn.maths.rows import without
from cairn.types import Labels

Insertion: TypeAlias = Literal["balanced", "reservoir"]
"""Which items stay when there is no room for all: as many of each class, or each with the same chance."""


class Buffer:
    """Items with their labels, and how many of each class came by. Immutable: `add` and `without` return others."""

    def __init__(
        self,
        capacity: int,
        insertion: Insertion = "balanced",
        items: Shaped[Tensor, "m ..."] | None = None,
        labels: Int[Tensor, " m"] | None = None,
        seen: Int[Tensor, " k"] | None = None,
    ):
        self.capacity = capacity
        self.insertion: Insertion = insertion
        self.items = torch.zeros(0) if items is None else items
        self.labels: Tensor = torch.zeros(0, dtype=torch.int64) if labels is None else labels
        self.seen: Tensor = torch.zeros(0, dtype=torch.int64) if seen is None else seen

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def bytes(self) -> int:
        return self.items.nbytes + self.labels.nbytes + self.seen.nbytes

    def add(self, items: Shaped[Tensor, "n ..."], labels: Labels, rng: torch.Generator) -> Buffer:
        """With these items, one after the other, as far as they stay. While there is room all do.

        `reservoir`: item number t of all takes the place of number j, j drawn from 1..t, if j <= capacity.
        Source: Vitter 1985, Random Sampling with a Reservoir, algorithm R.

        `balanced`: an item of a class that never lost one, and is not among the largest, takes the place of any item of a
        largest class. Of any other class, m of whose t items are held, it enters with chance m / t in place of one of its own.
        Source: Chrysakis and Moens 2020, Online Continual Learning from Imbalanced Data, algorithm 1; there a class that was
        among the largest once counts as such for good, here from when it lost an item.
        """
        held, sources = self.labels.tolist(), list(range(len(self)))
        seen = torch.cat([self.seen, self.seen.new_zeros(max(0, _classes(labels) - len(self.seen)))])
        for i, c in enumerate(labels.tolist(), start=len(self)):
            seen[c] += 1
            place = self._place(c, held, seen, rng)
            if place == len(held):
                held.append(c)
                sources.append(i)
            elif place is not None:
                held[place], sources[place] = c, i
        whole = torch.cat([self.items, items]) if len(self) else items
        return Buffer(self.capacity, self.insertion, whole[sources], torch.tensor(held, dtype=torch.int64), seen)

    def _place(self, c: int, held: list[int], seen: Int[Tensor, " k"], rng: torch.Generator) -> int | None:
        """Where an item of class c goes, counted in `seen` already; None: nowhere."""
        if len(held) < self.capacity:
            return len(held)
        if self.insertion == "reservoir":
            drawn = _below(int(seen.sum()), rng)
            return drawn if drawn < self.capacity else None
        sizes = torch.tensor(held).bincount(minlength=len(seen))
        own, largest = int(sizes[c]), int(sizes.max())
        if own < largest and own == int(seen[c]) - 1:
            there = sizes[held] == largest
        elif _below(int(seen[c]), rng) < own:
            there = torch.tensor(held) == c
        else:
            return None
        places = there.nonzero()[:, 0]
        return int(places[_below(len(places), rng)])

    def draw(self, number: int, rng: torch.Generator) -> Int[Tensor, " r"]:
        """Places of `number` items, none twice and of each class as many as of the others as far as it has them; all places
        where there are no more."""
        mixed = torch.randperm(len(self), generator=rng)
        by_class = mixed[self.labels[mixed].argsort(stable=True)]
        _, sizes = self.labels.unique(return_counts=True)
        turn = torch.cat([torch.arange(n) for n in sizes.tolist()]) if len(self) else by_class
        # Of every turn one item of each class, and classes in a random order in each
        among = torch.randperm(len(self), generator=rng)
        return by_class[among[turn[among].argsort(stable=True)]][:number]

    def without(self, c: int) -> Buffer:
        """With class c gone and later ones one number lower."""
        kept = self.labels != c
        labels = self.labels[kept]
        labels = labels - (labels > c).long()
        return Buffer(self.capacity, self.insertion, self.items[kept], labels, without(self.seen, c))

    def state_dict(self) -> dict[str, Tensor]:
        return {"items": self.items, "labels": self.labels, "seen": self.seen}

    def restored(self, state: dict[str, Tensor]) -> Buffer:
        """The buffer whose `state_dict` this is, with the capacity and insertion of this one."""
        return Buffer(self.capacity, self.insertion, state["items"], state["labels"], state["seen"])


def _classes(labels: Tensor) -> int:
    return int(labels.max()) + 1 if len(labels) else 0


def _below(number: int, rng: torch.Generator) -> int:
    """0 .. number - 1, each with the same chance."""
    return int(torch.randint(number, (), generator=rng))

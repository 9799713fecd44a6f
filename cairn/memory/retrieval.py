"""Nearest rows of a memory: exact search by torch, approximate search by faiss, behind one protocol.

Letters: n queries, m rows of the memory, K neighbours, d width. Rows and queries have length 1; near is a large cosine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from cairn.errors import ConfigError
from cairn.settings import Given
from cairn.storage.distribution import extra_remedy

CHUNK_VALUES = 2**24
"""Cosines that are held at once, 64 MiB: there is never a matrix of all queries and all rows."""


class Neighbours(NamedTuple):
    """Row numbers and their cosines, nearest first. Where there are fewer than K, number 0 with a cosine of -inf."""

    numbers: Int[Tensor, "n K"]
    cosines: Float[Tensor, "n K"]

    def present(self, floor: float) -> Bool[Tensor, "n K"]:
        """Which of them there are, with a cosine of at least `floor`."""
        return self.cosines >= floor


@runtime_checkable
class Index(Protocol):
    """Rows, prepared to be searched."""

    def nearest(self, queries: Float[Tensor, "n d"], number: int) -> Neighbours:
        """The `number` nearest rows of each query, all rows where there are no more."""
        ...


class Exact(Given):
    """Every row is compared."""

    kind: Literal["exact"] = Field(default="exact", description="every row is compared")

    def index(self, rows: Float[Tensor, "m d"]) -> Index:
        return _Rows(rows)


class Approximate(Given):
    """Rows lie in lists around k-means centres, and those of the nearest lists are compared. Needs faiss."""

    kind: Literal["approximate"] = Field(
        default="approximate", description="rows of the nearest lists alone are compared; needs faiss"
    )
    lists: int | None = Field(default=None, ge=1, description="lists; null: the root of the number of rows")
    probes: int = Field(default=16, ge=1, description="lists that are searched")

    def index(self, rows: Float[Tensor, "m d"]) -> Index:
        """Raises ConfigError without faiss."""
        return _Lists(rows, self.lists or max(1, round(len(rows) ** 0.5)), self.probes) if len(rows) else _Rows(rows)


Search: TypeAlias = Exact | Approximate


class _Rows:
    def __init__(self, rows: Float[Tensor, "m d"]):
        self.rows = rows

    def nearest(self, queries: Float[Tensor, "n d"], number: int) -> Neighbours:
        """Of the product of queries and rows, some queries and some rows at a time, the largest entries of each line."""
        number = min(number, len(self.rows))
        best = [queries.new_empty(0, number)]
        numbers = [torch.empty(0, number, dtype=torch.int64, device=queries.device)]
        some_rows = max(1, min(len(self.rows), CHUNK_VALUES // 16))
        for some in queries.split(max(1, CHUNK_VALUES // some_rows)):
            value = some.new_empty(len(some), 0)
            place = torch.empty(len(some), 0, dtype=torch.int64, device=some.device)
            for start in range(0, len(self.rows), some_rows):
                found = some @ self.rows[start : start + some_rows].to(some).T
                here, at = found.topk(min(number, found.shape[1]), 1)
                value, place = torch.cat([value, here], 1), torch.cat([place, at + start], 1)
                value, at = value.topk(min(number, value.shape[1]), 1)
                place = place.gather(1, at)
            best.append(value)
            numbers.append(place)
        return Neighbours(torch.cat(numbers), torch.cat(best))


class _Lists:
    def __init__(self, rows: Float[Tensor, "m d"], lists: int, probes: int):
        faiss = _faiss()
        self.size, lists = len(rows), min(lists, len(rows))
        values = rows.detach().cpu().float().contiguous().numpy()
        self.index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT
        )
        self.index.cp.min_points_per_centroid = 1
        self.index.train(values)
        self.index.add(values)
        self.index.nprobe = min(probes, lists)

    def nearest(self, queries: Float[Tensor, "n d"], number: int) -> Neighbours:
        number = min(number, self.size)
        if not number or not len(queries):
            return Neighbours(
                torch.zeros(len(queries), number, dtype=torch.int64), queries.new_zeros(len(queries), number)
            )
        cosines, numbers = self.index.search(queries.detach().cpu().float().contiguous().numpy(), number)
        found = torch.from_numpy(numbers)
        value = torch.from_numpy(cosines).masked_fill(found < 0, -torch.inf)
        return Neighbours(found.clamp(min=0).to(queries.device), value.to(queries))


def _faiss() -> Any:
    try:
        return import_module("faiss")
    except ImportError:
        raise ConfigError(
            f"search=approximate: faiss is missing; {extra_remedy('search')}, or set search=exact"
        ) from None


def nearest_others(index: Index, queries: Float[Tensor, "n d"], own: Int[Tensor, " n"], number: int) -> Neighbours:
    """The `number` nearest rows of each query but its own, row number own_i: what leaving one out asks for.

    One more is looked for, and the own row is taken out, or the last one where it is not among them.
    """
    found = index.nearest(queries, number + 1)
    if not found.numbers.shape[1]:
        return found
    mine = (found.numbers == own[:, None]) & found.cosines.isfinite()
    mine[:, -1] |= ~mine.any(1)
    kept = (~mine).nonzero()[:, 1].view(len(queries), -1)
    return Neighbours(found.numbers.gather(1, kept), found.cosines.gather(1, kept))


def text_neighbours(
    T: Float[Tensor, "k d"],
    U: Float[Tensor, "g d"],
    rows: Float[Tensor, "m d"],
    groups: Int[Tensor, " m"],
    number: int,
) -> Neighbours:
    """The `number` rows j of largest t . u_j for each text t, u_j = U[groups_j]; among rows of one text those of largest t . row.

    Their cosines are those of texts, t . u_j. Rows of one class share a text, so whole groups are gone through in the order of their
    texts until there are enough rows: of a million rows only those of a few groups are looked at.
    """
    sizes = groups.bincount(minlength=len(U))
    by_group = groups.argsort(stable=True)
    start = sizes.cumsum(0) - sizes
    likeness = T @ U.T
    number = min(number, len(rows))
    numbers = torch.zeros(len(T), number, dtype=torch.int64, device=T.device)
    cosines = T.new_full((len(T), number), -torch.inf)
    for c, order in enumerate(likeness.argsort(dim=1, descending=True, stable=True).tolist()):
        filled = 0
        for g in order:
            if filled == number:
                break
            own = by_group[start[g] : start[g] + sizes[g]]
            if not len(own):
                continue
            best = own[(rows[own] @ T[c]).topk(min(number - filled, len(own))).indices]
            numbers[c, filled : filled + len(best)] = best
            cosines[c, filled : filled + len(best)] = likeness[c, g]
            filled += len(best)
    return Neighbours(numbers, cosines)

"""Search of a memory: milliseconds for one query, exact and approximate, by the number of rows.

    python benchmarks/run.py --only retrieval --out results/benchmarks --into docs

Unit rows of 512 numbers in clusters, as classes make them, and queries from the same clusters, one at a time as in serving; the 10
nearest. Approximate is faiss with its defaults here: as many lists as the root of the number of rows, 16 of them searched. Recall is
the share of the 10 nearest that it finds.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

import torch
from measure import Row, in_turns, machine_line, seconds_cell, surroundings
from torch import Tensor

from cairn.maths.similarity import unit
from cairn.memory.retrieval import Approximate, Exact, Index

SIZES = {
    "full": {"numbers": (1_000, 100_000, 1_000_000), "queries": 100, "repeats": 3},
    "quick": {"numbers": (1_000, 10_000), "queries": 50, "repeats": 1},
}
WIDTH, NEIGHBOURS, PER_CLUSTER = 512, 10, 50


def rows_and_queries(number: int, queries: int) -> tuple[Tensor, Tensor]:
    """Rows made some at a time, so that no second copy of a million of them is held."""
    rng = torch.Generator().manual_seed(number)
    centres = torch.randn(max(1, number // PER_CLUSTER), WIDTH, generator=rng)

    def near(n: int) -> Tensor:
        which = torch.randint(len(centres), (n,), generator=rng)
        return unit(centres[which] + torch.randn(n, WIDTH, generator=rng))

    rows = torch.empty(number, WIDTH)
    for some in torch.arange(number).split(10_000):
        rows[some[0] : some[-1] + 1] = near(len(some))
    return rows, near(queries)


def one_by_one(index: Index, queries: Tensor) -> Tensor:
    return torch.cat([index.nearest(query, NEIGHBOURS).numbers for query in queries.split(1)])


def measured(numbers: tuple[int, ...], queries: int, repeats: int) -> dict[str, Any]:
    found = {}
    for number in numbers:
        rows, asked = rows_and_queries(number, queries)
        indices, built = {}, {}
        for name, search in (("exact", Exact()), ("approximate", Approximate())):
            mark = perf_counter()
            indices[name] = search.index(rows)
            built[name] = perf_counter() - mark
        ways = {name: partial(one_by_one, index, asked) for name, index in indices.items()}
        both = in_turns(ways, repeats)
        pairs = zip(both["exact"].value.tolist(), both["approximate"].value.tolist(), strict=True)
        found[str(number)] = {
            "exact": both["exact"].seconds / queries,
            "approximate": both["approximate"].seconds / queries,
            "built": built["approximate"],
            "recall": sum(len({*a} & {*b}) for a, b in pairs) / (NEIGHBOURS * queries),
        }
    return {"by_number": found} | surroundings()


def rows(report: dict[str, Any]) -> list[Row]:
    return [
        Row(
            item=f"the {NEIGHBOURS} nearest of {int(number):,} rows, one query",
            plain="exact, torch",
            plain_amount=one["exact"],
            ours="approximate, faiss",
            amount=one["approximate"],
            equal=f"recall {one['recall']:.3f}",
        )
        for number, one in report["by_number"].items()
    ]


def table(report: dict[str, Any]) -> str:
    lines = ["| rows | exact | approximate | recall | lists made in |", "|---|---|---|---|---|"]
    for number, one in report["by_number"].items():
        times = [seconds_cell(one[name]) for name in ("exact", "approximate")]
        lines.append(
            f"| {int(number):,} | {times[0]} | {times[1]} | {one['recall']:.3f} | {seconds_cell(one['built'])} |"
        )
    return "\n".join([*lines, "", machine_line(report)])

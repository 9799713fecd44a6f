"""Blend against other methods over several class orders, paired: the runs of further orders, and the table of differences.

    python experiments/orders.py [--only STREAM[/METHOD]] [--list]
    python experiments/orders.py --table      # only write the table into docs/blend.md from what is stored

Runs of the usual order are those of `experiments/results.py`; those of others lie in `results/orders/STREAM/METHOD/ORDER`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rows import EVERY, METHOD_ROWS, THREE, variant
from stored import write_block
from streams import ROOT, STREAMS

from cairn.reports.formats import Column, Interval, Table
from cairn.reports.tables import COMPARED, Result, gains, results_below
from results import missing, run

FIVE, TWO = ("seed:1994", "seed:1995", "seed:1996", "seed:1997"), ("seed:1994", "seed:1995")
"""Orders beside the usual one: embeddings are cheap, images are not."""

NEAREST = ("zero-shot", "lda", "ranpac", "engine", "clipood", "dmc", "spa")


UCF = ("simplecil", "acil", "aper", "calfuse", "dmc", "spa", "rapf")
"""What is run on UCF-101 beside those in five orders; it has no class texts."""


def others(rows: Sequence[str], *elsewhere: str) -> tuple[str, ...]:
    """The rows but blend and `elsewhere`."""
    return tuple(row for row in rows if row not in ("blend", *elsewhere))


RIVALS = {
    "shapes": {FIVE: ("ranpac",)},
    "cifar100": {TWO: ("ranpac",)},
    "cifar100-b50": {TWO: others(METHOD_ROWS["cifar100-b50"])},
    "ucf101": {FIVE: ("lda", "ranpac", "engine"), TWO: UCF},
    **{
        stream: {FIVE: (*NEAREST, "dmc-ot"), TWO: others(EVERY, *NEAREST, "dmc-ot", *without)}
        for stream, without in {"caltech51": ["joint"], **{f"caltech51-{n}": [] for n in (1, 2, 4, 8)}}.items()
    },
    "imagenet150": {FIVE: NEAREST, TWO: others(METHOD_ROWS["imagenet150"], *NEAREST)},
}
"""In five orders what comes nearest to blend in some, and zero-shot, where the stream has texts; in three every method on the
streams of few pictures and that which begins with half of the classes, and what learns within minutes on UCF-101."""


def jobs() -> list[tuple[str, str, str, list[str], str]]:
    found = []
    for stream, by_orders in RIVALS.items():
        most = max(by_orders, key=len)
        for orders, rivals in by_orders.items():
            for folder in (*rivals, *(["blend"] if orders is most else [])):
                method, settings = variant(stream, folder)
                for order in orders:
                    found.append((stream, f"{folder}/{order.removeprefix('seed:')}", method, settings, THREE))
    return found


def with_order(job: tuple[str, str, str, list[str], str]) -> tuple[str, str, str, list[str], str]:
    """The job as `results.run` takes it: a stream of its own, in this order."""
    stream, folder, *rest = job
    name, order = f"orders/{stream}", f"seed:{folder.split('/')[1]}"
    words = list(STREAMS[stream])
    if "--order" in words:
        words[words.index("--order") + 1] = order
    else:
        words += ["--order", order]
    STREAMS[name] = words
    return (name, folder, *rest)


def stored(stream: str, method: str) -> list[Result]:
    """The runs of every order."""
    places = [ROOT / "results" / stream / method, ROOT / "results" / "orders" / stream / method]
    return results_below([place for place in places if place.is_dir()])


def table() -> str:
    """What blend gains over each method on each stream, first in last accuracy, then in average."""
    found: dict[str, dict[str, list[Interval | None]]] = {}
    for stream, by_orders in RIVALS.items():
        for method in chain.from_iterable(by_orders.values()):
            if (ROOT / "results" / "orders" / stream / method).is_dir():
                found.setdefault(method, {})[stream] = gains(stored(stream, "blend"), stored(stream, method))
    rows = [row for row in dict.fromkeys((*EVERY, *found)) if row in found]
    parts = []
    for figure in ("last", "average"):
        place = COMPARED.index(figure)
        cells = [
            [row, *(cell(found[row][stream][place] if stream in found[row] else None) for stream in RIVALS)]
            for row in rows
        ]
        parts.append(Table([Column(f"{figure}: blend over"), *map(Column, RIVALS)], cells).markdown())
    return "\n\n".join(parts)


def cell(gain: Interval | None) -> str:
    """In points; behind it half of the interval."""
    return "" if gain is None else f"{gain.mean:+.2f} ± {gain.high - gain.mean:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/method")
    parser.add_argument("--list", action="store_true", help="name the runs alone")
    parser.add_argument("--table", action="store_true", help="write the table from what is stored")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "blend.md", help="the page")
    args = parser.parse_args()
    if not args.table:
        for job in jobs():
            if args.only not in (None, job[0], f"{job[0]}/{job[1].split('/')[0]}"):
                continue
            ordered = with_order(job)
            if args.list:
                print(*ordered[:2])
            elif missing(ordered):
                print(f"skipped, no data: {job[0]}")
            elif run(ordered, cache=True):
                raise SystemExit(f"{job[0]}/{job[1]} failed")
    if not args.list:
        write_block(args.into, "orders", table())


if __name__ == "__main__":
    main()

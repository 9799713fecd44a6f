"""Blend against other methods over several class orders, paired: the runs of further orders, and the table of differences.

    python experiments/orders.py [--only STREAM[/METHOD]] [--list]
    python experiments/orders.py --table      # only write the table into docs/blend.md from what is stored

Runs of the usual order are those of `experiments/results.py`; those of others lie in `results/orders/STREAM/METHOD/ORDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rows import THREE
from stored import write_block
from streams import DESCRIBED, ROOT, STREAMS

from cairn.reports.tables import Result, gains_table, results_below
from results import missing, run

FIVE, TWO = ("seed:1994", "seed:1995", "seed:1996", "seed:1997"), ("seed:1994", "seed:1995")
"""Orders beside the usual one: embeddings are cheap, images are not."""

EMBEDDED = ("zero-shot", "lda", "ranpac", "engine")
RIVALS = {
    "shapes": ("ranpac",),
    "cifar100": ("ranpac",),
    "ucf101": ("lda", "ranpac", "engine"),
    "caltech51": (*EMBEDDED, "dmc"),
    "caltech51-1": EMBEDDED,
    "caltech51-2": EMBEDDED,
    "caltech51-4": EMBEDDED,
    "caltech51-8": (*EMBEDDED, "dmc"),
    "imagenet150": EMBEDDED,
}
"""What comes nearest to blend in some order, and zero-shot, where the stream has texts."""


def jobs() -> list[tuple[str, str, str, list[str], str]]:
    found = []
    for stream, rivals in RIVALS.items():
        for method in ("blend", *rivals):
            settings = DESCRIBED if method == "engine" and stream == "cifar100" else []
            for order in TWO if stream in ("shapes", "cifar100") else FIVE:
                found.append((stream, f"{method}/{order.removeprefix('seed:')}", method, settings, THREE))
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
    pairs = {}
    for stream, rivals in RIVALS.items():
        for method in rivals:
            if (ROOT / "results" / "orders" / stream / method).is_dir():
                pairs[f"{stream}: blend - {method}"] = (stored(stream, "blend"), stored(stream, method))
    return gains_table(pairs).markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/method")
    parser.add_argument("--list", action="store_true", help="name the runs alone")
    parser.add_argument("--table", action="store_true", help="write the table from what is stored")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "blend.md", help="the page")
    args = parser.parse_args()
    if not args.table:
        for job in jobs():
            if args.only not in (None, job[0], f"{job[0]}/{job[2]}"):
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

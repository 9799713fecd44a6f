"""Every benchmark, one table: what is done in fewer steps here, against its plain form, in the same run and by turns.

    python benchmarks/run.py [--size full|quick|tiny] [--only transport bures] [--out results/benchmarks] [--into docs]

`--out` takes bench.json, growth.png and the two reports that other pages show, `--into` the folder of pages whose tables
are written. `tiny` is there so that a test can run what has such a size.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import alignment
import bures
import calibration
import compiled
import decoding
import draws
import growth
import launches
import loading
import pool
import predicting
import prefix
import prompts
import retrieval
import ridge
import shares
import startup
import transport
import trunk
from measure import machine_line, row_table, stored, surroundings, written

ITEMS = {
    "prefix": prefix,
    "prompts": prompts,
    "trunk": trunk,
    "transport": transport,
    "bures": bures,
    "draws": draws,
    "shares": shares,
    "input": loading,
    "decoding": decoding,
    "compiled": compiled,
    "ridge": ridge,
    "growth": growth,
    "launches": launches,
    "alignment": alignment,
    "calibration": calibration,
    "startup": startup,
    "pool": pool,
    "predicting": predicting,
    "retrieval": retrieval,
}
OWN = ("alignment", "calibration", "startup", "pool", "predicting", "retrieval", "launches", "decoding")
"""Items whose whole report is a file and a table of its own."""


def bench_table(bench: dict[str, Any]) -> str:
    """What stands in the page, from the stored report."""
    lines = [row_table(bench["rows"])]
    if "growth" in bench["items"]:
        lines += ["", "By the number of old classes, d = 512:", "", growth.table(bench["items"]["growth"])]
    size = (
        ""
        if bench["size"] == "full"
        else f" Form: {bench['size']}, fewer repeats and smaller; not the figures to quote."
    )
    return "\n".join([*lines, "", machine_line(bench) + size])


def kept(folder: Path, size: str) -> dict[str, Any]:
    """Reports of an earlier run of that size: `--only` renews some and leaves the others, each item being a run of its own."""
    bench = folder / "bench.json"
    if not bench.exists() or (held := json.loads(bench.read_text(encoding="utf-8")))["size"] != size:
        return {}
    others = {name: folder / f"{name}.json" for name in OWN}
    return held["items"] | {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in others.items() if path.exists()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--only", nargs="+", choices=tuple(ITEMS), help="items; all that have such a size if left out")
    parser.add_argument("--table", action="store_true", help="measure nothing: the pages from the reports in --out")
    parser.add_argument("--out", type=Path, help="folder of the reports")
    parser.add_argument("--into", type=Path, help="folder of the pages")
    args = parser.parse_args()
    if args.table:
        if args.out is None or args.into is None:
            parser.error("--table takes the reports in --out and writes the pages in --into; give both")
        show(kept(args.out, args.size), json.loads((args.out / "bench.json").read_text(encoding="utf-8")), args.into)
        return
    chosen = args.only or [name for name, item in ITEMS.items() if args.size in item.SIZES]
    for name in chosen:
        if args.size not in ITEMS[name].SIZES:
            parser.error(f"--only {name}: it has no size '{args.size}', but {', '.join(ITEMS[name].SIZES)}")

    reports = kept(args.out, args.size) if args.only and args.out else {}
    for name in chosen:
        mark = time.perf_counter()
        reports[name] = ITEMS[name].measured(**ITEMS[name].SIZES[args.size])
        print(f"{name}: {time.perf_counter() - mark:.0f} s", flush=True)

    reports = {name: reports[name] for name in ITEMS if name in reports}
    rows = [row.as_json() for name, report in reports.items() for row in ITEMS[name].rows(report)]
    own = {name: report for name, report in reports.items() if name not in OWN}
    bench = {"size": args.size, "rows": rows, "items": own} | surroundings()
    if args.out:
        stored(args.out / "bench.json", bench)
        for name in reports.keys() - own.keys():
            stored(args.out / f"{name}.json", reports[name])
        if "growth" in own:
            growth.figure(own["growth"], args.out / "growth.png")
    print("\n" + bench_table(bench))
    if args.into:
        show(reports, bench, args.into)


def show(reports: dict[str, Any], bench: dict[str, Any], pages: Path) -> None:
    """The tables, in the pages."""
    written(pages / "speed.md", "bench", bench_table(bench))
    for name in reports.keys() & set(OWN):
        written(pages / "speed.md", name, ITEMS[name].table(reports[name]))


if __name__ == "__main__":
    main()

"""What the commands of this folder share: rows that are measured once and stored, and tables that are written into pages."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cairn.experiment.metrics import mean_and_deviation
from cairn.reports.tables import replaced_block
from cairn.storage.files import read_json, write_json
from cairn.storage.versions import versions

Row = dict[str, Any]


def arguments(doc: str | None, out: str, into: str, **flags: str) -> argparse.Namespace:
    """The command's options: where rows and tables go, which rows to measure, and `flags` with their help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help="the rows, a JSON file")
    parser.add_argument("--into", type=Path, default=Path(into), help="the page")
    parser.add_argument("--only", help="measure these rows alone: what they begin with, parts joined by /")
    parser.add_argument("--table", action="store_true", help="write the tables from what is stored")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    return parser.parse_args()


def rows_of(path: Path) -> list[Row]:
    return read_json(path)["rows"] if path.exists() else []


def measured_rows(
    args: argparse.Namespace,
    keys: Sequence[str],
    jobs: Iterable[tuple[Any, ...]],
    measured: Callable[..., Row],
    **about: Any,
) -> list[Row]:
    """A row for every job, in their order: stored rows are taken as they are, the others measured and stored one by one.

    `keys` name the columns that say which job a row is of.
    """
    rows, places = rows_of(args.out), {job: place for place, job in enumerate(jobs)}
    done = {tuple(row[key] for key in keys) for row in rows}
    for job in () if args.table else places:
        name = "/".join(map(str, job))
        if job in done or (args.only and not f"{name}/".startswith(f"{args.only}/")):
            continue
        rows.append(measured(*job))
        print(name, flush=True)
        rows.sort(key=lambda row: places.get(tuple(row[key] for key in keys), len(places)))
        write_json(args.out, {**about, "rows": rows, "versions": versions()})
    return rows


def write_block(page: Path, name: str, text: str) -> None:
    """A marked block of a page anew."""
    page.write_text(replaced_block(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def mean_cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample deviation, as a cell of a table has them."""
    mean, deviation = mean_and_deviation(list(values))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"

"""What each method costs and what it brings, side by side, from the stored results.

    python experiments/costs.py [--into docs/choose-a-method.md] [--stream shapes cifar100]

Accuracy, seconds and bytes are those of the results under `results/STREAM`. How many numbers a method trains in a task is
counted here: a task is learned from four images per class, and whatever its optimisers are given is added up.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from rows import METHOD_ROWS
from stored import write_block
from streams import ROOT

from cairn.config import values_by_path
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.reports.formats import Column, Estimate, Table, estimate
from cairn.reports.tables import label, results_below
from cairn.training.log import Log

COSTED = ["shapes", "cifar100"]
FEW = ("stage1.schedule.epochs", "stage2.schedule.epochs", "schedule.epochs", "generator.steps")


class Counted(Exception):
    """The second task is learned, and others tell nothing new."""


def trained(result: dict[str, Any]) -> int:
    """Numbers trained in the second task, all stages together, each once."""
    settings = values_by_path(result["run"]["settings"])
    for path in FEW:
        held: Any = result["config"]
        for key in path.split("."):
            held = held.get(key) if isinstance(held, dict) else None
        settings |= {path: 1} if held else {}
    stages: dict[Any, int] = {}

    def count(event: dict[str, Any]) -> None:
        match event:
            case {"event": "epoch", "task": 1}:
                stages[event.get("stage")] = event["parameters"]
            case {"event": "task", "task": 1}:
                raise Counted

    few = {"settings": settings, "limit_train": 4, "limit_test": 1, "device": "cpu"}
    with suppress(Counted):
        run_stream(RunConfig(**(result["run"] | few)), Log(keep=count))
    return sum(stages.values())


def table(stream: str) -> Table:
    rows = []
    for folder in [*METHOD_ROWS[stream], "blend"]:
        at = ROOT / "results" / stream / folder
        if not at.is_dir():
            continue
        group = results_below([at])
        entry, tasks = METHODS[group[0]["method"]], len(group[0]["task_sizes"])
        rows.append(
            [
                label(group[0]),
                entry.card.keeps,
                Estimate(group[0]["memory_bytes"] / 1000),
                Estimate(trained(group[0]) / 1000),
                ", ".join(entry.uses),
                estimate([r["seconds"] / tasks for r in group]),
                *(estimate([r[key] for r in group], 100) for key in ("average", "last")),
            ]
        )
        print(folder, flush=True)
    rows.sort(key=lambda row: row[-2].mean)
    columns = [
        Column("method"),
        Column("keeps"),
        Column("kB", 0),
        Column("trains, thousand numbers a task", 0),
        Column("uses"),
        Column("s per task", 0),
        Column("average %"),
        Column("last %"),
    ]
    return Table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "choose-a-method.md")
    parser.add_argument("--stream", nargs="+", choices=COSTED, default=COSTED)
    args = parser.parse_args()
    for stream in args.stream:
        write_block(args.into, f"costs {stream}", table(stream).markdown())


if __name__ == "__main__":
    main()

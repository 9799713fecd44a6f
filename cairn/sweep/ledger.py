"""What became of a sweep's runs: `sweep.json`, the table, and what is shown while they go."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rich.live import Live
from rich.text import Text

from cairn.errors import printable
from cairn.experiment.folder import events_in, means
from cairn.experiment.schema import RunConfig
from cairn.reports.console import Console, percent
from cairn.reports.formats import Cell, Column, Table, estimate
from cairn.storage.files import write_chunks, write_json
from cairn.sweep.plan import Point

SCHEMA_VERSION = 1
SWEEP, TABLE = "sweep.json", "table"

SHOWN = {
    "average": (Column("average %"), 100),
    "last": (Column("last %"), 100),
    "forgetting": (Column("forgetting"), 100),
    "seconds": (Column("seconds", 0), 1),
}
"""Columns of the table, and by what figures are multiplied."""

State = Literal["waiting", "running", "finished", "failed", "lost"]
"""`lost`: the worker was gone as often as the sweep begins a run."""


@dataclass(eq=False)
class Job:
    """A run of the sweep and how far it is."""

    name: str
    """Its folder below the sweep's."""
    config: RunConfig
    point: Point
    state: State = "waiting"
    attempts: int = 0
    reason: str | None = None
    figures: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def outcome(self) -> str:
        if self.figures is None:
            return f"{self.state}: {self.reason}"
        average, last = percent(self.figures["average"]), percent(self.figures["last"])
        return f"average {average} %, last {last} %, {self.figures['seconds']:.0f} s"

    def as_json(self) -> dict[str, Any]:
        about = {"folder": self.name, "varies": self.point.varies, "seed": self.seed, "state": self.state}
        return {**about, "attempts": self.attempts, "reason": self.reason, **(self.figures or {})}


@dataclass
class Ledger:
    """Every run of a sweep."""

    folder: Path
    about: Mapping[str, Any]
    jobs: list[Job] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def count(self, *states: State) -> int:
        return sum(job.state in states for job in self.jobs)

    @property
    def counts(self) -> str:
        numbers = {state: self.count(state) for state in get_args(State)}
        return ", ".join(f"{number} {state}" for state, number in numbers.items() if number or state == "finished")

    def points(self) -> list[tuple[Point, list[Job], list[Job]]]:
        """Jobs that differ in their seed alone: those with figures, and the others."""
        found: dict[str, tuple[Point, list[Job], list[Job]]] = {}
        for job in self.jobs:
            _, done, others = found.setdefault(job.point.name, (job.point, [], []))
            (done if job.figures else others).append(job)
        return list(found.values())

    def write(self, state: Literal["running", "stopped", "finished"]) -> None:
        table = [
            {"varies": point.varies, "seeds": [job.seed for job in done], "missing": [job.seed for job in others]}
            | means([job.figures for job in done if job.figures])
            for point, done, others in self.points()
        ]
        head = {"schema_version": SCHEMA_VERSION, "state": state, "seconds": time.monotonic() - self.began}
        runs = [job.as_json() for job in self.jobs]
        write_json(self.folder / SWEEP, {**head, **self.about, "runs": runs, "table": table, "best": self.best})

    def write_table(self) -> None:
        table = self.table()
        for suffix, text in (("md", table.markdown()), ("csv", table.csv())):
            write_chunks(self.folder / f"{TABLE}.{suffix}", [(text + "\n").encode()])

    def table(self) -> Table:
        """A row per combination, in the file's order: what varies, mean ± sample deviation over seeds, in percent."""
        keys, points = list(dict.fromkeys(key for job in self.jobs for key in job.point.varies)), self.points()
        rows: list[list[Cell]] = []
        for point, done, others in points:
            figures = [job.figures for job in done if job.figures]
            rows.append(
                [
                    *([point.varies.get(key) for key in keys] or [point.config.method]),
                    *(estimate([one[key] for one in figures], factor) for key, (_, factor) in SHOWN.items()),
                    ", ".join(str(job.seed) for job in done) or None,
                    ", ".join(f"{job.seed} {job.state}" for job in others) or None,
                ]
            )
        columns = [*map(Column, keys or ["method"]), *(column for column, _ in SHOWN.values()), Column("seeds")]
        if any(others for _, _, others in points):
            return Table([*columns, Column("not finished")], rows)
        return Table(columns, [row[:-1] for row in rows])


class View(Console):
    """What runs, live on a terminal; a line for each run that ends."""

    def __init__(self, file: Any = None):
        super().__init__(file or sys.stdout)  # as it is now: what others print meanwhile may go elsewhere

    def of(self, ledger: Ledger) -> AbstractContextManager[Any]:
        if not self._rich.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=lambda: Text(picture(ledger)), console=self._rich, transient=True, redirect_stdout=False
        )

    def ended(self, job: Job, ledger: Ledger) -> None:
        done = ledger.count("finished", "failed", "lost")
        self.note(f"[{done}/{len(ledger.jobs)}] {job.name}: {job.outcome}")


def picture(ledger: Ledger) -> str:
    """What runs, and how far it is."""
    running = [job.name for job in ledger.jobs if job.state == "running"]
    return printable("\n".join([*(f"{name}  {_progress(ledger.folder / name)}" for name in running), ledger.counts]))


def _progress(folder: Path) -> str:
    """Where a run is, by the last event that says so."""
    for event in reversed(events_in(folder)):
        if event["event"] == "epoch":
            return f"task {event['task'] + 1}  stage {event['stage']}  epoch {event['epoch'] + 1}  loss {event['loss']:.3f}"
        if event["event"] == "task":
            return f"task {event['task'] + 1} done  seen {percent(event['seen'])} %"
    return "begins"

"""What became of a sweep's runs: `sweep.json`, the tables, and what is shown while they go."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
SWEEP, TABLE, RUNS = "sweep.json", "table", "runs.csv"
SHOWN = {
    "average": ("average %", 100, 2),
    "last": ("last %", 100, 2),
    "forgetting": ("forgetting", 100, 2),
    "seconds": ("seconds", 1, 0),
}
"""Columns of tables: title, factor, digits."""

COLUMNS = [Column(title, digits) for title, _, digits in SHOWN.values()]

ROWS = 12
"""Running runs that the live view shows, at most."""

State = Literal["waiting", "running", "finished", "failed", "lost"]


@dataclass(eq=False)
class Job:
    """A run of the sweep and how far it is. `lost`: its worker was gone as often as the sweep begins a run."""

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
        states: tuple[State, ...] = ("waiting", "running", "finished", "failed", "lost")
        return ", ".join(f"{self.count(state)} {state}" for state in states if state == "finished" or self.count(state))

    def points(self) -> list[tuple[Point, list[Job], list[Job]]]:
        """Jobs that differ in their seed alone: those with figures, and the others."""
        found: dict[str, list[Job]] = {}
        for job in self.jobs:
            found.setdefault(job.point.name, []).append(job)
        return [
            (jobs[0].point, [job for job in jobs if job.figures], [job for job in jobs if not job.figures])
            for jobs in found.values()
        ]

    def write(self, state: Literal["running", "stopped", "finished"]) -> None:
        table = [
            {"varies": point.varies, "seeds": [job.seed for job in done], "missing": [job.seed for job in others]}
            | means([job.figures for job in done if job.figures])
            for point, done, others in self.points()
        ]
        head = {"schema_version": SCHEMA_VERSION, "state": state, "seconds": time.monotonic() - self.began}
        runs = [job.as_json() for job in self.jobs]
        write_json(self.folder / SWEEP, {**head, **self.about, "runs": runs, "table": table, "best": self.best})

    def write_tables(self) -> None:
        table = self.table()
        texts = {f"{TABLE}.md": table.markdown(), f"{TABLE}.csv": table.csv(), RUNS: self.run_table().csv()}
        for name, text in texts.items():
            write_chunks(self.folder / name, [(text + "\n").encode()])

    @property
    def _varying(self) -> list[str]:
        return list(dict.fromkeys(key for job in self.jobs for key in job.point.varies))

    def table(self) -> Table:
        """A row per combination, in the file's order: what varies, mean ± sample deviation over seeds, in percent."""
        keys, points = self._varying, self.points()
        rows: list[list[Cell]] = [
            [
                *([point.varies.get(key) for key in keys] or [point.config.method]),
                *_shown(done),
                ", ".join(str(job.seed) for job in done) or None,
                ", ".join(f"{job.seed} {job.state}" for job in others) or None,
            ]
            for point, done, others in points
        ]
        columns = [*map(Column, keys or ["method"]), *COLUMNS, Column("seeds"), Column("not finished")]
        if any(others for _, _, others in points):
            return Table(columns, rows)
        return Table(columns[:-1], [row[:-1] for row in rows])

    def run_table(self) -> Table:
        """A row per run."""
        keys = self._varying
        columns = [*map(Column, [*keys, "seed", "state", "attempts"]), *COLUMNS, Column("folder"), Column("reason")]
        rows: list[list[Cell]] = [
            [
                *(job.point.varies.get(key) for key in keys),
                *(str(job.seed), job.state, str(job.attempts)),
                *_shown([job] if job.figures else []),
                *(job.name, job.reason),
            ]
            for job in self.jobs
        ]
        return Table(columns, rows)

    def picture(self) -> str:
        """What runs, and how far it is."""
        running = [job.name for job in self.jobs if job.state == "running"]
        lines = [f"{name}  {_progress(self.folder / name)}" for name in running[:ROWS]]
        more = [f"... and {len(running) - ROWS} more"] if len(running) > ROWS else []
        return printable("\n".join([*lines, *more, self.counts]))


def _shown(jobs: Sequence[Job]) -> list[Cell]:
    return [
        estimate([job.figures[key] for job in jobs if job.figures], factor) for key, (_, factor, _) in SHOWN.items()
    ]


def _progress(folder: Path) -> str:
    """Where a run is, by the last event that says so."""
    for event in reversed(events_in(folder)):
        if event["event"] == "epoch":
            return f"task {event['task'] + 1}  stage {event['stage']}  epoch {event['epoch'] + 1}  loss {event['loss']:.3f}"
        if event["event"] == "task":
            return f"task {event['task'] + 1} done  seen {percent(event['seen'])} %"
    return "begins"


class View(Console):
    """What runs, live on a terminal; a line for each run that ends."""

    def __init__(self, file: Any = None):
        super().__init__(file or sys.stdout)  # as it is now: what others print meanwhile may go elsewhere

    def of(self, ledger: Ledger) -> AbstractContextManager[Any]:
        if not self._rich.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=lambda: Text(ledger.picture()), console=self._rich, transient=True, redirect_stdout=False
        )

    def ended(self, job: Job, ledger: Ledger) -> None:
        done = ledger.count("finished", "failed", "lost")
        self.note(f"[{done}/{len(ledger.jobs)}] {job.name}: {job.outcome}")

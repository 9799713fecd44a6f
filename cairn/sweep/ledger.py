"""What became of a sweep's runs: `sweep.json`, and tables of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from cairn.errors import ResultError
from cairn.experiment.metrics import mean_and_deviation
from cairn.reports.formats import Cell, Column, Estimate, Table, estimate
from cairn.storage.files import read_json, write_chunks, write_json
from cairn.storage.schema import Count, validated
from cairn.sweep.plan import Point, Run

SCHEMA_VERSION = 1
SWEEP, TABLE, RUNS = "sweep.json", "table", "runs.csv"
GATHERED = ("average", "last", "forgetting", "bwt", "seconds")

State = Literal["waiting", "running", "finished", "failed", "lost"]


@dataclass(eq=False)
class Job:
    """A run of the sweep and how far it is. `lost`: its worker was gone as often as the sweep begins a run."""

    run: Run
    point: Point
    state: State = "waiting"
    attempts: int = 0
    tries: int = 0
    """The attempts of this call; `attempts` are those of earlier ones too."""
    reason: str | None = None
    figures: dict[str, Any] | None = None
    token: str = ""

    @property
    def name(self) -> str:
        return self.run.name

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": self.name, "varies": self.point.varies, "seed": self.run.config.seed, "state": self.state,
            "attempts": self.attempts, "reason": self.reason, **(self.figures or {}),
        }  # fmt: skip


@dataclass
class Ledger:
    """Every run of a sweep. Written whole, whenever something happened and a second has passed."""

    folder: Path
    about: Mapping[str, Any]
    jobs: list[Job] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    _written: float = -1.0
    _began: float = field(default_factory=time.monotonic)

    def count(self, *states: State) -> int:
        return sum(job.state in states for job in self.jobs)

    def points(self) -> list[list[Job]]:
        """Jobs that differ in their seed alone."""
        found: dict[str, list[Job]] = {}
        for job in self.jobs:
            found.setdefault(job.point.name, []).append(job)
        return list(found.values())

    def write(self, state: Literal["running", "stopped", "finished"], *, now: bool = False) -> None:
        if not now and time.monotonic() - self._written < 1:
            return
        self._written = time.monotonic()
        table = [
            {
                "varies": jobs[0].point.varies,
                "seeds": [job.run.config.seed for job in jobs if job.figures],
                "missing": [job.run.config.seed for job in jobs if not job.figures],
                **{key: value for key in GATHERED if (value := gathered(jobs, key)) is not None},
            }
            for jobs in self.points()
        ]
        write_json(
            self.folder / SWEEP,
            {"schema_version": SCHEMA_VERSION, "state": state, "seconds": time.monotonic() - self._began, **self.about,
             "runs": [job.as_json() for job in self.jobs], "table": table, "best": self.best},
        )  # fmt: skip

    def write_tables(self) -> None:
        table = point_table(self.points())
        write_chunks(self.folder / f"{TABLE}.md", [(table.markdown() + "\n").encode()])
        write_chunks(self.folder / f"{TABLE}.csv", [(table.csv() + "\n").encode()])
        write_chunks(self.folder / RUNS, [(run_table(self.jobs).csv() + "\n").encode()])


class _Attempted(BaseModel):
    """Of a run of `sweep.json`, what is read back; the rest of the file is for people."""

    folder: str
    attempts: Count
    reason: str | None


class _Stored(BaseModel):
    runs: list[_Attempted]


def earlier(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that `sweep.json` told of when it was last written, by folder; none if it cannot be read."""
    try:
        stored = validated(_Stored, read_json(folder / SWEEP), f"'{folder / SWEEP}'")
    except ResultError:
        return {}
    return {run.folder: {"attempts": run.attempts, "reason": run.reason} for run in stored.runs}


def gathered(jobs: Sequence[Job], key: str) -> dict[str, Any] | None:
    """Mean and sample standard deviation over seeds."""
    values = [job.figures[key] for job in jobs if job.figures]
    if not values or None in values:
        return None
    mean, deviation = mean_and_deviation(values)
    return {"mean": mean, "deviation": deviation, "values": values}


def varying(jobs: Iterable[Job]) -> list[str]:
    return list(dict.fromkeys(key for job in jobs for key in job.point.varies))


def point_table(points: Sequence[Sequence[Job]]) -> Table:
    """A row per combination, in the file's order: what varies, mean ± sample standard deviation over seeds, in percent."""
    keys = varying(job for jobs in points for job in jobs)
    columns = [Column(key) for key in keys] or [Column("method")]
    columns += [Column("average %"), Column("last %"), Column("forgetting"), Column("seconds", 0), Column("seeds"),
                Column("not finished")]  # fmt: skip
    rows: list[list[Cell]] = []
    for jobs in points:
        first, done = jobs[0], [job for job in jobs if job.figures]
        left = [f"{job.run.config.seed} {job.state}" for job in jobs if not job.figures]
        rows.append(
            [
                *([first.point.varies.get(key) for key in keys] or [first.run.config.method]),
                *(estimate([job.figures[key] for job in done], 100) for key in ("average", "last", "forgetting")),
                estimate([job.figures["seconds"] for job in done]),
                ", ".join(str(job.run.config.seed) for job in done) or None,
                ", ".join(left) or None,
            ]
        )
    if not any(row[-1] for row in rows):
        return Table(columns[:-1], [row[:-1] for row in rows])
    return Table(columns, rows)


def run_table(jobs: Sequence[Job]) -> Table:
    """A row per run."""
    keys = varying(jobs)
    columns = [*map(Column, (*keys, "seed", "state", "attempts", "average %", "last %", "forgetting", "seconds", "folder",
                             "reason"))]  # fmt: skip

    def cell(job: Job, key: str, factor: float) -> Cell:
        value = None if job.figures is None else job.figures[key]
        return None if value is None else Estimate(factor * value)

    rows = [
        [
            *(job.point.varies.get(key) for key in keys), str(job.run.config.seed), job.state, str(job.attempts),
            *(cell(job, key, 100) for key in ("average", "last", "forgetting")), cell(job, "seconds", 1), job.name, job.reason,
        ]
        for job in jobs
    ]  # fmt: skip
    return Table(columns, rows)

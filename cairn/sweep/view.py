"""A sweep as it goes: a live table on a terminal, plain lines elsewhere. What a run does is read from its events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rich.console
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cairn.errors import printable
from cairn.experiment.folder import EVENTS
from cairn.reports.console import percent, word_table
from cairn.reports.formats import Table as Points
from cairn.sweep.ledger import Job, Ledger

EVERY = 30.0
"""Seconds between plain lines on what is going on."""

SHOWN = 12
"""Rows of the live table for runs that go, and for those that ended last."""


class Watch:
    """The events of one run, read as they come."""

    def __init__(self, path: Path):
        self._path, self._at, self._rest = path, 0, b""
        self.tokens: set[str] = set()
        """Of attempts that have begun."""
        self.tasks: int | None = None
        self.place: dict[str, Any] = {}

    def look(self) -> None:
        with suppress(OSError):
            with self._path.open("rb") as file:
                file.seek(0, 2)
                if file.tell() < self._at:  # begun anew
                    self._at, self._rest = 0, b""
                file.seek(self._at)
                new = file.read()
            self._at += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                with suppress(ValueError, RecursionError, KeyError, TypeError):
                    self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "attempt":
                self.tokens.add(event["token"])
                self.place = {"host": event["host"]}
            case "start":
                self.tasks = event["tasks"]
            case "epoch":
                self.place |= {key: event.get(key) for key in ("task", "stage", "epoch", "loss")}
            case "task":
                self.place |= {"task": event["task"], "seen": event["seen"]}

    @property
    def line(self) -> str:
        """Where the run is, in words."""
        at, words = self.place, []
        if "task" in at and at["task"] is not None:
            words.append(f"task {at['task'] + 1}/{self.tasks or '?'}")
        if at.get("stage") is not None:
            words.append(f"stage {at['stage']}")
        if at.get("epoch") is not None:
            words.append(f"epoch {at['epoch'] + 1}")
        if isinstance(at.get("loss"), int | float):
            words.append(f"loss {at['loss']:.3f}")
        if "seen" in at:
            words.append(f"seen {percent(at['seen'])} %")
        return "  ".join(words) or "begins"


class View:
    """Shows a ledger."""

    def __init__(self, file: Any = None):
        # Kept as it is now: what others print meanwhile may go elsewhere
        self._rich = rich.console.Console(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._watches: dict[str, Watch] = {}
        self._ended: list[Job] = []
        self._said = time.monotonic()

    def note(self, text: str) -> None:
        self._rich.print(Text(printable(text)))

    @contextmanager
    def live(self) -> Iterator[None]:
        if not self._rich.is_terminal:
            yield
            return
        with Live(
            console=self._rich, refresh_per_second=4, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as self._live:
            yield
        self._live = None

    def look(self, ledger: Ledger) -> None:
        """Take in what happened: a run that was handed out goes once its attempt has begun."""
        going = [job for job in ledger.jobs if job.token]
        for job in going:
            watch = self._watches.setdefault(job.token, Watch(ledger.folder / job.name / EVENTS))
            watch.look()
            job.state = "running" if job.token in watch.tokens else "waiting"
        self._watches = {job.token: self._watches[job.token] for job in going}
        running = [job for job in going if job.state == "running"]
        if self._live is not None:
            self._live.update(self._drawn(ledger, running))
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self.note(f"  {counts(ledger)}")
            for job in running[:SHOWN]:
                self.note(f"    {job.name}: {self._watches[job.token].line}")

    def ended(self, job: Job, ledger: Ledger) -> None:
        self._ended = [*(other for other in self._ended if other is not job), job][-SHOWN:]
        if self._live is None or job.state != "finished":
            done = ledger.count("finished", "failed", "lost")
            self.note(f"[{done}/{len(ledger.jobs)}] {job.name}: {outcome(job)}")

    def table(self, points: Points) -> None:
        """The results, by combination."""
        self._rich.print(word_table(points.titles, points.texts(), self._rich.width), soft_wrap=False)

    def _drawn(self, ledger: Ledger, running: list[Job]) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for job in self._ended:
            table.add_row(Text(job.name), Text(outcome(job)))
        for job in running[:SHOWN]:
            again = f"  (attempt {job.tries})" if job.tries > 1 else ""
            table.add_row(Text(job.name), Text(self._watches[job.token].line + again))
        if len(running) > SHOWN:
            table.add_row(Text("..."), Text(f"{len(running) - SHOWN} more running"))
        return Group(table, Text(counts(ledger)))


def outcome(job: Job) -> str:
    if job.state == "finished":
        told = job.figures
        return f"average {percent(told['average'])} %, last {percent(told['last'])} %, {told['seconds']:.0f} s"
    if job.state == "waiting":
        return f"worker lost ({job.reason}), put back: attempt {job.tries + 1} follows"
    return f"{job.state}: {job.reason}"


def counts(ledger: Ledger) -> str:
    names = ("waiting", "running", "finished", "failed", "lost")
    return ", ".join(f"{ledger.count(name)} {name}" for name in names if name == "finished" or ledger.count(name))

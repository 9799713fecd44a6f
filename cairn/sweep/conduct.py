"""Carries a sweep out: hands runs to an engine, puts back what is lost, asks a search for more, and keeps the ledger."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from cairn.errors import GOES_ON, CairnError, ConfigError, Interrupted, counted
from cairn.experiment.config_file import RunFile, run_file_text
from cairn.experiment.folder import Call, Lock
from cairn.reports.formats import Table
from cairn.storage.files import make_folder, write_chunks
from cairn.sweep.attempt import figures
from cairn.sweep.file import SweepFile
from cairn.sweep.ledger import Job, Ledger, earlier, point_table
from cairn.sweep.order import Ended, Engine, Order
from cairn.sweep.plan import Checks, Kept, Point, corners, point_with, points_of
from cairn.sweep.search import Study, Trial, chosen, optuna_module, refused_on_test
from cairn.sweep.view import View
from cairn.training.checkpoint import stopped_by_signals

BEST = "best.toml"
WAIT = 0.25
"""Seconds between looks at what runs do."""


class Sweep:
    """A sweep file and a folder. `plan` finds every run good; `carry_out` ends them."""

    def __init__(self, file: SweepFile, folder: Path, view: View | None = None):
        self.file, self.folder, self.view = file, folder, view or View()
        resources = file.resources.model_dump(mode="json")
        search = None if file.search is None else file.search.model_dump(mode="json")
        self.ledger = Ledger(folder, {"file": file.path.name, "resources": resources, "search": search})
        self._checks = Checks()
        self._by_run: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._trials: list[tuple[Study, Trial]] = []
        self._stopped: int | None = None
        self.same = 0
        """Combinations that are the same run as another."""

    # --- what there is to do ------------------------------------------------------------------------------------------

    def plan(self) -> list[Point]:
        """Every point of the grid. Raises a CairnError for the first run, or corner of a search, that would be refused."""
        points, file = points_of(self.file), self.file
        if file.search is not None:
            refused_on_test(points)
        for point in points:
            if file.search is None:
                self._checks.settings(point.config, point.name)
                continue
            for values in corners(file.search.space):
                trial = point_with(file, (*point.choices, chosen(values)), point.name)
                settings = ", ".join(f"{key}={value}" for key, value in values.items())
                self._checks.settings(trial.config, f"{point.name} with {settings}")
        return points

    def take_up(self, points: list[Point]) -> None:
        """Runs that are there already, and those that are still to do."""
        self._kept, self._earlier = Kept(self.folder), earlier(self.folder)
        if self.file.search is None:
            for point in points:
                self._add(point)
            self._checks = Checks()  # lets data and towers go

    def _add(self, point: Point) -> list[Job]:
        """A job for every seed of a point. A run that another point has already is that one's."""
        jobs = []
        for planned in point.runs():
            same = self._checks.identity(planned.config, planned.name)
            if same in self._by_run:
                self.same += 1
                jobs.append(self._by_run[same])
                continue
            run = self._kept.taken_up(planned, same)
            before = self._earlier.get(run.name, {"attempts": 0, "reason": None})
            job = Job(run, point, attempts=before["attempts"])
            if run.result is not None:
                job.state, job.figures = "finished", figures(run.result)
            else:
                self._waiting.append(job)
            self._by_run[same] = job
            self.ledger.jobs.append(job)
            jobs.append(job)
        return jobs

    def planned(self) -> list[Point]:
        """The points, and in the ledger their runs, done or not, without doing any; those of a search are not known before."""
        points = self.plan()
        self.take_up(points)
        return points

    # --- doing it -----------------------------------------------------------------------------------------------------

    def stop(self, number: int) -> None:
        """Ask it to end: what goes on keeps its state."""
        self._stopped = number

    def carry_out(self, make_engine: Callable[[], Engine]) -> Ledger:
        """Raises a CairnError for any bad input before anything runs, Interrupted if asked to stop. Runs that fail are told in
        the ledger."""
        if self.file.search is not None:
            optuna_module()
        points = self.plan()
        make_folder(self.folder)
        lock = Lock(self.folder).take()
        try:
            self.take_up(points)
            studies = [] if self.file.search is None else [Study(self.folder, self.file, point) for point in points]
            for study in studies:
                self._resume(study)
            if self._waiting or any(study.left for study in studies):
                with closing(make_engine()) as engine, stopped_by_signals(self), self.view.live():
                    self._loop(engine, studies)
            self._conclude(studies)
        finally:
            lock.release()
            with suppress(OSError):  # nothing was begun, so nothing is left
                self.folder.rmdir()
        if self._stopped is not None:
            raise Interrupted(self._stopped, GOES_ON)
        return self.ledger

    def _loop(self, engine: Engine, studies: list[Study]) -> None:
        going: dict[str, Job] = {}
        told = False
        while True:
            while self._stopped is None and len(going) < engine.slots() and (job := self._next(studies)) is not None:
                going[job.name] = job
                engine.submit(self._order(job))
            if not going:
                break
            if self._stopped is not None and not told:
                told = True
                self.view.note(
                    f"stopping, once {counted(len(going), 'run')} kept the state (once more to stop at once)"
                )
                engine.stop()
            ended = engine.next(WAIT)
            self.view.look(self.ledger)
            if ended is not None:
                self._settle(going.pop(ended.name), ended)
                self._tell(studies)
                self.ledger.write("running", now=True)
            else:
                self.ledger.write("running")

    def _next(self, studies: list[Study]) -> Job | None:
        """The next run to hand out; where none is left, of the study that has the fewest trials under way."""
        while not self._waiting:
            under_way = {id(study): sum(one is study for one, _ in self._trials) for study in studies}
            for study in sorted(studies, key=lambda study: under_way[id(study)]):
                if (trial := study.ask()) is not None:
                    self._begin(study, trial)
                    break
            else:
                return None
            self._tell(studies)
        return self._waiting.popleft()

    def _order(self, job: Job) -> Order:
        resources = self.file.resources
        job.attempts, job.tries, job.token, job.reason = job.attempts + 1, job.tries + 1, secrets.token_hex(8), None
        call = Call(run=job.run.config, cache=resources.cache, checkpoint_seconds=resources.checkpoint_seconds)
        folder = str((self.folder / job.name).resolve())
        return Order(
            job.name, folder, call.model_dump(mode="json"), job.token, job.attempts, resources.cpus, os.getcwd()
        )

    def _settle(self, job: Job, ended: Ended) -> None:
        job.token, job.reason = "", ended.reason
        match ended.state:
            case "finished":
                job.state, job.figures = "finished", ended.figures
            case "failed":
                job.state = "failed"
            case "stopped" if self._stopped is not None:
                job.state = "waiting"
                return
            case _:  # its worker is gone, or was told to go by somebody else
                job.reason = ended.reason or "its worker was told to stop"
                if job.tries < self.file.resources.attempts:
                    job.state = "waiting"
                    self._waiting.appendleft(job)
                else:
                    job.state = "lost"
                    job.reason += f"; {job.tries} attempts were made"
        self.view.ended(job, self.ledger)

    # --- searching ----------------------------------------------------------------------------------------------------

    def _resume(self, study: Study) -> None:
        """Trials of an earlier call: those that were told are shown, those that were not are gone on with."""
        for trial, _ in study.told():
            self._add(trial.point)
        for trial in study.failed():
            for job in self._add(trial.point):
                if job.state == "waiting":
                    job.state = "failed"
                    job.reason = self._earlier.get(job.name, {}).get("reason")
                    self._waiting.remove(job)
        for trial in study.begun():
            self._begin(study, trial)
        self._tell([study])

    def _begin(self, study: Study, trial: Trial) -> None:
        try:
            self._add(trial.point)
        except ConfigError:  # a combination between corners that were good
            study.tell(trial.number, None)
            return
        self._trials.append((study, trial))

    def _tell(self, studies: list[Study]) -> None:
        """Trials whose runs have all ended."""
        for study, trial in list(self._trials):
            jobs = self._jobs(trial)
            if any(job.state in ("waiting", "running", "lost") for job in jobs):
                continue
            values = [job.figures[self.file.search.metric] for job in jobs if job.figures]
            study.tell(trial.number, sum(values) / len(values) if len(values) == len(jobs) else None)
            self._trials.remove((study, trial))

    def _jobs(self, trial: Trial) -> list[Job]:
        return [self._by_run[self._checks.identity(run.config, run.name)] for run in trial.point.runs()]

    def _conclude(self, studies: list[Study]) -> None:
        for study in studies:
            if told := study.told():
                trial, value = max(told, key=lambda one: one[1])
                run = trial.point.config
                metric, count = self.file.search.metric, len(told)
                place = Path(study.point.name) / BEST
                self.ledger.best.append(
                    {"trial": trial.point.name, "metric": metric, "value": value, "trials": count, "varies": trial.point.varies,
                     "file": place.as_posix()}
                )  # fmt: skip
                values = run.model_dump(exclude={"validation", "seed"}, exclude_none=True)
                file = RunFile.model_validate(values | {"seeds": trial.point.seeds})
                best = f"the best of {counted(count, 'trial')} by {metric}, {100 * value:.2f} %"
                title = f"{best} on images held out of training; not tested yet"
                make_folder(self.folder / study.point.name)
                write_chunks(self.folder / place, [run_file_text(file, title).encode()])
        state = "finished" if self.ledger.count("waiting", "running") == 0 and self._stopped is None else "stopped"
        self.ledger.write(state, now=True)
        self.ledger.write_tables()

    def table(self) -> Table:
        return point_table(self.ledger.points())


def problem(ledger: Ledger) -> CairnError | None:
    """What to say if runs did not end well."""
    bad = [job for job in ledger.jobs if job.state in ("failed", "lost")]
    if not bad:
        return None
    first = bad[0]
    return CairnError(
        f"{len(bad)} of {counted(len(ledger.jobs), 'run')} did not end, first {first.name}: {first.reason}; mend it and call again"
    )

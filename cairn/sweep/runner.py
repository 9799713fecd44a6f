"""Carries a sweep out: hands its runs to this process or to Ray, asks a search for more, and keeps the ledger."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from cairn.errors import GOES_ON, CairnError, ConfigError, Interrupted, counted
from cairn.experiment.config_file import RunFile, run_file_text
from cairn.experiment.folder import Call, Lock, events_in
from cairn.storage.files import make_folder, open_append, write_chunks
from cairn.sweep.file import Resources, SweepFile
from cairn.sweep.ledger import Job, Ledger, View
from cairn.sweep.plan import Checks, Point, Stored, corners, point_with, points_of
from cairn.sweep.search import Study, Trial, chosen, optuna_module, require_held_out
from cairn.sweep.worker import Outcome, attempt, attempt_in_ray, attempts_in, figures, reason_of
from cairn.training.checkpoint import Checkpoint, stopped_by_signals
from cairn.training.ray_cluster import Cluster

BEST = "best.toml"


class Stop(Checkpoint):
    """Whether the sweep was asked to stop, and the checkpoint of the run in this process, which is then stopped too."""

    number = 0
    run: Checkpoint | None = None

    def stop(self, number: int) -> None:
        self.number = number
        if self.run is not None:
            self.run.stop(number)


class Serial:
    """One run after the other, in this process."""

    def __init__(self, stop: Stop):
        self._stop = stop

    def slots(self) -> int:
        return 1

    def submit(self, path: Path, call: dict[str, Any]) -> Future[Outcome]:
        self._stop.run = checkpoint = Checkpoint(call["checkpoint_seconds"])
        done: Future[Outcome] = Future()
        done.set_result(Outcome("stopped") if self._stop.number else attempt(path, call, checkpoint))
        return done

    def cancel(self) -> None:
        pass


class OnRay:
    """Runs as tasks of Ray, on the cores of this machine or on nodes of a cluster that share its files. Ray itself repeats
    those whose worker or node is lost."""

    def __init__(self, cluster: Cluster, resources: Resources, gpus: float | None):
        """With gpus=None a run gets a GPU where there are any. Raises ConfigError if there is no such cluster, or none of
        its nodes has room for a run."""
        self._ray = ray = cluster.ready()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
        asked = {"CPU": resources.cpus, "GPU": gpus, "memory": int(resources.memory or 0)}
        self._needs = {key: amount for key, amount in asked.items() if amount}
        if not any(all(node.get(key, 0) >= amount for key, amount in self._needs.items()) for node in nodes):
            words = zip(("cpus", "gpus", "memory"), asked.values(), strict=True)
            shown = ", ".join(f"{word} {amount:g}" for word, amount in words if amount)
            raise ConfigError(f"{shown}: no node has that much; ask for less")
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": gpus, "max_retries": resources.attempts - 1}
        self._task = ray.remote(**options, memory=asked["memory"] or None)(attempt_in_ray)
        self._cpus, self._parallel = resources.cpus, resources.parallel
        self._running: dict[Future[Outcome], Any] = {}

    def slots(self) -> int:
        """Runs at once: grows and shrinks with the cluster. One at least, since a node may come back."""
        there = self._ray.cluster_resources()
        room = min(int(there.get(key, 0) / amount + 1e-9) for key, amount in self._needs.items())
        return max(1, min(room, self._parallel or room))

    def submit(self, path: Path, call: dict[str, Any]) -> Future[Outcome]:
        reference = self._task.remote(path, call, os.getcwd(), self._cpus, "GPU" in self._needs)
        ended: Future[Outcome] = reference.future()
        self._running[ended] = reference
        ended.add_done_callback(lambda future: self._running.pop(future, None))
        return ended

    def cancel(self) -> None:
        """Ask every run to keep its state and end."""
        for reference in list(self._running.values()):
            self._ray.cancel(reference)


def outcome_of(ended: Future[Outcome]) -> Outcome:
    error = ended.exception()
    if error is None:
        return ended.result()
    from ray.exceptions import RayTaskError, TaskCancelledError

    if isinstance(error, TaskCancelledError):
        return Outcome("stopped")
    return Outcome("failed" if isinstance(error, RayTaskError) else "lost", reason_of(error))


class Sweep:
    """A sweep file and a folder. `plan` checks every run; `run` carries them out."""

    def __init__(self, file: SweepFile, folder: Path, view: View | None = None):
        self.file, self.folder, self.view, self.stop = file, folder, view or View(), Stop()
        resources = file.resources.model_dump(mode="json")
        search = None if file.search is None else file.search.model_dump(mode="json")
        self.ledger = Ledger(folder, {"file": file.path.name, "resources": resources, "search": search})
        self.same = 0
        """Combinations that are the same run as another."""
        self._checks = Checks()
        self._by_run: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._trials: list[tuple[Study, Trial, list[Job]]] = []
        self._metric = "average" if file.search is None else file.search.metric

    def plan(self) -> list[Point]:
        """Every point of the grid; the ledger then holds their runs, but those of a search. Raises a CairnError for the first
        run, or corner of a search, that would be refused."""
        points, file = points_of(self.file), self.file
        if file.search is None:
            for point in points:
                self._checks.settings(point.config, point.name)
        else:
            require_held_out(points)
            for point in points:
                for values in corners(file.search.space):
                    trial = point_with(file, (*point.choices, chosen(values)), point.name)
                    shown = ", ".join(f"{key}={value}" for key, value in values.items())
                    self._checks.settings(trial.config, f"{point.name} with {shown}")
        self._stored = Stored(self.folder)
        for point in points if file.search is None else ():
            self._add(point)
        if file.search is None:
            self._checks.forget_data()
        return points

    def run(self, make_pool: Callable[[Stop], Serial | OnRay] = Serial) -> Ledger:
        """Raises a CairnError for any bad input before anything runs, Interrupted if asked to stop. The ledger tells which
        runs failed."""
        if self.file.search is not None:
            optuna_module()
        points = self.plan()
        with self._folder_locked():
            studies = [] if self.file.search is None else [Study(self.folder, self.file, point) for point in points]
            for study in studies:
                self._resume(study)
            if self._waiting or any(study.left for study in studies):
                pool = make_pool(self.stop)
                said = _said_to(self.folder / "ray.log") if isinstance(pool, OnRay) else nullcontext()
                with stopped_by_signals(self.stop), self.view.of(self.ledger), said:
                    for study in studies or [None]:
                        self._loop(pool, study)
            for study in studies:
                self._conclude(study)
            left = self.stop.number or self.ledger.count("waiting", "running")
            self.ledger.write("stopped" if left else "finished")
            self.ledger.write_tables()
        if self.stop.number:
            raise Interrupted(self.stop.number, GOES_ON)
        return self.ledger

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        make_folder(self.folder)
        lock = Lock(self.folder).take()
        try:
            yield
        finally:
            lock.release()
            with suppress(OSError):  # nothing was begun, so nothing is left
                self.folder.rmdir()

    def _add(self, point: Point) -> list[Job]:
        """A job for every seed of a point. A run that another point has already is that one's."""
        jobs = []
        for name, config in point.runs():
            same = self._checks.identity(config, name)
            if same in self._by_run:
                self.same += 1
            else:
                name = self._stored.name(name, config, same)
                job = self._by_run[same] = Job(name, config, point, attempts=self._attempts(name))
                if (result := self._stored.results.get(name)) is not None:
                    job.state, job.figures = "finished", figures(result)
                else:
                    self._waiting.append(job)
                self.ledger.jobs.append(job)
            jobs.append(self._by_run[same])
        return jobs

    def _loop(self, pool: Serial | OnRay, study: Study | None = None) -> None:
        """Every run that waits, and those that a search asks for."""
        going: dict[Future[Outcome], Job] = {}
        cancelled = False
        while True:
            while not self.stop.number and len(going) < pool.slots() and (job := self._next(study)) is not None:
                job.state, job.reason = "running", None
                self.ledger.write("running")
                going[pool.submit((self.folder / job.name).resolve(), self._call(job))] = job
            if not going:
                return
            if self.stop.number and not cancelled:
                cancelled = True
                self.view.note(
                    f"stopping, once {counted(len(going), 'run')} kept the state (once more to stop at once)"
                )
                pool.cancel()
            for ended in wait(going, timeout=1, return_when=FIRST_COMPLETED).done:
                self._settle(going.pop(ended), outcome_of(ended))
                self._tell()
                self.ledger.write("running")

    def _next(self, study: Study | None) -> Job | None:
        while study is not None and not self._waiting and (trial := study.ask()) is not None:
            self._begin(study, trial)
            self._tell()
        return self._waiting.popleft() if self._waiting else None

    def _call(self, job: Job) -> dict[str, Any]:
        resources = self.file.resources
        call = Call(run=job.config, cache=resources.cache, checkpoint_seconds=resources.checkpoint_seconds)
        return call.model_dump(mode="json")

    def _settle(self, job: Job, outcome: Outcome) -> None:
        job.reason, job.figures, job.attempts = outcome.reason, outcome.figures, self._attempts(job.name)
        if outcome.state != "stopped":
            job.state = outcome.state
        else:
            job.state, job.reason = ("waiting", None) if self.stop.number else ("lost", "its worker was told to stop")
        if job.state == "lost":
            job.reason = f"{job.reason}; {job.attempts} attempts were made"
        if job.state != "waiting":
            self.view.ended(job, self.ledger)

    def _attempts(self, name: str) -> int:
        return attempts_in(events_in(self.folder / name))

    # --- searching ----------------------------------------------------------------------------------------------------

    def _resume(self, study: Study) -> None:
        """Trials of an earlier call: those that were told are shown, those that were not are gone on with."""
        for trial in study.trials("COMPLETE"):
            self._add(trial.point)
        for trial in study.trials("FAIL"):
            for job in self._add(trial.point):
                if job.state == "waiting":
                    texts = [event["text"] for event in events_in(self.folder / job.name) if event["event"] == "error"]
                    job.state, job.reason = "failed", texts[-1] if texts else None
                    self._waiting.remove(job)
        for trial in study.trials("RUNNING"):
            self._begin(study, trial)
        self._tell()

    def _begin(self, study: Study, trial: Trial) -> None:
        try:
            self._trials.append((study, trial, self._add(trial.point)))
        except ConfigError:  # a combination between corners that were good
            study.tell(trial.number, None)

    def _tell(self) -> None:
        """Trials whose runs have all ended."""
        for study, trial, jobs in list(self._trials):
            if all(job.state in ("finished", "failed") for job in jobs):
                values = [job.figures[self._metric] for job in jobs if job.figures]
                study.tell(trial.number, sum(values) / len(values) if len(values) == len(jobs) else None)
                self._trials.remove((study, trial, jobs))

    def _conclude(self, study: Study) -> None:
        """The run file of the best trial."""
        told = [(trial.value, trial) for trial in study.trials("COMPLETE") if trial.value is not None]
        if not told:
            return
        value, best = max(told, key=lambda pair: pair[0])
        place = Path(study.point.name) / BEST
        about = {"trial": best.point.name, "metric": self._metric, "value": value, "trials": len(told)}
        self.ledger.best.append({**about, "varies": best.point.varies, "file": place.as_posix()})
        values = best.point.config.model_dump(exclude={"validation", "seed"}, exclude_none=True)
        file = RunFile.model_validate(values | {"seeds": best.point.seeds})
        title = f"the best of {counted(len(told), 'trial')} by {self._metric}, {100 * value:.2f} %"
        file_text = run_file_text(file, f"{title} on images held out of training; not tested yet")
        make_folder(self.folder / study.point.name)
        write_chunks(self.folder / place, [file_text.encode()])


@contextmanager
def _said_to(log: Path) -> Iterator[None]:
    """Ray prints what befalls nodes and workers, a page at a time, and cannot be told where to."""
    with open_append(log, append=True) as file, redirect_stdout(file):
        yield
    with suppress(OSError):
        if not log.stat().st_size:
            log.unlink()


def problem(ledger: Ledger) -> CairnError | None:
    """What to say if runs did not end well."""
    bad = [job for job in ledger.jobs if job.state in ("failed", "lost")]
    if not bad:
        return None
    return CairnError(
        f"{len(bad)} of {counted(len(ledger.jobs), 'run')} did not end, first {bad[0].name}: {bad[0].reason}; mend it and call again"
    )

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
from cairn.experiment.folder import Call, RunFolder, events_in, locked
from cairn.experiment.schema import RunConfig
from cairn.storage.files import make_folder, open_append, write_chunks
from cairn.sweep.file import Resources, SweepFile
from cairn.sweep.ledger import Job, Ledger, View
from cairn.sweep.plan import Checks, Point, corners, identities, point_with, points_of, stored_runs
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
        memory = int(resources.memory or 0)
        self._needs = {key: n for key, n in (("CPU", resources.cpus), ("GPU", gpus), ("memory", memory)) if n}
        if not any(all(node.get(key, 0) >= amount for key, amount in self._needs.items()) for node in nodes):
            words = {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}
            asked = ", ".join(f"{words[key]} {amount:g}" for key, amount in self._needs.items())
            raise ConfigError(f"{asked}: no node has that much; ask for less")
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": gpus, "memory": memory or None}
        self._task = ray.remote(**options, max_retries=resources.attempts - 1)(attempt_in_ray)
        self._cpus, self._parallel = resources.cpus, resources.parallel
        self._begun: list[Any] = []

    def slots(self) -> int:
        """Runs at once: grows and shrinks with the cluster. One at least, since a node may come back."""
        there = self._ray.cluster_resources()
        room = min(int(there.get(key, 0) / amount + 1e-9) for key, amount in self._needs.items())
        return max(1, min(room, self._parallel or room))

    def submit(self, path: Path, call: dict[str, Any]) -> Future[Outcome]:
        self._begun.append(self._task.remote(path, call, os.getcwd(), self._cpus, "GPU" in self._needs))
        return self._begun[-1].future()

    def cancel(self) -> None:
        """Ask every run to keep its state and end."""
        for reference in self._begun:
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
        resources = file.model_dump(mode="json", include=set(Resources.model_fields))
        search = file.model_dump(mode="json", include={"search"})
        self.ledger = Ledger(folder, {"file": file.path.name, "resources": resources, **search})
        self.same = 0
        """Combinations that are the same run as another."""
        self._checks = Checks()
        self._by_run: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()

    def plan(self) -> list[Point]:
        """Every point of the grid; the ledger then holds their runs, but those of a search. Raises a CairnError for the first
        run, or corner of a search, that would be refused."""
        points, file = points_of(self.file), self.file
        self._names, self._results = stored_runs(self.folder)
        if file.search is None:
            for point in points:
                self._add(point)
            self._checks.forget_data()
            return points
        require_held_out(points)
        for point in points:
            for values in corners(file.search.space):
                trial = point_with(file, point.choice | chosen(values), point.name)
                shown = ", ".join(f"{key}={value}" for key, value in values.items())
                self._checks.settings(trial.config, f"{point.name} with {shown}")
        return points

    def run(self, make_pool: Callable[[Stop], Serial | OnRay] = Serial) -> Ledger:
        """Raises a CairnError for any bad input before anything runs, Interrupted if asked to stop. The ledger tells which
        runs failed."""
        if self.file.search is not None:
            optuna_module()
        points = self.plan()
        with locked(self.folder):
            studies = [] if self.file.search is None else [Study(self.folder, self.file, point) for point in points]
            for study in studies:
                for trial in study.trials():
                    self._take_up(study, trial)
                self._tell(study)
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
            self.ledger.write_table()
        if self.stop.number:
            raise Interrupted(self.stop.number, GOES_ON)
        return self.ledger

    def _add(self, point: Point) -> list[Job]:
        """A job for every seed of a point. A run that another point has already is that one's."""
        jobs, settings = [], self._checks.settings(point.config, point.name).model_dump(mode="json")
        for name, config in point.runs():
            called, same = identities(config, settings)
            if same in self._by_run:
                self.same += 1
            else:
                found = self._names.get(called) or self._names.get(same)
                if found is None:
                    self._require_unused(name, config)
                job = self._by_run[same] = Job(found or name, config, point)
                self.ledger.jobs.append(job)
                job.attempts = attempts_in(self.folder / job.name)
                if (result := self._results.get(job.name)) is not None:
                    self._checks.require_same_data(result, job.name)
                    job.state, job.figures = "finished", figures(result)
                else:
                    self._waiting.append(job)
            jobs.append(self._by_run[same])
        return jobs

    def _require_unused(self, name: str, config: RunConfig) -> None:
        """Raises ResultError for the folder of another run."""
        folder = RunFolder(self.folder / name, self._call(config))
        folder.finished("what all runs share has changed; give another --out")

    def _call(self, config: RunConfig) -> Call:
        return Call(run=config, cache=self.file.cache, checkpoint_seconds=self.file.checkpoint_seconds)

    def _loop(self, pool: Serial | OnRay, study: Study | None) -> None:
        """Every run that waits, and those that a search asks for."""
        going: dict[Future[Outcome], Job] = {}
        cancelled = False
        while True:
            while not self.stop.number and len(going) < pool.slots() and (job := self._next(study)) is not None:
                job.state, job.reason = "running", None
                self.ledger.write("running")
                path, call = (self.folder / job.name).resolve(), self._call(job.config).model_dump(mode="json")
                going[pool.submit(path, call)] = job
            if not going:
                return
            if self.stop.number and not cancelled:
                cancelled, runs = True, counted(len(going), "run")
                self.view.note(f"stopping, once {runs} kept the state (once more to stop at once)")
                pool.cancel()
            for ended in wait(going, timeout=1, return_when=FIRST_COMPLETED).done:
                self._settle(going.pop(ended), outcome_of(ended))
                if study is not None:
                    self._tell(study)
                self.ledger.write("running")

    def _next(self, study: Study | None) -> Job | None:
        while study is not None and not self._waiting and study.left:
            self._take_up(study, study.ask())
            self._tell(study)
        return self._waiting.popleft() if self._waiting else None

    def _settle(self, job: Job, outcome: Outcome) -> None:
        job.reason, job.figures, job.attempts = outcome.reason, outcome.figures, attempts_in(self.folder / job.name)
        if outcome.state != "stopped":
            job.state = outcome.state
        elif self.stop.number:
            job.state = "waiting"
            return
        else:
            job.state, job.reason = "lost", "its worker was told to stop"
        if job.state == "lost":
            job.reason = f"{job.reason}; {job.attempts} attempts were made"
        self.view.ended(job, self.ledger)

    # searching

    def _take_up(self, study: Study, trial: Trial) -> None:
        """The runs of a trial, a new one or one of an earlier call. One that has failed is not tried again."""
        try:
            jobs = self._add(trial.point)
        except ConfigError:  # a combination between corners that were good
            jobs = []
        if trial.state == "RUNNING":
            study.going[trial.number] = jobs
        elif trial.state == "FAIL":
            for job in jobs:
                if job.state == "waiting":
                    texts = [event["text"] for event in events_in(self.folder / job.name) if event["event"] == "error"]
                    job.state, job.reason = "failed", texts[-1] if texts else None
                    self._waiting.remove(job)

    def _tell(self, study: Study) -> None:
        """Trials whose runs have all ended."""
        for number, jobs in list(study.going.items()):
            if all(job.state in ("finished", "failed") for job in jobs):
                values = [job.figures[study.search.metric] for job in jobs if job.figures]
                study.tell(number, sum(values) / len(values) if values and len(values) == len(jobs) else None)

    def _conclude(self, study: Study) -> None:
        """The run file of the best trial."""
        told = [trial for trial in study.trials() if trial.value is not None]
        if not told:
            return
        best = max(told, key=lambda trial: trial.value or 0.0)
        place, metric = Path(study.point.name) / BEST, study.search.metric
        about = {"trial": best.point.name, "metric": metric, "value": best.value, "trials": len(told)}
        self.ledger.best.append({**about, "varies": best.point.varies, "file": place.as_posix()})
        values = best.point.config.model_dump(exclude={"validation", "seed"}, exclude_none=True)
        file = RunFile.model_validate(values | {"seeds": best.point.seeds})
        title = f"the best of {counted(len(told), 'trial')} by {metric}, {100 * (best.value or 0.0):.2f} %"
        text = run_file_text(file, f"{title} on images held out of training; not tested yet")
        make_folder((self.folder / place).parent)
        write_chunks(self.folder / place, [text.encode()])


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

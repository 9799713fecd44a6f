"""Runs on disk: the call, the result, what happened, and the state of one that is not finished. Whole or not at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TextIO

from filelock import FileLock, Timeout
from pydantic import Field

from cairn.classifier.classifier import IncrementalClassifier
from cairn.classifier.folder import NAME, record_of, save_learner
from cairn.classifier.learned import Learned
from cairn.data.descriptions import Descriptions
from cairn.errors import ResultError
from cairn.experiment.metrics import mean_and_deviation
from cairn.experiment.run import Outcome
from cairn.experiment.schema import SCHEMA_VERSION, SEGMENTED, RunConfig, RunResult, comparable_call
from cairn.settings import Given
from cairn.storage.archive import Archive
from cairn.storage.files import make_folder, open_append, read_bytes, read_json, unwritable, write_json
from cairn.storage.schema import validated
from cairn.towers.feature_file import is_features_file
from cairn.towers.fingerprint import same_towers

RESULT, EVENTS, SUMMARY, CALL, LEARNER, CHECKPOINT, LOCK = (
    "result.json", "events.jsonl", "summary.json", "call.json", "learner", "checkpoint", ".lock",
)  # fmt: skip
SUMMARISED = ("any_time", "mIoU", "macro_f1", "micro_f1", "average", "last", "forgetting", "bwt", "seconds")


def read_result(path: Path) -> RunResult:
    """A result from its file or its folder. Raises ResultError for what is missing, damaged or of a newer version."""
    file = path / RESULT if path.is_dir() else path
    stored = read_json(file)
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultError(
            f"'{file}': schema_version {version}, this cairn reads {SCHEMA_VERSION}; use the version that wrote it"
        )
    return validated(RunResult, stored, f"'{file}'")


class Call(Given):
    """What a folder was asked for, as `call.json`: enough to go on with it."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    run: RunConfig
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="one run each, in folders of their own"
    )
    keep_learner: bool = False
    cache: bool = False
    checkpoint_seconds: float = Field(ge=0, allow_inf_nan=False)
    checkpoint_steps: int | None = None
    track: list[str] = Field(default=[], description="trackers that are told as well")
    log_lines: bool = False
    notices: tuple[str, ...] = Field(default=(), description="of the file that the call came from")


def read_call(folder: Path) -> Call:
    """Raises ResultError for a folder in which no run is under way."""
    if not (folder / CALL).is_file():
        finished = next((name for name in (RESULT, SUMMARY) if (folder / name).is_file()), None)
        raise ResultError(
            f"'{folder}': the run is finished, see {finished}"
            if finished
            else f"'{folder}': no {CALL}, so no run was begun there; give the folder of one"
        )
    return validated(
        Call, read_json(folder / CALL), f"'{folder / CALL}'", remedy="use the version that wrote it, or begin again"
    )


class Lock:
    """One writer per folder. The system lets go of the lock when its holder dies, however that happens; who it was stays
    in the file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / LOCK)
        self.stale: str | None = None
        """Who held it and did not let go."""

    def take(self, patience: float = 0) -> Lock:
        """Raises ResultError naming the holder, if that is another process that lives and keeps it for `patience` seconds."""
        path = self.folder / LOCK
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise ResultError(
                f"'{self.folder}' is being written by {self._holder() or 'another process'}; wait for it or give another folder"
            ) from None
        except OSError as error:
            raise unwritable(self.folder, error) from None
        self.stale = self._holder()
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        return self

    def release(self) -> None:
        """Let go once; who took it more than once holds it until the last."""
        if self._lock.lock_counter == 1:
            with suppress(OSError):
                (self.folder / LOCK).unlink()
        self._lock.release()

    def _holder(self) -> str | None:
        with suppress(ResultError):
            return read_bytes(self.folder / LOCK, 1000).decode(errors="replace")[:200].strip() or None
        return None


@contextmanager
def locked(folder: Path, patience: float = 0) -> Iterator[Lock]:
    """A folder for one writer at a time, made where there is none; it goes again if nothing was left in it."""
    make_folder(folder)
    lock = Lock(folder).take(patience)
    try:
        yield lock
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def events_in(folder: Path) -> list[dict[str, Any]]:
    """The events of a run so far, those before it was cut off too; a line that was cut short is left out."""
    found = []
    with suppress(OSError):
        for line in (folder / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict) and "event" in event]


class RunFolder:
    """Where one run writes: `call.json` and `checkpoint/` until it is done, `events.jsonl` as it goes, then `result.json`."""

    def __init__(self, path: Path, call: Call, lock: Lock | None = None):
        """`lock` is the folder's, if the caller has taken it."""
        self.path, self.call = path, call
        self.archive = Archive(path / CHECKPOINT, "run")
        self._events: TextIO | None = None
        self._lock = lock or Lock(path)

    def finished(self, remedy: str = "give another --out or --overwrite") -> RunResult | None:
        """The result that is already there; what a kill after it was written left behind is removed.

        Raises ResultError if another call made it, or is under way here.
        """
        done = (self.path / RESULT).exists()
        if not done and not self.archive:
            return None
        result = read_result(self.path) if done else None
        stored = result or read_call(self.path)
        ours, theirs = (comparable_call(call.model_dump(mode="json")) for call in (self.call.run, stored.run))
        if ours != theirs:
            key = next(key for key in ours if ours[key] != theirs[key])
            raise ResultError(f"'{self.path}' holds another run ({key} {theirs[key]}, not {ours[key]}); {remedy}")
        if result is not None and (self.archive or (self.path / CALL).exists()):
            self._tidy()
        return result

    def _tidy(self) -> None:
        """Remove what led to a result, unless somebody writes here, or nobody may."""
        with suppress(ResultError):
            self._lock.take()
            try:
                if (self.path / RESULT).exists() and not (self.path / CHECKPOINT).is_symlink():
                    self._clear()
            finally:
                self._lock.release()

    @property
    def closed(self) -> bool:
        return self._events is None

    def open(self, overwrite: bool = False) -> str | None:
        """Make the folder and take its lock; who held it and did not let go, if anybody. An unfinished run is gone on with,
        unless `overwrite`. Raises ResultError if it cannot be written, or another process writes there."""
        make_folder(self.path)
        for inner in (CHECKPOINT, LEARNER):  # a folder that somebody else made may lead anywhere
            if (self.path / inner).is_symlink():
                raise ResultError(f"'{self.path / inner}': a link, which is not followed; put a folder in its place")
        self._lock.take()
        for litter in self.path.glob(".*.part"):  # of a writer that was killed
            with suppress(OSError):
                litter.unlink()
        if overwrite:
            self.archive.clear()
        try:
            for left in (RESULT, SEGMENTED):
                (self.path / left).unlink(missing_ok=True)
            self._events = open_append(self.path / EVENTS, append=bool(self.archive))
        except OSError as error:
            self._lock.release()
            raise unwritable(self.path, error, "give another --out") from None
        write_json(self.path / CALL, self.call.model_dump(mode="json"))
        return self._lock.stale

    def keep(self, event: dict[str, Any]) -> None:
        if self._events is None:
            raise RuntimeError(f"'{self.path}' is not open")
        try:
            self._events.write(json.dumps(event, ensure_ascii=False) + "\n")
            self._events.flush()
        except OSError as error:
            raise unwritable(self.path / EVENTS, error, "give another --out") from None

    def write(self, result: RunResult) -> None:
        """The result, in place of what was kept to come to it."""
        write_json(self.path / RESULT, result.model_dump(mode="json"))
        self._clear()

    def _clear(self) -> None:
        self.archive.clear()
        with suppress(OSError):
            (self.path / CALL).unlink()

    def close(self) -> None:
        if self._events is not None:
            with suppress(OSError):  # what could not be written was told when it was
                self._events.close()
            self._events = None
            self._lock.release()


def write_learner(folder: Path, learned: Outcome) -> None:
    """The classifier that a run has made, beside its result. Raises ConfigError for a method that keeps images, ResultError
    where an earlier version began the run and images may show several classes."""
    run, tasks = learned.config, learned.stream.tasks
    if learned.stream.label_sets and learned.sets is None:
        raise ResultError(
            f"'{folder}': begun by an earlier version, which left no image out, so its learner would have no thresholds; --overwrite "
            "to start again"
        )
    found, said = Learned.of_tasks(tasks, learned.calibration, learned.sets), tasks[0].descriptions
    record = record_of(
        run.method,
        learned.method,
        found,
        learned.towers,
        seed=run.seed,
        templates=tasks[0].templates,
        descriptions=said.only(found.classes) if isinstance(said, Descriptions) else None,
        preprocess=run.preprocess,
    )
    save_learner(folder / LEARNER, record, learned.method, found)


def read_learner(folder: Path) -> tuple[RunResult, IncrementalClassifier]:
    """A run's result and the classifier that it kept.

    Raises ResultError where the run kept no learner, it is damaged, or today's towers are not those of the run.
    """
    result = read_result(folder)
    if not Archive(folder / LEARNER, NAME):
        raise ResultError(f"'{folder}': the run kept no learner; run it again with --keep-learner")
    # The features file may lie elsewhere than when the run was made; a path of the call is found from here
    towers = result.run.data if is_features_file(result.run.data) else None
    learner = IncrementalClassifier.load(folder / LEARNER, towers)
    if learner.classes_.tolist() != result.class_order:
        raise ResultError(f"'{folder}': {RESULT} and {LEARNER} are of other classes; run it again with --keep-learner")
    return result, learner


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and values over runs of each figure that all of them have."""
    found = {}
    for key in SUMMARISED:
        values = [value for row in rows if (value := row.get(key)) is not None]
        if values and len(values) == len(rows):
            mean, deviation = mean_and_deviation(values)
            found[key] = {"mean": mean, "deviation": deviation, "values": values}
    return found


def seen_otherwise(result: RunResult, split: str, towers: str) -> str | None:
    """What a run saw that today's is not, `images` or `towers`; None where it saw the same split through the same towers."""
    if result.split != split:
        return "images"
    return None if same_towers(result.towers.fingerprint, towers) else "towers"


def require_one_stream(results: Sequence[RunResult]) -> None:
    """Raises ResultError for runs of one call that saw different images or towers: data has changed since the first was run."""
    first, *others = results
    for other in others:
        if what := seen_otherwise(first, other.split, other.towers.fingerprint):
            raise ResultError(
                f"seed {first.seed} was run on other {what} than seed {other.seed}, so there is no mean of both: run all again with "
                "--overwrite"
            )


def summary(results: Sequence[RunResult]) -> dict[str, Any]:
    """Mean and sample standard deviation over runs that differ in their seed alone. Raises ResultError where they do in more."""
    require_one_stream(results)
    first = results[0]
    rows = list(zip(*(result.seen_accuracy for result in results), strict=True))
    return {
        "schema_version": SCHEMA_VERSION,
        "method": first.method,
        "data": first.data,
        "split": first.split,
        "towers": first.towers.model_dump(),
        "run": first.run.model_dump(mode="json"),
        "seeds": [result.seed for result in results],
        **means([dict(result) for result in results]),
        "seen_accuracy": [mean_and_deviation(values)[0] for values in rows],
    }

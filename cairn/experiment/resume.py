"""How far a run is, kept in a checkpoint so that it can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from pydantic import BaseModel, Field

from cairn.classifier.calibration import Calibration
from cairn.classifier.label_sets import LabelSetRule, LearnedSets, before_any
from cairn.classifier.learned import DECISIONS
from cairn.classifier.stored import copied, restore_checked
from cairn.data.stream import TaskStream
from cairn.data.task import Task
from cairn.errors import CairnError, ResultError, out_of_memory
from cairn.experiment.evaluator import Evaluation
from cairn.experiment.schema import RunConfig, comparable_call
from cairn.methods.catalogue import Entry
from cairn.methods.protocol import KeepsImages, Method
from cairn.storage.archive import Archive
from cairn.storage.schema import Amount, Count, Record, validated
from cairn.storage.versions import changes, versions
from cairn.towers.fingerprint import same_towers
from cairn.towers.protocol import Towers
from cairn.training.context import Checkpoint, Log, Processes
from cairn.types import State


class CheckpointRecord(Record):
    """What a checkpoint says beside its tensors."""

    run: dict[str, Any] = Field(description="the call")
    split: str
    towers: str = Field(description="their fingerprint")
    versions: dict[str, str]
    resumed: Count
    seconds: Amount
    evaluations: list[Evaluation] = Field(description="of every finished part: task, or chunk of one")
    durations: list[Amount] = Field(description="seconds of learning per part, that in progress included")
    passes: dict[str, dict[str, Count]] = Field(description="through the towers, while learning and while evaluating")
    calibration: Calibration = Field(default=Calibration(), description="what the temperature is fitted from")
    label_sets: LabelSetRule | None = Field(
        default=None,
        description="how sets of classes are made of scores, where images may show several; not in older ones",
    )


PARTS = ("learning", "calibrating", "evaluating")


class Course:
    """How far a run is: the method, what was found of it, and what it took. Kept between tasks, or within one."""

    def __init__(
        self,
        config: RunConfig,
        entry: Entry,
        stream: TaskStream,
        towers: Towers,
        settings: BaseModel,
        log: Log,
        world: Processes,
    ):
        self.config, self.entry, self.stream, self.towers, self.log = config, entry, stream, towers, log
        self.settings, self.world = settings, world
        self.method: Method = entry.build(towers, settings, seed=config.seed)
        self.parts = stream.parts()
        self.evaluations: list[Evaluation] = []
        self.calibration = Calibration()
        self.sets: LearnedSets | None = before_any(not self.method.card.label_sets) if stream.label_sets else None
        """Where images may show several classes; None too where an earlier version began, which left none of them out."""
        self.durations: list[float] = []
        self.passes = {part: dict.fromkeys(towers.passes, 0) for part in PARTS}
        self.resumed = 0
        self._began, self._spent = time.perf_counter(), 0.0
        self._archive: Archive | None = None
        self._taken_up = False
        self._learned: State = {}
        self._marks: tuple[float, dict[str, int]] | None = None

    @property
    def done(self) -> int:
        """Parts learned and evaluated: tasks, or chunks of an online stream."""
        return len(self.evaluations)

    @property
    def seconds(self) -> float:
        return self._spent + time.perf_counter() - self._began

    # what it takes

    @contextmanager
    def learning(self) -> Iterator[None]:
        self._mark()
        if len(self.durations) == self.done:
            self.durations.append(0.0)
        try:
            yield
        except CairnError:
            raise
        except Exception as error:
            if not self._taken_up or out_of_memory(error):
                raise
            raise self._misfit(error) from error
        self._take("learning")
        self._marks, self._taken_up = None, False

    @contextmanager
    def passing(self, part: str) -> Iterator[None]:
        """What follows learning: its passes are counted as those of `part`."""
        before = dict(self.towers.passes)
        yield
        self._count(part, before)

    def before(self) -> Callable[[], Method]:
        """Makes a method as this one is now, whatever becomes of this one."""
        build = partial(self.entry.build, self.towers, self.settings, seed=self.config.seed)
        return partial(copied, build, self.method.state_dict(), self._learned_parts()) if self.done else build

    def _learned_parts(self) -> list[Task]:
        return [part.content for part in self.parts[: self.done]]

    def of_tasks(self, values: Sequence[float]) -> list[float]:
        """A value of every part, summed over those of each task."""
        sums = [0.0] * len(self.stream.tasks)
        for part, value in zip(self.parts, values, strict=True):
            sums[part.task] += value
        return sums

    def _mark(self) -> None:
        self._marks = time.perf_counter(), dict(self.towers.passes)

    def _take(self, part: str) -> None:
        """Add what was spent since the mark, if there is one, and mark anew."""
        if self._marks is None:
            return
        since, before = self._marks
        self.durations[-1] += time.perf_counter() - since
        self._count(part, before)
        self._mark()

    def _count(self, part: str, before: dict[str, int]) -> None:
        """Add the passes since then, those of all processes."""
        for own in self.world.all_gather({key: count - before[key] for key, count in self.towers.passes.items()}):
            for key, count in own.items():
                self.passes[part][key] += count

    # on disk

    @property
    def archive(self) -> Archive:
        """Where it is kept."""
        if self._archive is None:
            raise RuntimeError("the run is kept nowhere")
        return self._archive

    def keep(self, checkpoint: Checkpoint, archive: Archive) -> None:
        """Go on with what `archive` holds, and keep what is due there. Raises ResultError for what cannot be gone on with."""
        self._archive = archive
        held = self.world.broadcast_from_main(archive.read)
        work: dict[str, State] = {}
        if held is not None:
            work = dict(held.parts)
            for damaged in held.damaged:
                self.log("warning", text=f"{damaged}; the checkpoint before it is taken")
            try:
                self._restore(held.record, work.pop("learner"), work.pop(DECISIONS, None))
            except ResultError:
                raise
            except Exception as error:
                raise self._misfit(error) from None
            self._taken_up = True
            self.log("resumed", task=self.done, work=sorted(work), seconds=self._spent)
        self.snapshot()
        checkpoint.kept_by(self._write)
        checkpoint.begin(work)

    def _plausible(self) -> bool:
        """Whether what was read has the lengths, names and ranges of what would have been written."""
        kinds = {part: self.towers.passes.keys() for part in PARTS}
        if self.done > len(self.parts) or len(self.durations) - self.done not in (0, 1):
            return False
        return {part: counts.keys() for part, counts in self.passes.items()} == kinds and all(
            len(found.accuracy) == part.task + 1
            and len(found.by_class) == part.content.classes.stop
            and (found.precision is not None) == self.stream.label_sets
            and (found.sets is None or len(found.sets.by_class) == part.content.classes.stop)
            and len(found.correct) == len(found.total)
            and (found.iou is None or len(found.iou) == part.content.classes.stop + 1)
            and all(0 <= right <= number > 0 for right, number in zip(found.correct, found.total, strict=True))
            for part, found in zip(self.parts, self.evaluations, strict=False)
        )

    def _misfit(self, error: Exception) -> ResultError:
        """What comes from outside may hold anything, and some of it shows only when it is learned on."""
        return ResultError(
            f"'{self.archive.folder}': the checkpoint does not fit ({type(error).__name__}: {error}); --overwrite to start "
            "again"
        )

    def snapshot(self) -> None:
        """The method as it is between tasks: where the next one is begun again from."""
        if self._archive is not None:
            self._learned = self.method.state_dict()

    def _write(self, work: dict[str, State]) -> None:
        self._take("learning")
        if self.world.is_main:
            sets = {} if self.sets is None else {DECISIONS: self.sets.state_dict()}
            self.archive.write(self._record(), {"learner": self._learned, **sets, **work})

    def _record(self) -> dict[str, Any]:
        return {
            "run": self.config.model_dump(mode="json"),
            "split": self.stream.fingerprint,
            "towers": self.towers.fingerprint,
            "versions": versions(),
            "resumed": self.resumed,
            "seconds": self.seconds,
            "evaluations": [asdict(found) for found in self.evaluations],
            "durations": self.durations,
            "passes": self.passes,
            "calibration": self.calibration.model_dump(mode="json"),
            **({} if self.sets is None else {"label_sets": self.sets.to_record()}),
        }

    def _restore(self, stored: dict[str, Any], learner: State, decisions: State | None) -> None:
        remedy = "--overwrite to start again"
        record = validated(CheckpointRecord, stored, f"'{self.archive.folder}': the checkpoint", remedy=remedy)
        same = {
            "call": comparable_call(record.run) == comparable_call(self.config.model_dump(mode="json")),
            "data": record.split == self.stream.fingerprint,
            "towers": same_towers(record.towers, self.towers.fingerprint),
        }
        for what, holds in same.items():
            if not holds:
                raise ResultError(
                    f"'{self.archive.folder}': another {what} since the checkpoint was written; --overwrite to start again"
                )
        if changed := changes(record.versions):
            self.log("warning", text=f"versions changed since the run began ({changed}): it would not reproduce")
        self.evaluations, self.durations, self.calibration = record.evaluations, record.durations, record.calibration
        # Those of before there were temperatures have none made for them, and earlier ones none that were continued
        later = {key: 0 for key in ("continued",) if key in self.towers.passes}
        self.passes |= {part: later | counts for part, counts in record.passes.items()}
        self._spent, self.resumed = record.seconds, record.resumed + 1
        if record.label_sets is not None:
            self.sets = LearnedSets.from_state(record.label_sets, decisions)
        elif self.done:
            self.sets = None
        if not self._plausible():
            raise ValueError("a record of other tasks")
        tasks = self._learned_parts()
        known = sum(len(task.classes) for task in tasks) if self.stream.label_sets else -1
        if self.sets is not None and len(self.sets.rule.offsets) != known:
            raise ValueError("decisions on other classes")
        restore_checked(self.method, learner, self.archive.folder, sum(len(task.classes) for task in tasks))
        if isinstance(self.method, KeepsImages):
            self.method.attach_images(tasks)

"""RunConfig in, RunResult out: a method learns a stream and is evaluated after each task. No files, no globals."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from cairn.classifier.calibration import Calibration, keep_left_out, rehearsed
from cairn.classifier.stored import restore_checked
from cairn.config import Settings, choices, with_settings
from cairn.config import settings as every_setting
from cairn.data.catalogue import open_dataset
from cairn.data.feature_store import FeatureStore
from cairn.data.folders import named_unreadable, unreadable
from cairn.data.images import Concatenation, Dataset
from cairn.data.stream import TaskStream, task_stream, without
from cairn.data.templates import prompt_templates
from cairn.errors import CairnError, ConfigError, DataError, NotFinite, ResultError, UnknownName
from cairn.experiment.drift_lab import by_task, drift_rows, relative
from cairn.experiment.evaluator import Evaluation, Evaluator
from cairn.experiment.metrics import average_incremental, backward_transfer, class_mean, forgetting, seen_accuracy
from cairn.experiment.schema import SCHEMA_VERSION, Passes, RunConfig, RunResult, TowersUsed, comparable_call
from cairn.methods.catalogue import Entry, method_named
from cairn.methods.dmc_ot import DmcOtConfig
from cairn.methods.protocol import KeepsImages, Method
from cairn.storage.archive import Archive
from cairn.storage.schema import Amount, Count, Record, validated
from cairn.storage.versions import versions
from cairn.towers.cached import kept
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.feature_file import features_towers
from cairn.towers.features import FeatureTowers
from cairn.towers.fingerprint import same_towers
from cairn.towers.protocol import Towers
from cairn.training.checkpoint import Checkpoint, State
from cairn.training.context import Context
from cairn.training.distributed import World
from cairn.training.log import Log
from cairn.training.seeds import Seeds


def towers_for(config: RunConfig, dataset: Dataset) -> ClipTowers | FeatureTowers:
    """The towers a run asks for; a features file is its own towers. Raises ConfigError if the two do not fit."""
    held = dataset.embeddings
    if held is None:
        spec = "tiny" if config.towers == "auto" else config.towers
        return load_towers(
            spec,
            device=config.device,
            precision=config.precision,
            preprocess=config.preprocess,
            revision=config.revision,
        )
    if config.towers not in ("auto", "features"):
        raise ConfigError(
            f"towers '{config.towers}': data '{config.data}' holds embeddings, not images; leave --towers out"
        )
    return features_towers(dataset, config.data)


def stream_for(config: RunConfig, dataset: Dataset) -> TaskStream:
    return task_stream(
        dataset, base=config.base, step=config.step, order=config.order, limit_train=config.limit_train,
        limit_test=config.limit_test, validation=config.validation,
    )  # fmt: skip


class Prepared(NamedTuple):
    """What a run needs, found good before anything is learned."""

    entry: Entry
    stream: TaskStream
    towers: Towers
    settings: Settings


def prepared(config: RunConfig) -> Prepared:
    """Raises a CairnError for any bad input."""
    entry = method_named(config.method)
    dataset = prompted(open_dataset(config.data), config.template)
    stream = stream_for(config, dataset)
    towers = towers_for(config, dataset)
    stream = replace(stream, notices=(*stream.notices, *towers.notices))
    settings = with_settings(entry.default_config(towers), config.settings)
    stream = readable(stream, skip=config.on_bad_image == "skip")
    return Prepared(entry, stream, towers, settings)


def tower_stands(entry: Entry, settings: Settings) -> bool:
    """Whether the method takes embeddings of the image tower as it is, of the images as they are, and keeps no image."""
    tunings = {value for path, value, _ in every_setting(settings) if path.rpartition(".")[2] == "tuning"}
    return tunings <= {"none", "adapter"} and not settings.alters_images and entry.card.keeps != "images"


class Learned(NamedTuple):
    """What a run leaves besides numbers. `towers` are those of the method without its cache."""

    config: RunConfig
    method: Method
    stream: TaskStream
    towers: Towers
    calibration: Calibration


def run_stream(
    config: RunConfig,
    log: Log | None = None,
    learned: Callable[[Learned], Any] | None = None,
    store: FeatureStore | None = None,
    checkpoint: Checkpoint | None = None,
    archive: Archive | None = None,
) -> RunResult:
    """Learn every task in turn, evaluating after each. Raises a CairnError for any bad input before training starts.

    `learned` is called when the last task is done, for who wants more than numbers. Where the method leaves the image tower
    as it is, embeddings are looked up in `store`, if one is given, and kept there. With `archive`, the state is kept there
    whenever `checkpoint` finds it due, and a run that it holds is gone on with: on a CPU the result is the same to the bit,
    apart from times and passes. With the `world` of `checkpoint` it is one process of several, all of which call this alike;
    the first alone writes.
    """
    log, checkpoint = log or Log(), checkpoint or Checkpoint()
    world = checkpoint.world
    entry, stream, towers, settings = prepared(config)
    loaded = towers
    if world.world_size > 1:
        _shareable(settings, world)
        _alike(stream, towers, world)
    for notice in stream.notices:
        log("notice", text=notice)
    if store is not None:
        if towers.has_images and tower_stands(entry, settings):
            stream, towers = kept(stream, towers, store)
        else:
            reason = f"{entry.name} needs the images" if towers.has_images else "embeddings are given"
            log("notice", text=f"the cache is not used: {reason}")
    if not towers.has_images and entry.has_embedding_form:
        log("notice", text=f"features file, no image tower: {entry.name} runs in its embedding form, a residual linear "
            "adapter in stage 1 and residual class texts in stage 2")  # fmt: skip
    log(
        "start",
        method=entry.name,
        data=stream.name,
        tasks=len(stream.tasks),
        classes=len(stream.class_names),
        seed=config.seed,
        config=settings.model_dump(mode="json"),
    )
    course = _Course(config, entry, stream, towers, settings, log, world)
    if archive is not None:
        course.keep(checkpoint, archive)
    method, ctx = course.method, Context(Seeds(config.seed), log, checkpoint)
    evaluator = Evaluator(stream, towers, between=checkpoint.poll, exemplar_free=entry.card.exemplar_free, world=world)
    for task in stream.tasks[course.done :]:
        before = course.before()
        keep_left_out(task, ctx)
        with course.learning():
            try:
                method.learn(task, ctx)
            except NotFinite as error:
                place = "" if str(error).startswith("task") else f"task {task.index}: "
                raise NotFinite(f"{place}{error}") from None
        with course.passing("calibrating"):
            left_out = rehearsed(method, before, task, ctx)
            calibration = course.calibration.with_images(left_out)
        with course.passing("evaluating"):
            found = evaluator.after(task.index, method, calibration)
        course.evaluations.append(found)
        course.calibration = calibration
        seen = sum(found.correct) / sum(found.total)
        log("task", task=task.index, seconds=course.durations[-1], accuracy=found.accuracy, seen=seen,
            future=found.future, zero_shot=found.zero_shot, memory_bytes=method.memory_bytes)  # fmt: skip
        if found.zero_shot is not None and seen < found.zero_shot:
            log("warning", text=f"after task {task.index}: {100 * seen:.2f} % is below the {100 * found.zero_shot:.2f} % of "
                "zero-shot, so learning did harm; a lower learning rate is the first thing to try")  # fmt: skip
        course.snapshot()
        checkpoint.begin()

    if learned is not None and world.is_main:
        learned(Learned(config, method, stream, loaded, course.calibration))
    B, evaluations = len(stream.tasks), course.evaluations
    table = [[*e.accuracy, *[None] * (B - len(e.accuracy))] for e in evaluations]
    sizes = [len(test) for test in stream.tests]
    seen = seen_accuracy(table, sizes)
    return RunResult(
        method=entry.name,
        exemplar_free=entry.card.exemplar_free,
        config=settings.model_dump(mode="json"),
        run=config,
        data=stream.name,
        split=stream.fingerprint,
        towers=TowersUsed(name=towers.name, fingerprint=towers.fingerprint, revision=towers.revision),
        class_order=list(stream.class_names),
        task_sizes=[len(task.classes) for task in stream.tasks],
        test_sizes=sizes,
        base=config.base,
        step=config.step,
        seed=config.seed,
        accuracy=table,
        seen_accuracy=seen,
        seen_accuracy_by_class=[class_mean(e.correct, e.total) for e in evaluations],
        future_accuracy=[e.future for e in evaluations],
        ece=[e.ece for e in evaluations],
        nll=[e.nll for e in evaluations],
        temperature=[e.temperature for e in evaluations],
        zero_shot_accuracy=[e.zero_shot for e in evaluations],
        average=average_incremental(seen),
        last=seen[-1],
        forgetting=forgetting(table),
        bwt=backward_transfer(table),
        seconds=course.seconds,
        seconds_per_task=course.durations,
        resumed=course.resumed,
        processes=world.world_size,
        peak_rss_bytes=max(world.all_gather(_peak_rss())),
        memory_bytes=method.memory_bytes,
        tower_passes=Passes(**course.passes["learning"]),
        evaluation_passes=Passes(**course.passes["evaluating"]),
        calibration_passes=Passes(**course.passes["calibrating"]),
        device=str(towers.device),
        precision=towers.precision,
        versions=versions(),
    )


class CheckpointRecord(Record):
    """What a checkpoint says beside its tensors."""

    run: dict[str, Any] = Field(description="the call")
    split: str
    towers: str = Field(description="their fingerprint")
    versions: dict[str, str]
    resumed: Count
    seconds: Amount
    evaluations: list[Evaluation] = Field(description="of every finished task")
    durations: list[Amount] = Field(description="seconds of learning per task, that in progress included")
    passes: dict[str, dict[str, Count]] = Field(description="through the towers, while learning and while evaluating")
    calibration: Calibration = Field(default=Calibration(), description="what the temperature is fitted from")


PARTS = ("learning", "calibrating", "evaluating")


class _Course:
    """How far a run is: the method, what was found of it, and what it took. Kept between tasks, or within one."""

    def __init__(
        self, config: RunConfig, entry: Entry, stream: TaskStream, towers: Towers, settings: BaseModel, log: Log, world: World
    ):  # fmt: skip
        self.config, self.entry, self.stream, self.towers, self.log = config, entry, stream, towers, log
        self.settings, self.world = settings, world
        self.method: Method = entry.build(towers, settings, seed=config.seed)
        self.evaluations: list[Evaluation] = []
        self.calibration = Calibration()
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
        """Tasks learned and evaluated."""
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
            if not self._taken_up:
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
        state, done = self.method.state_dict(), self.done

        def same() -> Method:
            method = self.entry.build(self.towers, self.settings, seed=self.config.seed)
            if done:
                method.load_state_dict(state)
            if isinstance(method, KeepsImages):
                method.attach_images(self.stream.tasks[:done])
            return method

        return same

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
                self._restore(held.record, work.pop("learner"))
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
        tasks, kinds = self.stream.tasks, {part: self.towers.passes.keys() for part in PARTS}
        if self.done > len(tasks) or len(self.durations) - self.done not in (0, 1):
            return False
        return {part: counts.keys() for part, counts in self.passes.items()} == kinds and all(
            len(found.accuracy) == task.index + 1
            and len(found.correct) == len(found.total) == task.classes.stop
            and all(0 <= accuracy <= 1 for accuracy in found.accuracy)
            and all(0 <= right <= number > 0 for right, number in zip(found.correct, found.total, strict=True))
            for task, found in zip(tasks, self.evaluations, strict=False)
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
            self.archive.write(self._record(), {"learner": self._learned, **work})

    def _record(self) -> dict[str, Any]:
        return {
            "run": self.config.model_dump(mode="json"), "split": self.stream.fingerprint,
            "towers": self.towers.fingerprint, "versions": versions(), "resumed": self.resumed, "seconds": self.seconds,
            "evaluations": [asdict(found) for found in self.evaluations], "durations": self.durations,
            "passes": self.passes, "calibration": self.calibration.model_dump(mode="json"),
        }  # fmt: skip

    def _restore(self, stored: dict[str, Any], learner: State) -> None:
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
        if (then := record.versions) != (now := versions()):
            changed = ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key])
            self.log("warning", text=f"versions changed since the run began ({changed}): it would not reproduce")
        self.evaluations, self.durations, self.calibration = record.evaluations, record.durations, record.calibration
        self.passes |= record.passes  # those of before there were temperatures have none made for them
        self._spent, self.resumed = record.seconds, record.resumed + 1
        if not self._plausible():
            raise ValueError("a record of other tasks")
        restore_checked(
            self.method, learner, self.archive.folder, sum(len(t.classes) for t in self.stream.tasks[: self.done])
        )
        if isinstance(self.method, KeepsImages):
            self.method.attach_images(self.stream.tasks[: self.done])


WHOLE_BATCHES = ("text_anchor_contrast",)
"""Settings that weigh a loss in which the images of a batch depend on one another."""


def _shareable(settings: BaseModel, world: World) -> None:
    """Raises ConfigError for a loss of which no process can compute its share."""
    for path, value, _ in every_setting(settings):
        if path.rpartition(".")[2] in WHOLE_BATCHES and value:
            raise ConfigError(
                f"{path} {value}: looks at whole batches, of which each of {world.world_size} processes has a part; set it to 0, or "
                "run one process"
            )


def _alike(stream: TaskStream, towers: Towers, world: World) -> None:
    """Raises ConfigError if the processes do not start from the same. All of them come to this, or none goes on."""
    here = {"data": stream.fingerprint, "towers": towers.fingerprint, "precision": towers.precision} | versions()
    for rank, there in enumerate(everyone := world.all_gather(here)):
        for key, value in there.items():
            if value != everyone[0][key]:
                raise ConfigError(
                    f"{key}: process {rank} has {value}, the first {everyone[0][key]}; give all of them the same"
                )


def drift_report(
    config: RunConfig, estimators: Sequence[str], seeds: Sequence[int], log: Log | None = None
) -> dict[str, Any]:
    """The drift laboratory on a stream: every estimator's errors and accuracies, for each seed, as JSON values.

    `config.method` must be dmc-ot, whose settings apply. Raises UnknownName for an unknown estimator.
    """
    log = log or Log()
    entry, stream, towers, settings = prepared(config)
    if not isinstance(settings, DmcOtConfig):
        raise ConfigError(f"method '{entry.name}': the drift laboratory compares estimators of dmc-ot")
    family = choices(entry.config.model_fields["drift"])
    for name in estimators:
        if name not in family:
            raise UnknownName("estimator", name, family)
    chosen = {name: family[name]() for name in dict.fromkeys(["none", *estimators])}
    for notice in stream.notices:
        log("notice", text=notice)
    rows, figures = [], []
    for seed in seeds:
        log(
            "start",
            method="drift laboratory",
            data=stream.name,
            tasks=len(stream.tasks),
            classes=len(stream.class_names),
            seed=seed,
        )
        more = drift_rows(stream, towers, settings, chosen, seed=seed, log=log)
        rows += more[0]
        figures += more[1]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": config.model_dump(mode="json"),
        "config": settings.model_dump(mode="json"),
        "estimators": {name: drift.model_dump(mode="json") for name, drift in chosen.items()},
        "data": stream.name,
        "split": stream.fingerprint,
        "towers": {"name": towers.name, "fingerprint": towers.fingerprint},
        "seeds": list(seeds),
        "relative": relative(rows, figures),
        "rows": by_task(rows),
        "versions": versions(),
    }


def prompted(dataset: Dataset, template: str | None) -> Dataset:
    """The data set with one template in place of its own, if one is given."""
    if template is None:
        return dataset
    templates = prompt_templates(template, "template")
    if dataset.embeddings is not None:
        raise ConfigError(
            f"template '{template}': data '{dataset.name}' holds embeddings of texts; leave --template out"
        )
    return replace(dataset, templates=templates)


def readable(stream: TaskStream, skip: bool) -> TaskStream:
    """The stream without the image files that cannot be read, which a notice names; unless `skip`, a DataError does."""
    whole = Concatenation(stream.collections)
    bad = unreadable(whole)
    if not bad:
        return stream
    named = named_unreadable(whole, bad)
    if not skip:
        raise DataError(
            f"data '{stream.name}': {named}; repair or remove them, or leave them out with --on-bad-image skip"
        )
    starts = np.cumsum([0, *map(len, stream.collections)])
    found = [[row - start for row in bad if start <= row < stop] for start, stop in pairwise(starts)]
    return replace(without(stream, found), notices=(*stream.notices, f"left out: {named}"))


def _peak_rss() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024

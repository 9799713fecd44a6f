"""RunConfig in, RunResult out: a method learns a stream and is evaluated after each task. No files, no globals."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cairn.classifier.calibration import Calibration, foreseen, keep_left_out, own_left_out, unlearned
from cairn.classifier.label_set_learning import LeavingOut
from cairn.classifier.label_sets import LearnedSets
from cairn.classifier.self_training import learn_with_unlabelled
from cairn.data.feature_store import FeatureStore
from cairn.data.stream import Part, TaskStream
from cairn.data.task import Task
from cairn.errors import NotFinite
from cairn.experiment.evaluator import Evaluation, Evaluator
from cairn.experiment.inputs import prepared, require_alike, require_online, require_shareable, tower_stands
from cairn.experiment.metrics import (
    any_time,
    average_incremental,
    backward_transfer,
    forgetting,
    mean_of_known,
    seen_accuracy,
)
from cairn.experiment.resume import Course
from cairn.experiment.schema import Passes, RunConfig, RunResult, TowersUsed
from cairn.maths.frequency import by_frequency
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.protocol import ChoosesRanks, GaussianScoring, Method, without_labels_unused
from cairn.storage.archive import Archive
from cairn.storage.versions import versions
from cairn.towers.cached import kept
from cairn.towers.protocol import Towers
from cairn.training.context import Checkpoint, Context, Log, Seeds


class Outcome(NamedTuple):
    """What a run leaves besides numbers. `towers` are those of the method without its cache."""

    config: RunConfig
    method: Method
    stream: TaskStream
    towers: Towers
    calibration: Calibration
    sets: LearnedSets | None = None
    """Where images may show several classes: what makes sets of scores."""


def run_stream(
    config: RunConfig,
    log: Log | None = None,
    learned: Callable[[Outcome], Any] | None = None,
    store: FeatureStore | None = None,
    checkpoint: Checkpoint | None = None,
    archive: Archive | None = None,
) -> RunResult:
    """Learn every task in turn, of an online stream chunk after chunk, evaluating after each. Raises a CairnError for any bad
    input before training starts.

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
        require_shareable(settings, world)
        require_alike(stream, towers, world)
    notices = [*stream.notices]
    if store is not None:
        if towers.has_images and tower_stands(entry, settings):
            stream, towers = kept(stream, towers, store)
        else:
            reason = f"{entry.name} needs the images" if towers.has_images else "embeddings are given"
            notices.append(f"the cache is not used: {reason}")
    if not towers.has_images and entry.has_embedding_form:
        notices.append(
            f"features file, no image tower: {entry.name} runs in its embedding form, a residual linear "
            "adapter in stage 1 and residual class texts in stage 2"
        )
    course = Course(config, entry, stream, towers, settings, log, world)
    if stream.chunk is not None:
        require_online(entry, course.method)
    for text in notices:
        log("notice", text=text)
    log(
        "start",
        method=entry.name,
        data=stream.name,
        tasks=len(stream.tasks),
        classes=len(stream.class_names),
        seed=config.seed,
        config=settings.model_dump(mode="json"),
    )
    memory = course.method.memory if isinstance(course.method, GaussianScoring) else None
    if isinstance(memory, GaussianMemory) and (text := memory.foreseen(len(stream.class_names))) is not None:
        log("notice", text=text)
    hidden = [len(task.unlabelled or ()) for task in stream.tasks]
    share = config.pseudo_labels
    if share is None and (unused := without_labels_unused(entry.name, course.method, sum(hidden))):
        log("notice", text=unused)
    if archive is not None:
        course.keep(checkpoint, archive)
    method, ctx = course.method, Context(Seeds(config.seed), log, checkpoint)
    evaluator = Evaluator(stream, towers, between=checkpoint.poll, exemplar_free=entry.card.exemplar_free, world=world)
    online = stream.chunk is not None
    for part in course.parts[course.done :]:
        task = part.content
        before, ahead, sets = course.before(), None, course.sets
        leaving_out = None if sets is None else _leaving_out(task, method, ctx)
        if online:
            with course.passing("calibrating"):
                ahead = foreseen(method, task)
        elif leaving_out is not None:
            leaving_out.keep_features()
        elif not stream.label_sets:
            keep_left_out(task, ctx)
        with course.learning():
            try:
                if share is None:
                    method.learn(task, ctx)
                else:
                    learn_with_unlabelled(method, before, task, share, ctx)
            except NotFinite as error:
                place = "" if str(error).startswith("task") else f"task {task.index}: "
                raise NotFinite(f"{place}{error}") from None
        with course.passing("calibrating"):
            if online:
                left_out = ahead or own_left_out(method)
            else:
                left_out = None if stream.label_sets else unlearned(method, before, task, ctx)
            calibration = course.calibration.with_images(left_out)
            if sets is not None and leaving_out is not None:
                sets = leaving_out.told(sets, before)
        with course.passing("evaluating"):
            found = evaluator.after(part.task, method, calibration, whole=part.last, sets=sets)
        course.evaluations.append(found)
        course.calibration, course.sets = calibration, sets
        _tell(log, course, part, found)
        course.snapshot()
        checkpoint.begin()

    if learned is not None and world.is_main:
        learned(Outcome(config, method, stream, loaded, course.calibration, course.sets))
    B = len(stream.tasks)
    evaluations = [found for part, found in zip(course.parts, course.evaluations, strict=True) if part.last]
    chunks = [len(part.content.train) for part in course.parts] if online else []
    curve = [found.seen for found in course.evaluations] if online else []
    table = [_row(e.accuracy, B) for e in evaluations]
    said = [e.sets for e in evaluations if e.sets is not None]
    said = said if len(said) == B else []  # of a run that an earlier version began some tasks have none
    sizes, classes = [len(test) for test in stream.tests], [len(task.classes) for task in stream.tasks]
    seen = seen_accuracy(table, classes if stream.label_sets else sizes)
    images = _images_by_class(stream)
    grouped = by_frequency([value or 0.0 for value in evaluations[-1].by_class], images)
    return RunResult(
        method=entry.name,
        exemplar_free=entry.card.exemplar_free,
        config=settings.model_dump(mode="json"),
        run=config,
        data=stream.name,
        split=stream.fingerprint,
        towers=TowersUsed(name=towers.name, fingerprint=towers.fingerprint, revision=towers.revision),
        class_order=list(stream.class_names),
        task_sizes=classes,
        test_sizes=sizes,
        base=config.base,
        step=config.step,
        seed=config.seed,
        accuracy=table,
        seen_accuracy=seen,
        seen_accuracy_by_class=[mean_of_known(e.by_class) for e in evaluations],
        metric="mAP" if stream.label_sets else "accuracy",
        precision_by_class=evaluations[-1].precision,
        macro_f1=said[-1].macro_seen if said else None,
        micro_f1=said[-1].micro_seen if said else None,
        seen_macro_f1=[one.macro_seen for one in said],
        seen_micro_f1=[one.micro_seen for one in said],
        macro_f1_by_task=[_row(one.macro, B) for one in said],
        micro_f1_by_task=[_row(one.micro, B) for one in said],
        f1_by_class=said[-1].by_class if said else None,
        thresholds=said[-1].thresholds if said else None,
        train_sizes=images,
        unlabelled_sizes=hidden if any(hidden) else [],
        last_by_frequency=grouped.means if grouped else None,
        frequency_terciles=grouped is not None and grouped.terciles,
        future_accuracy=[e.future for e in evaluations],
        ece=[e.ece for e in evaluations],
        ece_by_chance=[e.ece_by_chance for e in evaluations],
        nll=[e.nll for e in evaluations],
        temperature=[e.temperature for e in evaluations],
        zero_shot_accuracy=[e.zero_shot for e in evaluations],
        chunk_sizes=chunks,
        chunk_accuracy=curve,
        any_time=any_time(curve, chunks) if online else None,
        mIoU=None if evaluations[-1].iou is None else mean_of_known(evaluations[-1].iou),
        iou_by_class=evaluations[-1].iou,
        average=average_incremental(seen),
        last=seen[-1],
        forgetting=forgetting(table),
        bwt=backward_transfer(table),
        seconds=course.seconds,
        seconds_per_task=course.of_tasks(course.durations),
        resumed=course.resumed,
        processes=world.world_size,
        peak_rss_bytes=max(world.all_gather(_peak_rss())),
        memory_bytes=method.memory_bytes,
        ranks=list(method.ranks) if isinstance(method, ChoosesRanks) else None,
        tower_passes=Passes(**course.passes["learning"]),
        evaluation_passes=Passes(**course.passes["evaluating"]),
        calibration_passes=Passes(**course.passes["calibrating"]),
        device=str(towers.device),
        precision=towers.precision,
        versions=versions(),
    )


def _leaving_out(task: Task, method: Method, ctx: Context) -> LeavingOut:
    """Of a task whose images may show several classes, what is told of its own."""
    assert task.label_sets is not None
    return LeavingOut(task, task.label_sets.targets, method, ctx)


def _row(values: Sequence[float | None], tasks: int) -> list[float | None]:
    """Of a table: after a task, of tasks that came later nothing."""
    return [*values, *[None] * (tasks - len(values))]


def _tell(log: Log, course: Course, part: Part, found: Evaluation) -> None:
    """What was found after a part: a task, or a chunk of one."""
    seen = found.seen
    if course.stream.chunk is not None:
        log("chunk", chunk=part.content.index, task=part.task, images=len(part.content.train), seen=seen)
    if not part.last:
        return
    log(
        "task",
        task=part.task,
        seconds=sum(
            spent for other, spent in zip(course.parts, course.durations, strict=False) if other.task == part.task
        ),
        accuracy=found.accuracy,
        seen=seen,
        future=found.future,
        zero_shot=found.zero_shot,
        memory_bytes=course.method.memory_bytes,
    )
    if found.zero_shot is not None and seen < found.zero_shot:
        log(
            "warning",
            text=f"after task {part.task}: {100 * seen:.2f} % is below the {100 * found.zero_shot:.2f} % of "
            "zero-shot, so learning did harm; a lower learning rate is the first thing to try",
        )


def _images_by_class(stream: TaskStream) -> list[int]:
    labels = np.concatenate([np.asarray(task.train.labels) for task in stream.tasks])
    return np.bincount(labels, minlength=len(stream.class_names)).tolist()


def _peak_rss() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024

"""RunConfig in, RunResult out: a method learns a stream and is evaluated after each task. No files, no globals."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from cairn.data.catalogue import open_dataset
from cairn.data.feature_store import FeatureStore
from cairn.data.folders import unreadable
from cairn.data.images import Concatenation, Dataset
from cairn.data.stream import TaskStream, task_stream
from cairn.errors import ConfigError, DataError, UnknownName
from cairn.evaluation.evaluate import Evaluation, Evaluator
from cairn.evaluation.laboratory import drift_rows, relative
from cairn.evaluation.metrics import average_incremental, backward_transfer, class_mean, forgetting, seen_accuracy
from cairn.kept import kept
from cairn.methods.catalogue import Entry, method_named
from cairn.methods.protocol import Method
from cairn.methods.settings import choices, with_settings
from cairn.towers.catalogue import load_towers
from cairn.towers.features import FeatureTowers
from cairn.towers.protocol import Towers
from cairn.training.log import Log

SCHEMA_VERSION = 1


class RunConfig(BaseModel):
    """Everything that decides a run's numbers. Two runs with equal configs and versions give equal results on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="name in the table of methods")
    data: str = Field("shapes", description="data set, as written after --data")
    towers: str = Field(
        "auto", description="towers, as written after --towers; auto: tiny, or the features file itself"
    )
    base: int = Field(0, description="classes of the first task; 0: like the others")
    step: int = Field(10, description="classes per task")
    order: str = Field("natural", description="natural, seed:N or a file of class names")
    seed: int = Field(1, ge=0, description="moves every random choice but the class order")
    settings: tuple[str, ...] = Field((), description="the method's settings that were changed, key=value")
    limit_train: int | None = Field(None, description="training images per class at most")
    limit_test: int | None = Field(None, description="test images per class at most")
    validation: float = Field(
        0.0, description="share of the training images that stands in for the test split; 0: none"
    )
    device: str = Field("auto", description="torch device")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic inside the towers")
    preprocess: Literal["crop", "squash"] = Field("crop", description="how images are brought to the towers' size")
    revision: str | None = Field(None, description="revision of the towers on the hub")


class TowersUsed(BaseModel):
    name: str
    fingerprint: str = Field(description="16 hex digits over weights, activation and preprocessing")
    revision: str | None = None


class Passes(BaseModel):
    images: int = Field(description="images through the vision tower, forward")
    text_tokens: int = Field(description="tokens through the text tower, forward")
    stored: int = Field(0, description="images whose embeddings a feature store held, in place of a pass")


class RunResult(BaseModel):
    """What a run leaves, as `result.json`. Accuracies are in [0, 1]; B tasks, rows and columns numbered from 0."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    method: str
    exemplar_free: bool = Field(description="false if the method keeps images")
    config: dict[str, Any] = Field(description="every setting of the method, defaults included")
    run: RunConfig = Field(description="the call that made this")
    data: str
    split: str = Field(description="fingerprint of which images are in which task")
    towers: TowersUsed
    class_order: list[str] = Field(description="class names in order of arrival")
    task_sizes: list[int] = Field(description="classes per task")
    test_sizes: list[int] = Field(description="test images per task")
    base: int
    step: int
    seed: int
    accuracy: list[list[float | None]] = Field(description="A[i][j]: after task i, on task j; null for j > i")
    seen_accuracy: list[float] = Field(description="A_i: after task i, over all test images of classes seen")
    seen_accuracy_by_class: list[float] = Field(description="the same, every class weighing alike")
    future_accuracy: list[float | None] = Field(description="zero-shot, after task i, among the classes still to come")
    average: float = Field(description="average incremental accuracy, the mean of seen_accuracy")
    last: float = Field(description="the last of seen_accuracy")
    forgetting: float | None = Field(description="null with a single task")
    bwt: float | None = Field(description="backward transfer; null with a single task")
    seconds: float = Field(description="wall-clock time, learning and evaluation")
    seconds_per_task: list[float] = Field(description="of learning alone")
    peak_rss_bytes: int = Field(description="largest resident memory of the process")
    memory_bytes: int = Field(description="kept of old classes beyond trained parameters, after the last task")
    tower_passes: Passes = Field(description="while learning")
    evaluation_passes: Passes
    device: str
    versions: dict[str, str]


def versions() -> dict[str, str]:
    packages = ("cairn", "torch", "transformers", "peft", "numpy", "safetensors")
    found = {name: metadata.version(name) for name in packages}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def towers_for(config: RunConfig, dataset: Dataset) -> Towers:
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
    return FeatureTowers(
        name=held.name, dim=held.dim, logit_scale=held.logit_scale, fingerprint=held.fingerprint,
        names=dataset.classes, text=held.text,
    )  # fmt: skip


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
    settings: BaseModel


def prepared(config: RunConfig) -> Prepared:
    """Raises a CairnError for any bad input."""
    entry = method_named(config.method)
    dataset = open_dataset(config.data)
    stream = stream_for(config, dataset)
    towers = towers_for(config, dataset)
    settings = with_settings(entry.default_config(towers), config.settings)
    _refuse_unreadable(stream)
    return Prepared(entry, stream, towers, settings)


def tower_stands(entry: Entry, settings: BaseModel) -> bool:
    """Whether the method takes embeddings of the image tower as it is, of the images as they are, and keeps no image."""
    tuning = settings.stage1.tuning.kind if hasattr(settings, "stage1") else "none"
    alters = tuning != "none" and getattr(settings, "probes", 0) > 0
    return tuning in ("none", "adapter") and not alters and entry.exemplar_free


def run_stream(
    config: RunConfig,
    log: Log | None = None,
    learned: Callable[[Method], Any] | None = None,
    store: FeatureStore | None = None,
) -> RunResult:
    """Learn every task in turn, evaluating after each. Raises a CairnError for any bad input before training starts.

    `learned` is called with the method when the last task is done, for who wants more than its numbers. Where the method
    leaves the image tower as it is, embeddings are looked up in `store`, if one is given, and kept there.
    """
    log = log or Log()
    entry, stream, towers, settings = prepared(config)
    for notice in stream.notices:
        log("notice", text=notice)
    if store is not None:
        if towers.has_images and tower_stands(entry, settings):
            stream, towers = kept(stream, towers, store)
        else:
            reason = f"{entry.name} needs the images" if towers.has_images else "embeddings are given"
            log("notice", text=f"the cache is not used: {reason}")
    if not towers.has_images and hasattr(entry.config, "embedding"):
        log("notice", text=f"features file, no image tower: {entry.name} runs in its embedding form, a residual linear "
            "adapter in stage 1 and residual class texts in stage 2")  # fmt: skip
    method = entry.build(towers, settings, seed=config.seed, log=log)
    evaluator = Evaluator(stream, towers)
    log(
        "start",
        method=entry.name,
        data=stream.name,
        tasks=len(stream.tasks),
        classes=len(stream.class_names),
        seed=config.seed,
    )

    began = time.perf_counter()
    evaluations: list[Evaluation] = []
    durations, learning, evaluating = [], dict.fromkeys(towers.passes, 0), dict.fromkeys(towers.passes, 0)
    for task in stream.tasks:
        before = dict(towers.passes)
        mark = time.perf_counter()
        method.learn(task)
        durations.append(time.perf_counter() - mark)
        between = dict(towers.passes)
        evaluations.append(evaluator.after(task.index, method))
        for key in learning:
            learning[key] += between[key] - before[key]
            evaluating[key] += towers.passes[key] - between[key]
        sizes = [len(test) for test in stream.tests[: task.index + 1]]
        seen = seen_accuracy([[*e.accuracy] for e in evaluations], sizes)[-1]
        log("task", task=task.index, seconds=durations[-1], accuracy=evaluations[-1].accuracy, seen=seen,
            future=evaluations[-1].future, memory_bytes=method.memory_bytes)  # fmt: skip

    if learned is not None:
        learned(method)
    B = len(stream.tasks)
    table = [[*e.accuracy, *[None] * (B - len(e.accuracy))] for e in evaluations]
    sizes = [len(test) for test in stream.tests]
    seen = seen_accuracy(table, sizes)
    return RunResult(
        method=entry.name,
        exemplar_free=entry.exemplar_free,
        config=settings.model_dump(mode="json"),
        run=config,
        data=stream.name,
        split=stream.fingerprint,
        towers=TowersUsed(name=towers.name, fingerprint=towers.fingerprint, revision=getattr(towers, "revision", None)),
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
        average=average_incremental(seen),
        last=seen[-1],
        forgetting=forgetting(table),
        bwt=backward_transfer(table),
        seconds=time.perf_counter() - began,
        seconds_per_task=durations,
        peak_rss_bytes=_peak_rss(),
        memory_bytes=method.memory_bytes,
        tower_passes=Passes(**learning),
        evaluation_passes=Passes(**evaluating),
        device=str(getattr(towers, "device", torch.device("cpu"))),
        versions=versions(),
    )


def drift_report(
    config: RunConfig, estimators: Sequence[str], seeds: Sequence[int], log: Log | None = None
) -> dict[str, Any]:
    """The drift laboratory on a stream: every estimator's errors and accuracies, for each seed, as JSON values.

    `config.method` must be dmc-ot, whose settings apply. Raises UnknownName for an unknown estimator.
    """
    log = log or Log()
    entry, stream, towers, settings = prepared(config)
    family = choices(entry.config.model_fields["drift"])
    for name in estimators:
        if name not in family:
            raise UnknownName("estimator", name, family)
    chosen = {name: family[name]() for name in dict.fromkeys(["none", *estimators])}
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
        "rows": rows,
        "versions": versions(),
    }


def _refuse_unreadable(stream: TaskStream) -> None:
    """Raises DataError listing the image files that cannot be opened, before anything is learned."""
    bad = unreadable(Concatenation([*(task.train for task in stream.tasks), *stream.tests]))
    if bad:
        shown = ", ".join(bad[:5]) + (" ..." if len(bad) > 5 else "")
        raise DataError(f"data '{stream.name}': {len(bad)} unreadable image(s): {shown}; repair or remove them")


def _peak_rss() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024

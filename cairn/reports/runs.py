"""Stored runs as a report needs them: checked, gathered over seeds into lines, and lines into streams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cairn.errors import ResultError, one_line
from cairn.experiment.schema import SCHEMA_VERSION, SEGMENTED
from cairn.maths.frequency import Frequency
from cairn.reports.formats import Estimate, estimate
from cairn.reports.tables import Result, files_below, label, settings_of, stream_keys
from cairn.storage.files import read_bytes, read_json
from cairn.storage.schema import Amount, Difference, Share, validated

EVENT_BYTES = 256 * 2**20
"""A longer event log is passed over."""


# --- files ------------------------------------------------------------------------------------------------------------


class _Towers(BaseModel):
    name: str = "?"
    fingerprint: str
    revision: str | None = None


class _Call(BaseModel):
    model_config = ConfigDict(extra="allow")

    settings: list[str] | dict[str, Any] = []
    precision: str = "float32"


class _Stored(BaseModel):
    """What a report reads of `result.json`. Unknown keys are passed over; what it can do without has a default."""

    schema_version: int = SCHEMA_VERSION
    method: str
    exemplar_free: bool = True
    config: dict[str, Any] = {}
    run: _Call = _Call()
    data: str
    split: str
    towers: _Towers
    class_order: list[str] = []
    task_sizes: list[Annotated[int, Field(ge=1, le=10**9)]] = Field(min_length=1)
    seed: int
    metric: Literal["accuracy", "mAP"] = "accuracy"
    accuracy: list[list[Share | None]] = []
    seen_accuracy: list[Share]
    last_by_frequency: dict[Frequency, Share] | None = None
    train_sizes: list[int] = []
    unlabelled_sizes: list[int] = []
    chunk_sizes: list[int] = []
    chunk_accuracy: list[Share] = []
    any_time: Share | None = None
    mIoU: Share | None = None
    macro_f1: Share | None = None
    micro_f1: Share | None = None
    seen_macro_f1: list[Share | None] = []
    seen_micro_f1: list[Share | None] = []
    future_accuracy: list[Share | None] = []
    zero_shot_accuracy: list[Share | None] = []
    average: Share
    last: Share
    forgetting: Difference | None = None
    bwt: Difference | None = None
    seconds: Amount | None = None
    seconds_per_task: list[Amount] = []
    resumed: int = 0
    peak_rss_bytes: Amount | None = None
    memory_bytes: Amount | None = None
    tower_passes: dict[str, Amount] = {}
    evaluation_passes: dict[str, Amount] = {}
    device: str = "?"
    precision: str | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> _Stored:
        tasks = len(self.task_sizes)
        if len(self.seen_accuracy) != tasks:
            raise ValueError(f"seen_accuracy has {len(self.seen_accuracy)} values for {tasks} tasks")
        for key in (
            "accuracy",
            "future_accuracy",
            "zero_shot_accuracy",
            "seconds_per_task",
            "seen_macro_f1",
            "seen_micro_f1",
        ):
            if (given := len(getattr(self, key))) not in (0, tasks):
                raise ValueError(f"{key} has {given} values for {tasks} tasks")
        if len(self.chunk_accuracy) != len(self.chunk_sizes):
            raise ValueError(f"chunk_accuracy has {len(self.chunk_accuracy)} values for {len(self.chunk_sizes)} chunks")
        for i, row in enumerate(self.accuracy):
            if len(row) != tasks or None in row[: i + 1]:
                raise ValueError(f"accuracy, row {i}: must be {tasks} values, the first {i + 1} of them numbers")
        return self


Picture = Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/]+=*$")]


class _Region(BaseModel):
    name: str
    colour: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
    found: Share
    true: Share | None


class _Segmented(BaseModel):
    name: str = Field(alias="class")
    panels: dict[Literal["picture", "found", "true"], Picture]
    regions: list[_Region]


class _AllSegmented(BaseModel):
    """The same of `segmented.json`."""

    schema_version: int = SCHEMA_VERSION
    pictures: list[_Segmented]


class _Place(BaseModel):
    estimator: str
    seed: int


class _Error(_Place):
    mean_error: Amount
    covariance_error: Amount
    bures_error: Amount


class _Relative(_Place):
    mean_error: Amount | None
    covariance_error: Amount | None
    bures_error: Amount | None
    average: Share
    last: Share


class _AtTask(_Error):
    task: int


class _Drift(BaseModel):
    """The same of `drift.json`."""

    schema_version: int = SCHEMA_VERSION
    data: str
    split: str = "?"
    towers: _Towers
    seeds: list[int] = Field(min_length=1)
    relative: list[_Relative] = Field(min_length=1)
    rows: list[_AtTask]


def _read(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    """The file's content in this form. Raises ResultError for what is damaged, or of a newer version."""
    stored = read_json(path, links=True)
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ResultError(
            f"'{path}': schema_version {version}, this report reads up to {SCHEMA_VERSION}; use the version that wrote it"
        )
    return validated(form, stored, f"'{path}'").model_dump()


def read_results(folders: Iterable[Path]) -> list[Result]:
    """Every result at or below the folders, with its `path`, as `waiting` the share of training spent waiting for data if the
    run's events lie beside it, and as `segmented` the pictures that it has segmented."""
    return [
        _read(path, _Stored)
        | {
            "path": path,
            "waiting": _waiting(path.with_name("events.jsonl")),
            "segmented": _segmented(path.with_name(SEGMENTED)),
        }
        for path in files_below(folders, "result.json")
    ]


def _segmented(path: Path) -> list[dict[str, Any]]:
    return _read(path, _AllSegmented)["pictures"] if path.is_file() else []


def read_drifts(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every report of the drift laboratory at or below the folders."""
    return [_read(path, _Drift) for path in files_below(folders, "drift.json")]


def _waiting(path: Path) -> float | None:
    """Of the seconds of all epochs those spent waiting for data; None without events. A line that was cut off when its
    run was killed is passed over."""
    waited = seconds = 0.0
    with suppress(ResultError):
        for line in read_bytes(path, EVENT_BYTES).splitlines():
            with suppress(ValueError, RecursionError, KeyError, TypeError):
                event = json.loads(line)
                if event["event"] == "epoch":
                    waited, seconds = waited + float(event["waited"]), seconds + float(event["seconds"])
    return min(max(waited / seconds, 0.0), 1.0) if seconds > 0 else None


# --- gathered ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The runs of one method with the same settings on one stream: one per seed, unless one was given twice."""

    label: str
    runs: Sequence[Result]

    @property
    def first(self) -> Result:
        return self.runs[0]

    def over_tasks(self, key: str, factor: float = 1) -> list[Estimate | None]:
        """A list of a result, place by place over seeds; empty if no run has it."""
        held = [run[key] for run in self.runs if run[key]]
        return [estimate(values, factor) for values in zip(*held, strict=True)]

    def accuracy(self) -> list[list[float]]:
        """A, mean over seeds, row i with i + 1 values; empty if no run has it."""
        held = [run["accuracy"] for run in self.runs if run["accuracy"]]
        tasks = len(self.first["task_sizes"]) if held else 0
        return [[sum(A[i][j] for A in held) / len(held) for j in range(i + 1)] for i in range(tasks)]

    def forgetting_of_tasks(self, factor: float = 1) -> list[Estimate | None]:
        """max_{j <= l < B-1} A[l][j] - A[B-1][j] for every task j but the last: what `forgetting` is the mean of."""
        held = [run["accuracy"] for run in self.runs if run["accuracy"]]
        tasks = len(self.first["task_sizes"]) if held else 0
        return [
            estimate([max(A[i][j] for i in range(j, tasks - 1)) - A[-1][j] for A in held], factor)
            for j in range(tasks - 1)
        ]


@dataclass(frozen=True)
class Stream:
    """Lines that saw the same images in the same order through the same towers, the best last accuracy first.
    `found` is the line that was found first."""

    lines: Sequence[Line]
    found: Line
    number: int = 1
    of: int = 1

    @property
    def first(self) -> Result:
        return self.lines[0].first

    @property
    def runs(self) -> list[Result]:
        return [run for line in self.lines for run in line.runs]

    @property
    def metric(self) -> str:
        """What was measured, as a title begins."""
        return "mAP" if self.first["metric"] == "mAP" else "Accuracy"

    @property
    def classes_seen(self) -> list[int]:
        """After each task."""
        sizes = self.first["task_sizes"]
        return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def streams_of(results: Sequence[Result]) -> list[Stream]:
    """The runs by stream, in the order found."""
    found: dict[tuple, dict[str, list[Result]]] = {}
    for result, key in zip(results, stream_keys(results), strict=True):
        groups = found.setdefault((*key.values(), *result["task_sizes"]), {})
        learner = json.dumps([result["method"], settings_of(result), result["config"]], sort_keys=True)
        groups.setdefault(learner, []).append(result)
    streams = []
    for number, groups in enumerate(found.values(), start=1):
        lines = _named(list(groups.values()))
        best_first = sorted(lines, key=lambda line: -sum(run["last"] for run in line.runs) / len(line.runs))
        streams.append(Stream(best_first, lines[0], number, len(found)))
    return streams


def _named(groups: Sequence[list[Result]]) -> list[Line]:
    """Lines with names of their own: where the call is the same and the settings are not, say, because a default has
    changed between versions, the settings that differ are part of the name; where nothing helps, a number is."""
    lines: list[Line] = []
    for runs in groups:
        name = label(runs[0])
        same = [others[0]["config"] for others in groups if label(others[0]) == name]
        if apart := differing([flat(config) for config in same], absent=True):
            own = flat(runs[0]["config"])
            name += " [" + ", ".join(f"{key}={own.get(key, 'absent')}" for key in apart) + "]"
        name = one_line(name)
        if name in {line.label for line in lines}:
            name += f" ({len(lines) + 1})"
        lines.append(Line(name, runs))
    return lines


def flat(value: Any, path: str = "") -> dict[str, str]:
    """Settings as dotted path and text."""
    if isinstance(value, dict) and (value or not path):
        return {
            inner: text
            for key, part in value.items()
            for inner, text in flat(part, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}


def differing(facts: Sequence[dict[str, str]], absent: bool = False) -> list[str]:
    """The keys whose value is not the same in all that have them, in the order of their first appearance; with `absent`,
    also those that some lack."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    return [key for key in keys if len({fact.get(key) for fact in facts if absent or key in fact}) > 1]

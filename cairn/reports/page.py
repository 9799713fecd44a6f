"""A page that compares runs, and its figures and tables as files. Stored results in; torch is not needed.

The page is one file: it asks for nothing and runs nothing. The same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from cairn.errors import UnknownName, counted
from cairn.reports.cautions import Caution, remarks, warnings
from cairn.reports.drift import errors_by_task, estimator_table
from cairn.reports.figures import BOUND, UNTOUCHED, Chart, Series, Style, curves, matrix, styles
from cairn.reports.formats import FORMS, Cell, Column, Estimate, Table, estimate
from cairn.reports.runs import Line, Stream, differing, flat, read_drifts, read_results, streams_of
from cairn.reports.tables import (
    Result,
    differences_known,
    gains_table,
    none_below,
    seed_list,
    summary_table,
    used_precision,
)
from cairn.reports.templates import rendered
from cairn.storage.files import make_folder, write_chunks

MATRICES = 8
"""More of them are folded away."""

DRIFT_ERRORS = (
    ("mean_error", "Error of the means"),
    ("covariance_error", "Error of the covariances"),
    ("bures_error", "Bures error of the covariances"),
)


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    style: Style
    key: int


@dataclass(frozen=True)
class Settings:
    """Facts side by side, a row each and a column per line; `differing` names those that are not the same everywhere."""

    table: Table
    differing: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A stream, or a report of the drift laboratory, as the page shows it. `facts` hold for all of it."""

    name: str
    title: str
    facts: Sequence[tuple[str, str]]
    keys: Sequence[Key]
    charts: Sequence[Chart]
    tables: dict[str, Table]
    matrices: Sequence[Chart] = ()
    settings: Settings | None = None
    provenance: Settings | None = None
    reference: str | None = None
    metric: str = "Accuracy"
    segmented: Sequence[tuple[str, Sequence[dict[str, Any]]]] = ()
    """Of each line that segments, pictures of what its first run found."""
    tasks: Sequence[Sequence[str]] = ()
    """Names of the classes of each task."""


@dataclass(frozen=True)
class Page:
    title: str
    summary: str
    warnings: Sequence[Caution]
    remarks: Sequence[Caution]
    streams: Sequence[Part]
    drifts: Sequence[Part]

    @property
    def parts(self) -> list[Part]:
        return [*self.streams, *self.drifts]

    def html(self) -> str:
        """Raises ConfigError if Jinja2 is missing."""
        return rendered("page.html.jinja", "report", page=self, folded=MATRICES)

    def write_files(self, folder: Path) -> list[Path]:
        """Figures as PNG and SVG; tables, and what the figures show, as Markdown, LaTeX and CSV."""
        make_folder(folder)
        written = []
        for part in self.parts:
            charts = (*part.charts, *part.matrices)
            tables = {f"{part.name}{name}": table for name, table in part.tables.items()}
            if part.settings is not None:
                tables[f"{part.name}settings"] = part.settings.table
            for name, table in (tables | {chart.name: chart.table for chart in charts}).items():
                for suffix, form in FORMS.items():
                    written.append(folder / f"{name}.{suffix}")
                    write_chunks(written[-1], [f"{form(table)}\n".encode()])
            for chart in charts:
                written += chart.write(folder)
        return written


def page_of(folders: Iterable[Path], reference: str | None = None) -> Page:
    """The page of all results and drift reports at or below the folders. Differences are to `reference`, a row's name or a
    method; without one, to the first method found.

    Raises ResultError if there is nothing, or what there is cannot be read; UnknownName for a reference that is not there.
    """
    folders = list(folders)
    results, drifts = read_results(folders), read_drifts(folders)
    if not results and not drifts:
        raise none_below(folders, "result.json or drift.json")
    streams = streams_of(results)
    lines = [line for stream in streams for line in stream.lines]
    if reference and not any(_called(stream.lines, reference) for stream in streams):
        raise UnknownName("reference", reference, dict.fromkeys(line.label for line in lines))
    keys = _keys(lines)
    data = dict.fromkeys(held["data"] for held in (*results, *drifts))
    counts = (
        (len(results), "run"),
        (len({line.label for line in lines}), "method"),
        (len(streams), "stream"),
        (len(drifts), "drift report"),
    )
    return Page(
        title=", ".join(data),
        summary=", ".join(f"{n} {what}{'s' if n > 1 else ''}" for n, what in counts if n),
        warnings=warnings(streams),
        remarks=remarks(streams),
        streams=[_stream_part(stream, keys, reference) for stream in streams],
        drifts=[_drift_part(report, number) for number, report in enumerate(drifts, start=1)],
    )


def _called(lines: Sequence[Line], name: str) -> Line | None:
    """The line of that name, or else the best of that method."""
    by_name = (line for line in lines if line.label == name)
    return next(by_name, next((line for line in lines if line.first["method"] == name), None))


def _keys(lines: Iterable[Line]) -> dict[str, Key]:
    """A style per name, the same on all streams. Zero-shot and joint training are no colours: they frame the others."""
    found: dict[str, Key] = {}
    framing, free = {"zero-shot": UNTOUCHED, "joint": BOUND}, styles()
    for line in lines:
        if line.label not in found:
            style = framing.pop(line.first["method"], None) or next(free)
            found[line.label] = Key(line.label, style, len(found))
    return found


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:40].strip("-.") or "unnamed"


# --- streams ----------------------------------------------------------------------------------------------------------


def _stream_part(stream: Stream, keys: dict[str, Key], reference: str | None) -> Part:
    first = stream.first
    name = f"{stream.number}-{_file_name(first['data'])}-" if stream.of > 1 else ""
    untouched = _untouched(stream, len(keys))
    base = _called(stream.lines, reference or "") or stream.found
    against = {
        f"{line.label} - {base.label}": (line.runs, base.runs)
        for line in stream.lines
        if line is not base and differences_known(line.runs, base.runs) > 1
    }
    tables = {"summary": summary_table({line.label: line.runs for line in stream.lines})}
    if against:
        tables["difference"] = gains_table(against)
    tables["cost"] = _cost_table(stream.lines)
    return Part(
        name=name,
        title=f"{first['data']}: {counted(sum(first['task_sizes']), 'class')} in {counted(len(first['task_sizes']), 'task')}",
        facts=_stream_facts(stream),
        keys=[*(keys[line.label] for line in stream.lines), *(Key(one.label, one.style, one.key) for one in untouched)],
        charts=list(_stream_charts(stream, name, keys, untouched)),
        tables=tables,
        matrices=list(_matrices(stream, name)),
        settings=_side_by_side(stream.lines, lambda run: flat(run["config"]), "setting"),
        provenance=_side_by_side(stream.lines, _origin, "origin"),
        reference=base.label if against else None,
        metric=stream.metric,
        segmented=[(line.label, line.first["segmented"]) for line in stream.lines if line.first["segmented"]],
        tasks=[
            first["class_order"][end - size : end]
            for size, end in zip(first["task_sizes"], stream.classes_seen, strict=True)
        ]
        if first["class_order"]
        else (),
    )


def _stream_facts(stream: Stream) -> list[tuple[str, str]]:
    first, call = stream.first, stream.first["run"]
    towers = first["towers"]
    sizes = sorted(set(first["task_sizes"]))
    facts = [
        ("data", first["data"]),
        ("split", first["split"]),
        ("towers", f"{towers['name']}, {towers['fingerprint']}"),
        ("order", call.get("order")),
        ("classes per task", " to ".join(str(size) for size in (sizes[0], sizes[-1])[: len(sizes)])),
        ("chunks", _chunks(first["chunk_sizes"], call.get("blurry"))),
        ("without labels", _hidden(first["unlabelled_sizes"], first["train_sizes"])),
        ("precision", used_precision(first)),
        ("seeds", ", ".join(map(str, sorted({run["seed"] for run in stream.runs})))),
    ]
    return [(what, str(value)) for what, value in facts if value is not None]


def _hidden(sizes: Sequence[int], labelled: Sequence[int]) -> str | None:
    """What is said of images without labels."""
    return f"{sum(sizes):,} images, beside {sum(labelled):,} with labels" if sizes else None


def _chunks(sizes: Sequence[int], blurry: float | None) -> str | None:
    """What is said of an online stream."""
    if not sizes:
        return None
    borders = f", {100 * blurry:g} % of the images in later tasks" if blurry else ""
    return f"{len(sizes)}, of {min(sizes)} to {max(sizes)} images, each seen once{borders}"


def _stream_charts(stream: Stream, prefix: str, keys: dict[str, Key], untouched: Sequence[Series]) -> Iterator[Chart]:
    seen, tasks = stream.classes_seen, list(range(1, len(stream.classes_seen) + 1))
    noun = stream.first["metric"]
    unit = f"{noun} %"

    def series(x: Sequence[float], of: Callable[[Line], list[Estimate | None]]) -> list[Series]:
        found = []
        for line in stream.lines:
            key, points = keys[line.label], of(line)
            if any(points):
                found.append(Series(line.label, key.style, x[: len(points)], points, key.key))
        return found

    accuracy = [*series(seen, lambda line: line.over_tasks("seen_accuracy", 100)), *untouched]
    yield curves(
        f"{prefix}seen-accuracy",
        f"{stream.metric} over the classes seen",
        "After each task; bands are one sample deviation.",
        accuracy,
        "classes seen",
        unit,
    )
    for kind, over in (("macro", "mean over the classes"), ("micro", "of all decisions together")):
        if said := series(seen, lambda line, kind=kind: line.over_tasks(f"seen_{kind}_f1", 100)):
            yield curves(
                f"{prefix}{kind}-f1",
                f"{kind.capitalize()} F1 over the classes seen",
                f"What images are said to show, {over}; a threshold per class, from training images left out.",
                said,
                "classes seen",
                f"{kind} F1 %",
            )
    images = list(accumulate(stream.first["chunk_sizes"]))
    if online := series(images, lambda line: line.over_tasks("chunk_accuracy", 100)):
        yield curves(
            f"{prefix}any-time-accuracy",
            "Accuracy at any time",
            "After each chunk, over the classes that have come; the area under it is the any-time accuracy.",
            online,
            "images learned",
            "accuracy %",
        )
    if forgotten := series(tasks, lambda line: line.forgetting_of_tasks(100)):
        yield curves(
            f"{prefix}forgetting",
            "Forgetting of each task",
            f"Points from a task's best {noun} before the last task to that at the end.",
            forgotten,
            "task",
            "forgetting, points",
        )
    if future := series(seen, lambda line: line.over_tasks("future_accuracy", 100)):
        yield curves(
            f"{prefix}future-accuracy",
            f"{stream.metric} on classes to come",
            "Zero-shot, of the image encoder as it is by then, among those classes alone.",
            future,
            "classes seen",
            unit,
        )
    if seconds := series(tasks, lambda line: line.over_tasks("seconds_per_task")):
        floor, caption = 0.1, "Of learning alone; less than a tenth is not shown."
        if all(point is None or point.mean < floor for one in seconds for point in one.y):
            floor, caption = 0.0, "Of learning alone; every task took less than a tenth."
        yield curves(
            f"{prefix}seconds", "Seconds per task", caption, seconds, "task", "seconds", logarithmic=True, floor=floor
        )


def _untouched(stream: Stream, key: int) -> list[Series]:
    """The towers as they came, if results tell and no line does."""
    held = next((run["zero_shot_accuracy"] for run in stream.runs if any(run["zero_shot_accuracy"])), None)
    if held is None or any(line.first["method"] == "zero-shot" for line in stream.lines):
        return []
    points = [None if value is None else Estimate(100 * value) for value in held]
    return [Series("towers as they came", UNTOUCHED, stream.classes_seen, points, key)]


def _matrices(stream: Stream, prefix: str) -> Iterator[Chart]:
    for number, line in enumerate(stream.lines, start=1):
        if rows := line.accuracy():
            yield matrix(
                f"{prefix}matrix-{number}-{_file_name(line.label)}",
                line.label,
                f"seeds {seed_list(line.runs)}",
                [[100 * value for value in row] for row in rows],
            )


def _cost_table(lines: Sequence[Line]) -> Table:
    """Time and memory of each line, mean and deviation over seeds."""
    columns: list[Column] = [Column("method")]
    rows: list[list[Cell]] = [[line.label] for line in lines]
    measured = (
        ("seconds", 1, lambda run: run["seconds"]),
        ("seconds per task", 2, lambda run: _mean(run["seconds_per_task"])),
        ("waiting for data %", 1, lambda run: _times(run["waiting"], 100)),
        ("peak memory, MB", 0, lambda run: _times(run["peak_rss_bytes"], 1e-6)),
        ("keeps of old classes, kB", 0, lambda run: _times(run["memory_bytes"], 1e-3)),
        ("images learning", 0, lambda run: run["tower_passes"].get("images")),
        ("images from the cache", 0, lambda run: run["tower_passes"].get("stored")),
        ("text tokens learning", 0, lambda run: run["tower_passes"].get("text_tokens")),
        ("images testing", 0, lambda run: run["evaluation_passes"].get("images")),
        ("text tokens testing", 0, lambda run: run["evaluation_passes"].get("text_tokens")),
    )
    for title, digits, of in measured:
        cells = [_measured([of(run) for run in line.runs]) for line in lines]
        if any(cells):
            columns.append(Column(title, digits))
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    return Table(columns, rows)


def _measured(values: Sequence[float | None]) -> Estimate | None:
    """Without a deviation where there is none: most counts are the same in all runs."""
    return estimate(values[:1] if len(set(values)) == 1 else values)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _origin(run: Result) -> dict[str, str]:
    """Where a run comes from: the call without what names its line, towers, machine, versions."""
    call = {key: value for key, value in run["run"].items() if key not in ("method", "settings", "seed")}
    facts = {
        "seed": run["seed"],
        "call": call,
        "towers": run["towers"],
        "split": run["split"],
        "device": run["device"],
        "times resumed": run["resumed"],
        "versions": run["versions"],
        "file": str(run["path"]),
    }
    return flat(facts)


def _side_by_side(lines: Sequence[Line], facts_of: Callable[[Result], dict[str, str]], title: str) -> Settings:
    """A row per fact, a column per line; where the runs of a line do not agree, all that they say."""
    facts = []
    for line in lines:
        held: dict[str, dict[str, None]] = {}
        for run in line.runs:
            for key, text in facts_of(run).items():
                held.setdefault(key, {})[text] = None
        facts.append({key: ", ".join(texts) for key, texts in held.items()})
    names = dict.fromkeys(key for fact in facts for key in fact)
    columns = [Column(title), *(Column(line.label) for line in lines)]
    return Settings(Table(columns, [[name, *(fact.get(name) for fact in facts)] for name in names]), differing(facts))


# --- drift ------------------------------------------------------------------------------------------------------------


def _drift_part(report: dict[str, Any], number: int) -> Part:
    name = f"drift-{number}-{_file_name(report['data'])}-"
    by_key = {key: errors_by_task(report, key) for key, _ in DRIFT_ERRORS}
    free = styles()
    keys = {
        estimator: Key(estimator, UNTOUCHED if estimator == "none" else next(free), number)
        for number, estimator in enumerate(by_key["mean_error"])
    }
    charts = [
        curves(
            f"{name}{key.replace('_', '-')}",
            title,
            "After each task, summed over old classes.",
            [
                Series(
                    estimator,
                    keys[estimator].style,
                    list(tasks),
                    [estimate(v) for v in tasks.values()],
                    keys[estimator].key,
                )
                for estimator, tasks in by_key[key].items()
                if tasks
            ],
            "after task",
            "squared distance",
            digits=6,
            logarithmic=True,
        )
        for key, title in DRIFT_ERRORS
        if any(by_key[key].values())
    ]
    facts = [
        ("data", report["data"]),
        ("split", report["split"]),
        ("towers", f"{report['towers']['name']}, {report['towers']['fingerprint']}"),
        ("seeds", ", ".join(map(str, report["seeds"]))),
    ]
    table = estimator_table([report])
    return Part(
        name=name,
        title=f"Drift on {report['data']}",
        facts=facts,
        keys=list(keys.values()),
        charts=charts,
        tables={"estimators": Table(table.columns[1:], [row[1:] for row in table.rows])},
    )

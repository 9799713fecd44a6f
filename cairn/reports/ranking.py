"""Methods over several streams: who is best where, and whether they can be told apart at all. torch is not needed.

Source: Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006), sections 3.2.2 and 3.2.4: mean ranks,
Friedman's test, and the critical difference of Nemenyi's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cairn.errors import ResultError, counted
from cairn.experiment.metrics import mean_and_deviation
from cairn.experiment.schema import comparable_call
from cairn.reports.figures import BOUND, INK, UNTOUCHED, Chart, Series, Style, _figure, _look, curves, styles
from cairn.reports.formats import Cell, Column, Estimate, Interval, Table, estimate
from cairn.reports.runs import differing, read_results
from cairn.reports.tables import (
    COMPARED,
    Result,
    differences_known,
    gains,
    label,
    paired,
    seed_list,
    settings_of,
    used_precision,
)
from cairn.reports.templates import rendered
from cairn.towers.fingerprint import completed

Metric = Literal["last", "average"]

ALPHA = 0.05
"""Chance of telling apart what is alike."""

LEGIBLE, FOREMOST = 9, 3
"""Lines that a figure has room for; where there are more, of those that are best at each of its places."""


def stream_name(result: Result) -> str:
    """What a stream is called: its data, and what was made of it. Orders of its classes are not told apart."""
    call, sizes = result["run"], result["task_sizes"]
    said = [result["data"]]
    if (limit := call.get("limit_train")) is not None:
        said.append(f"{counted(limit, 'image')} per class")
    if call.get("base"):
        said.append(f"first task {sizes[0]}")
    if len(sizes) == 1:
        said.append("at once")
    if call.get("stream") == "online":
        said.append("online")
    if (imbalance := call.get("imbalance") or 1.0) != 1.0:
        said.append(f"imbalance {imbalance:g}")
    return ", ".join(said)


SETTING_APART = ("limit_test", "validation", "blurry", "labelled", "unlabelled", "chunk", "template")
"""Of a call, beside what `stream_name` says, what makes another stream of the same data."""


def stream_names(results: Sequence[Result]) -> list[str]:
    """The `stream_name` of each run; where several streams have one name, with what they differ in: towers, tasks, or how images were
    chosen. Their figures do not compare."""
    names, facts = [stream_name(result) for result in results], _facts(results)
    of: dict[str, list[dict[str, str]]] = {}
    for name, own in zip(names, facts, strict=True):
        of.setdefault(name, []).append(own)
    apart = {name: differing(held) for name, held in of.items()}
    return [
        name + (f" [{', '.join(f'{key} {own[key]}' for key in apart[name])}]" if apart[name] else "")
        for name, own in zip(names, facts, strict=True)
    ]


def _facts(results: Sequence[Result]) -> list[dict[str, str]]:
    """What tells apart streams of one name. Towers are the same by their fingerprint, whatever path led to them."""
    whole = completed(result["towers"]["fingerprint"] for result in results)
    towers: dict[str, str] = {}
    found = []
    for result in results:
        mark, sizes, call = whole[result["towers"]["fingerprint"]], result["task_sizes"], comparable_call(result["run"])
        found.append(
            {
                "towers": towers.setdefault(mark, f"{result['towers']['name']} {mark[:8]}"),
                "classes": str(sum(sizes)),
                "step": str(max(sizes[1:] or sizes)),
                "precision": used_precision(result),
                **{key.replace("_", " "): str(call.get(key)) for key in SETTING_APART},
            }
        )
    return found


@dataclass(frozen=True)
class Standings:
    """Runs by stream and method, in the order found. `bounds` are methods that are shown, but take no place. Figures that stand side
    by side are those of class orders that every method of the stream was run in (`alike`)."""

    runs: dict[str, dict[str, list[Result]]]
    metric: Metric
    bounds: tuple[str, ...] = ("joint",)

    @property
    def streams(self) -> list[str]:
        return list(self.runs)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for rows in self.runs.values() for method in rows))

    @property
    def ranked(self) -> list[str]:
        """Methods that were run on every stream."""
        return [m for m in self.methods if m not in self.bounds and all(m in rows for rows in self.runs.values())]

    @cached_property
    def alike(self) -> dict[str, dict[str, list[Result]]]:
        """The runs of each stream in the class orders that all of its methods were run in; all runs where there is none."""
        return {stream: _in_common_orders(rows) for stream, rows in self.runs.items()}

    def value(self, stream: str, method: str) -> Estimate | None:
        """In percent, over seeds and class orders."""
        return estimate([run[self.metric] for run in self.alike[stream].get(method, [])], 100)

    def scores(self) -> list[list[float]]:
        """Means of the ranked methods, a row per stream."""
        return [
            [mean_and_deviation([run[self.metric] for run in self.alike[stream][m]])[0] for m in self.ranked]
            for stream in self.streams
        ]


def _in_common_orders(rows: dict[str, list[Result]]) -> dict[str, list[Result]]:
    def order(run: Result) -> tuple[str, ...]:
        return tuple(run.get("class_order", ()))

    common = set.intersection(*({order(run) for run in runs} for runs in rows.values()))
    return {m: [run for run in runs if order(run) in common] for m, runs in rows.items()} if common else rows


def standings(
    folders: Iterable[Path], metric: Metric = "last", bounds: Sequence[str] = ("joint",), variants: bool = False
) -> Standings:
    """All results at or below the folders; runs with changed settings only with `variants`. A file of descriptions is no changed
    setting, unless a stream has runs of the method with another one, or with none.

    Raises ResultError if there is nothing, or what there is cannot be read.
    """
    runs: dict[str, dict[str, list[Result]]] = {}
    results = [run for run in read_results(list(folders)) if variants or _with_own_settings(run)]
    for stream, run in zip(stream_names(results), results, strict=True):
        runs.setdefault(stream, {}).setdefault(label(run), []).append(run)
    if not runs:
        raise ResultError("no run with a method's own settings there; --variants takes those with changed ones as well")
    return Standings({stream: _called(rows) for stream, rows in runs.items()}, metric, tuple(bounds))


def _with_own_settings(run: Result) -> bool:
    """Whether nothing was changed but the file that says what classes look like, as a data set may say it, too."""
    changed = [setting.partition("=") for setting in settings_of(run)]
    return all(path == "descriptions" and value != "template" for path, _, value in changed)


def _called(rows: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """Runs by label, where one label has a method's own settings by the method's name."""
    own = Counter(some[0]["method"] for some in rows.values() if _with_own_settings(some[0]))
    return {
        some[0]["method"] if _with_own_settings(some[0]) and own[some[0]["method"]] == 1 else name: some
        for name, some in rows.items()
    }


# --- statistics -------------------------------------------------------------------------------------------------------


def mean_ranks(scores: Sequence[Sequence[float]]) -> list[float]:
    """R_j = 1/N sum_i r_ij over N rows, 1 for the largest of a row; ties share the mean of their places."""
    import numpy as np
    from scipy.stats import rankdata

    return np.mean([rankdata([-value for value in row]) for row in scores], axis=0).tolist()


def friedman_p(scores: Sequence[Sequence[float]]) -> float | None:
    """Probability of mean ranks as different as these if all k methods were alike; None for fewer than three methods or two rows, or
    where every row has one value alone."""
    from scipy.stats import friedmanchisquare

    if len(scores) < 2 or len(scores[0]) < 3 or all(len(set(row)) == 1 for row in scores):
        return None
    return float(friedmanchisquare(*zip(*scores, strict=True)).pvalue)


def critical_difference(methods: int, rows: int, alpha: float = ALPHA) -> float:
    """CD = q_alpha sqrt(k (k + 1) / (6 N)), q_alpha of the studentized range over sqrt(2). Two of k methods whose mean ranks over
    N rows are nearer than this cannot be told apart."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * rows))


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[float, float]]:
    """Longest stretches of mean ranks that cannot be told apart, first and last rank of each."""
    places = sorted(ranks)
    spans = [(low, max(high for high in places if high - low < difference)) for low in places]
    kept = [span for span in dict.fromkeys(spans) if span[1] > span[0]]
    return [s for s in kept if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in kept)]


# --- shown ------------------------------------------------------------------------------------------------------------


def ranking_table(found: Standings) -> Table:
    """A row per method, best mean rank first, then those that are not ranked; a column per stream."""
    ranks = dict(zip(found.ranked, mean_ranks(found.scores()), strict=True)) if found.ranked else {}
    order = sorted(ranks, key=lambda method: ranks[method])
    order += [method for method in found.methods if method not in ranks]
    rows: list[list[Cell]] = [
        [
            f"{method} (bound)" if method in found.bounds else method,
            Estimate(ranks[method]) if method in ranks else None,
            *(found.value(stream, method) for stream in found.streams),
        ]
        for method in order
    ]
    return Table([Column("method"), Column("mean rank"), *(Column(stream, 1) for stream in found.streams)], rows)


def best_table(found: Standings) -> Table:
    """A row per stream with a method that is no bound: the best, the next, what it gains over that where both have runs in pairs, and
    in how many class orders; beside them zero-shot and the bounds."""
    beside = [m for m in ("zero-shot", *found.bounds) if m in found.methods]
    rows: list[list[Cell]] = []
    for stream in found.streams:
        means = {
            method: value.mean
            for method in found.runs[stream]
            if method not in found.bounds and (value := found.value(stream, method)) is not None
        }
        if not means:
            continue
        best, *others = sorted(means, key=lambda method: -means[method])
        following = others[0] if others else None
        gain = _gain(found, stream, best, following) if following else None
        told = "-" if gain is None else "yes" if gain.low > 0 else "no"
        orders = "-" if gain is None else str(len(paired(found.runs[stream][best], found.runs[stream][others[0]])))
        shown = [found.value(stream, method) for method in beside]
        rows.append([stream, best, found.value(stream, best), following, gain, told, orders, *shown])
    titles = ("stream", "best", f"{found.metric} %", "next", "gain [95 %]", "told apart", "class orders", *beside)
    return Table([Column(title, 2 if title.startswith("gain") else 1) for title in titles], rows)


def _gain(found: Standings, stream: str, first: str, second: str) -> Interval | None:
    """Over pairs of the same seed and class order; None where there are fewer than two, or seeds move neither method."""
    runs = found.runs[stream]
    if differences_known(runs[first], runs[second]) < 2:
        return None
    return gains(runs[first], runs[second])[COMPARED.index(found.metric)]


def critical_difference_chart(found: Standings) -> Chart | None:
    """Mean ranks on a line; a bar joins what cannot be told apart. None for fewer than two methods on two streams."""
    methods, n = found.ranked, len(found.streams)
    if len(methods) < 2 or n < 2:
        return None
    ranks = mean_ranks(found.scores())
    difference, p = critical_difference(len(methods), n), friedman_p(found.scores())
    said = "" if p is None else f"; Friedman's test: p = {p:.2g}"
    caption = (
        f"Mean ranks of {len(methods)} methods over {counted(n, 'stream')}, by {found.metric} accuracy, 1 the best. Methods under a "
        f"common bar are nearer than the critical difference {difference:.2f} (Nemenyi, 5 %){said}."
    )

    def draw(legend: bool) -> Any:
        with _look("critical-difference"):
            order = sorted(range(len(methods)), key=lambda j: ranks[j])
            groups = cliques(ranks, difference)
            figure = _figure(6.2, 1.1 + 0.22 * ((len(methods) + 1) // 2) + 0.12 * len(groups))
            axis = figure.subplots()
            low, high = 1, len(methods)
            axis.set_xlim(low - 0.2 * (high - low), high + 0.2 * (high - low))
            depth = len(groups) * 0.5 + (len(methods) + 1) // 2 + 0.8
            axis.set_ylim(-depth, 1.2)
            axis.hlines(0, low, high, color=INK, linewidth=1)
            for tick in range(low, high + 1):
                axis.vlines(tick, 0, 0.18, color=INK, linewidth=1)
                axis.text(tick, 0.3, str(tick), ha="center", va="bottom")
            for number, (start, end) in enumerate(groups):
                axis.hlines(-0.3 - 0.5 * number, start - 0.04, end + 0.04, color=INK, linewidth=3)
            half = (len(order) + 1) // 2
            for place, j in enumerate(order):
                left = place < half
                row = place if left else len(order) - 1 - place
                y = -(len(groups) * 0.5 + row + 0.6)
                edge = low - 0.05 * (high - low) if left else high + 0.05 * (high - low)
                axis.plot([ranks[j], ranks[j], edge], [0, y, y], color=INK, linewidth=0.8)
                axis.text(
                    edge,
                    y,
                    f" {methods[j]} ({ranks[j]:.1f}) ",
                    ha="right" if left else "left",
                    va="center",
                    parse_math=False,
                )
            axis.axis("off")
        return figure

    table = Table(
        [Column("method"), Column("mean rank")],
        [[methods[j], Estimate(ranks[j])] for j in sorted(range(len(ranks)), key=ranks.__getitem__)],
    )
    return Chart("critical-difference", "Mean ranks", caption, draw, table)


def few_images_charts(found: Standings) -> list[Chart]:
    """Accuracy by images per class, for each data set of which runs with several numbers of them are there."""
    by_data: dict[str, dict[int, str]] = {}
    for stream, rows in found.runs.items():
        runs = [run for group in rows.values() for run in group]
        limit = runs[0]["run"].get("limit_train")
        each = limit if limit is not None else max((n for run in runs for n in run["train_sizes"]), default=None)
        if each is not None and runs[0]["run"].get("stream") != "online":
            by_data.setdefault(runs[0]["data"], {}).setdefault(each, stream)
    charts = []
    for data, streams in by_data.items():
        if len(streams) < 3:
            continue
        places = sorted(streams)
        everywhere = [m for m in found.methods if sum(m in found.runs[streams[n]] for n in places) == len(places)]
        values = {m: [found.value(streams[n], m) for n in places] for m in everywhere}
        shown = _foremost(values, found.bounds)
        lines, others = (
            [
                Series(m, style, places, values[m], number)
                for number, (m, style) in enumerate(_styled(own, found.bounds))
            ]
            for own in (shown, [m for m in everywhere if m not in shown])
        )
        left = f" Drawn are the {FOREMOST} best at any number, of {len(everywhere)} methods in all." if others else ""
        charts.append(
            curves(
                f"few-images-{data}",
                f"{data}: {found.metric} accuracy by images per class",
                f"{data}: {found.metric} accuracy in percent, by training images per class.{left}",
                lines,
                "training images per class",
                f"{found.metric} accuracy, %",
                doublings=True,
                more=others,
            )
        )
    return charts


def _foremost(values: Mapping[str, Sequence[Estimate | None]], bounds: Sequence[str]) -> list[str]:
    """Bounds, zero-shot and the FOREMOST best at any of the places; all where they are not more than can be told apart by eye."""
    if len(values) <= LEGIBLE:
        return list(values)
    own = [m for m in values if m not in (*bounds, "zero-shot")]
    best = set()
    for place in range(len(next(iter(values.values())))):
        at = {m: point.mean for m in own if (point := values[m][place]) is not None}
        best |= set(sorted(at, key=at.__getitem__)[-FOREMOST:])
    return [m for m in values if m in best or m not in own]


def _styled(methods: Sequence[str], bounds: Sequence[str]) -> list[tuple[str, Style]]:
    others = styles()
    return [(m, UNTOUCHED if m == "zero-shot" else BOUND if m in bounds else next(others)) for m in methods]


def rows_of_runs(found: Standings) -> list[dict[str, Any]]:
    """A row per stream and method, as plain values."""
    rows = []
    for stream, methods in found.runs.items():
        for method, runs in methods.items():
            row: dict[str, Any] = {"stream": stream, "method": method}
            for key in ("average", "last", "forgetting"):
                value = estimate([run[key] for run in runs], 100)
                row[key] = None if value is None else round(value.mean, 2)
                row[f"{key} deviation"] = (
                    None if value is None or value.deviation is None else round(value.deviation, 2)
                )
            memory, seconds = runs[0]["memory_bytes"], estimate([run["seconds"] for run in runs])
            row["keeps, kB"] = None if memory is None else round(memory / 1000)
            row["seconds"] = None if seconds is None else round(seconds.mean)
            row["seeds"] = seed_list(runs)
            rows.append(row)
    return rows


def _keys(chart: Chart, bounds: Sequence[str]) -> list[tuple[str, str]]:
    """The legend of a page: lines by name, with their colours."""
    return [(name, style.page_colour) for name, style in _styled(chart.labels, bounds)]


def ranking_page(found: Standings) -> str:
    """HTML: every result, sorted and filtered by whoever reads it; who is best where; what can be told apart. Raises ConfigError if
    Jinja2 or matplotlib is missing."""
    differences = critical_difference_chart(found)
    charts = [*([differences] if differences else []), *few_images_charts(found)]
    best, ranking = best_table(found), ranking_table(found)
    return rendered(
        "ranking.html.jinja",
        "rank",
        charts=[(chart, chart.svg(), _keys(chart, found.bounds)) for chart in charts],
        tables=[
            ("Who is best where", best.titles, best.texts()),
            (f"{found.metric.capitalize()} accuracy by stream, percent", ranking.titles, ranking.texts()),
        ],
        rows=rows_of_runs(found),
        streams=found.streams,
    )

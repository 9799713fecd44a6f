"""Figures of a report: curves over tasks and accuracy matrices, as SVG within a page and as files.

Colours are told apart by colour-blind readers. Words from files are drawn as they are, never as formulas.
"""

from __future__ import annotations

import html
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn.errors import ConfigError
from cairn.reports.formats import Cell, Column, Estimate, Table
from cairn.reports.patches import COLOURS
from cairn.storage.distribution import extra_remedy
from cairn.storage.files import write_chunks

PALETTE = tuple(COLOURS[i] for i in (4, 5, 2, 6, 1, 0))
"""Those that stand out on white and on black."""

INK, RULE = "#1c2330", "#d5dae1"
"""Of text and of grids; in a page they are its own, light or dark."""

DASHES = ((), (5, 2), (1.2, 1.4), (6, 1.6, 1.2, 1.6))
MARKERS = "osD^vPX"
LINE = 1.7
LETTERS = 60
"""Longest name in a figure; the page has it in full."""

FEW = 30
"""Tasks up to which every one has its mark."""

TICKS = 12
"""That have room on an axis."""

MANY = 12
"""Lines beyond which they are drawn thin."""

READABLE = 12
"""Tasks up to which a matrix shows its numbers."""


@dataclass(frozen=True)
class Style:
    colour: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def page_colour(self) -> str:
        return "var(--ink)" if self.colour == INK else self.colour

    @property
    def page_dashes(self) -> str:
        return " ".join(f"{LINE * length:.1f}" for length in self.dashes) or "none"


UNTOUCHED = Style(INK, DASHES[2], "")
"""Zero-shot, or an estimator that does nothing."""

BOUND = Style(INK, DASHES[1], "")
"""Joint training."""


def styles() -> Iterator[Style]:
    """Without end: colours first, then dashes; marks go round at their own pace."""
    for i in itertools.count():
        yield Style(PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)], MARKERS[i % len(MARKERS)])


@dataclass(frozen=True)
class Series:
    """One line of a figure: estimates at places from left to right, None where there is none."""

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[Estimate | None]
    key: int = 0
    """Number of the line on its page: what shows it in one figure shows it in all."""


@dataclass(frozen=True)
class Chart:
    """A figure that can be drawn with or without its legend, and the numbers in it."""

    name: str
    title: str
    caption: str
    draw: Callable[[bool], Any]
    table: Table
    labels: Sequence[str] = ()

    def svg(self) -> str:
        """For a page: without its own ground, letters and legend; lines have the class of their key and say their name."""
        text = _drawn(self.draw(False), self.name, "svg", ground=False).decode()
        text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
        text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
        text = re.sub(r'<g id="(?!line-|band-)[^"]*"', "<g", text)
        text = re.sub(
            r'<g id="(?:line|band)-(\d+)-(\d+)">',
            lambda found: f'<g class="k{found[1]}"><title>{html.escape(self.labels[int(found[2])])}</title>',
            text,
        )
        for colour, name in ((INK, "ink"), (RULE, "rule")):
            text = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{name})", text)
        return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.title)}" ', 1)

    def write(self, folder: Path) -> list[Path]:
        """The figure as PNG and SVG, with its legend. Raises ResultError if the folder cannot be written."""
        paths = [folder / f"{self.name}.{kind}" for kind in ("png", "svg")]
        figure = self.draw(True)
        for path in paths:
            write_chunks(path, [_drawn(figure, self.name, path.suffix[1:])])
        return paths


def _drawn(figure: Any, name: str, kind: str, ground: bool = True) -> bytes:
    """The file. The same figure gives the same bytes: no date, and marks named after the figure."""
    file = io.BytesIO()
    plain = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with _look(name):
        figure.savefig(file, format=kind, dpi=200, metadata=plain, transparent=not ground)
    return file.getvalue()


@contextmanager
def _look(name: str) -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the reader's own are. Raises ConfigError if it is missing."""
    try:
        import matplotlib.style
    except ImportError:
        raise ConfigError(f"report: matplotlib is missing; {extra_remedy('report')}") from None
    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.titlesize": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": RULE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a reader's fonts may have it
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def short(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS // 2]} … {text[-LETTERS // 2 :]}"


def curves(
    name: str,
    title: str,
    caption: str,
    series: Sequence[Series],
    x: str,
    y: str,
    digits: int = 2,
    logarithmic: bool = False,
    floor: float = float("-inf"),
    doublings: bool = False,
    more: Sequence[Series] = (),
) -> Chart:
    """A line per series with a band of one deviation to each side, and the table of its numbers: a row per series.

    Means below `floor`, and the series in `more`, are in the table alone. The axis is logarithmic only where something positive is
    drawn. With `doublings` places twice as far on stand as far apart everywhere.
    """
    logarithmic = logarithmic and any(
        point and point.mean > 0 and point.mean >= floor for one in series for point in one.y
    )

    def draw(legend: bool) -> Any:
        with _look(name):
            rows = -(-len(series) // _columns(series)) if legend else 0
            figure = _figure(4.6, 2.9 + 0.17 * rows)
            axis = figure.subplots()
            handles = _lines(axis, series, logarithmic, floor)
            _axes(axis, x, y)
            if doublings:
                axis.set_xscale("log", base=2)
                axis.set_xticks(sorted({place for one in series for place in one.x}))
                axis.minorticks_off()
                axis.xaxis.set_major_formatter("{x:g}")
            else:
                _ticks(axis.xaxis, [place for one in series for place in one.x])
            if logarithmic:
                _logarithmic(axis)
            if legend:
                _legend(figure, handles, [one.label for one in series], _columns(series))
        return figure

    return Chart(name, title, caption, draw, _numbers([*series, *more], x, digits), [one.label for one in series])


def _lines(axis: Any, series: Sequence[Series], logarithmic: bool, floor: float) -> list[Any]:
    """Bands and lines; returns what a legend points at, one per series."""
    shown = [[point if point and point.mean >= floor else None for point in one.y] for one in series]
    lowest = min((point.mean for points in shown for point in points if point), default=0.0)
    width, handles = LINE if len(series) <= MANY else 0.7 * LINE, []
    for i, (one, points) in enumerate(zip(series, shown, strict=True)):
        mean = [point.mean if point else float("nan") for point in points]
        spread = [point.deviation or 0.0 if point else 0.0 for point in points]
        if any(spread):
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            if logarithmic:  # where a deviation is larger than its mean there is no lower end
                low = [max(value, lowest) for value in low]
            axis.fill_between(
                one.x, low, high, color=one.style.colour, alpha=0.14, linewidth=0, gid=f"band-{one.key}-{i}"
            )
        alone = "o" if len(one.x) == 1 else ""
        handles += axis.plot(
            one.x,
            mean,
            color=one.style.colour,
            linewidth=width,
            linestyle=(0, one.style.dashes),
            markersize=3.4,
            marker=(one.style.marker if len(one.x) <= FEW else "") or alone,
            gid=f"line-{one.key}-{i}",
        )
    return handles


def _axes(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(axis="y")


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import NullFormatter

    axis.set_yscale("log", nonpositive="clip")
    bottom, top = axis.get_ylim()
    if bottom >= 1e-3:  # else powers of ten are easier to read
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if top < 8 * bottom else NullFormatter())


def _ticks(axis: Any, places: Iterable[float]) -> None:
    """At every place, if there is room for that; else at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    places = sorted(set(places))
    gaps = [after - before for before, after in itertools.pairwise(places)]
    if not gaps or TICKS * min(gaps) >= places[-1] - places[0]:
        axis.set_ticks(places)
    else:
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _columns(series: Sequence[Series]) -> int:
    """Of the legend: as many as its names leave room for."""
    longest = max(len(short(one.label)) for one in series)
    return 1 if longest > 28 else 2 if longest > 14 else 3


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    legend = figure.legend(handles, list(map(short, labels)), loc="outside lower left", ncols=columns, handlelength=3.2)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _numbers(series: Sequence[Series], x: str, digits: int) -> Table:
    places = sorted({place for one in series for place in one.x})
    rows: list[list[Cell]] = []
    for one in series:
        held = dict(zip(one.x, one.y, strict=True))
        rows.append([one.label, *(held.get(place) for place in places)])
    return Table([Column(f"by {x.removeprefix('after ')}"), *(Column(f"{place:g}", digits) for place in places)], rows)


def matrix(name: str, title: str, caption: str, accuracy: Sequence[Sequence[float]]) -> Chart:
    """Accuracies in percent, rows of growing length: after each task, on each task so far."""
    tasks = len(accuracy)

    def draw(legend: bool) -> Any:
        import numpy as np

        values = np.full((tasks, tasks), np.nan)
        for i, row in enumerate(accuracy):
            values[i, : i + 1] = row
        with _look(name):
            figure = _figure(3.6, 2.95)
            axis = figure.subplots()
            image = axis.imshow(
                values,
                vmin=0,
                vmax=100,
                cmap="cividis",
                interpolation="none",
                extent=(0.5, tasks + 0.5, tasks + 0.5, 0.5),
                aspect="equal",
            )
            if tasks <= READABLE:
                for i, row in enumerate(accuracy):
                    for j, value in enumerate(row):
                        axis.text(
                            j + 1,
                            i + 1,
                            f"{value:.0f}",
                            ha="center",
                            va="center",
                            fontsize=8 if tasks <= 8 else 6.5,
                            color="white" if value < 55 else "black",
                        )
            _axes(axis, "accuracy on task", "after task")
            for side in (axis.xaxis, axis.yaxis):
                _ticks(side, range(1, tasks + 1))
            axis.grid(False)
            bar = figure.colorbar(image, ax=axis, shrink=0.82, aspect=24)
            bar.outline.set_visible(False)
            bar.set_label("%")
            if legend:
                axis.set_title(short(title), parse_math=False)
        return figure

    rows: list[list[Cell]] = [
        [str(i + 1), *(Estimate(value) for value in row), *[None] * (tasks - i - 1)] for i, row in enumerate(accuracy)
    ]
    return Chart(
        name, title, caption, draw, Table([Column("after task"), *(Column(f"on {j + 1}") for j in range(tasks))], rows)
    )

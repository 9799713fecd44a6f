"""Ours beside published: the table, and its page. Plain values in; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cairn.reports.formats import Column, Estimate, Table, estimate
from cairn.reports.templates import rendered

LEAST = 0.001
"""Deviation that is taken at least: arithmetic differs between machines."""


class Row(NamedTuple):
    """A method, what was measured here over seeds, and one published figure, None for a method without."""

    method: str
    averages: Sequence[float]
    lasts: Sequence[float]
    seeds: Sequence[int]
    published_average: float | None = None
    published_last: float | None = None
    source: str = ""
    differs: str = ""

    @property
    def average(self) -> Estimate | None:
        return estimate(self.averages, 100)

    @property
    def last(self) -> Estimate | None:
        return estimate(self.lasts, 100)


def within(values: Sequence[float], published: float | None) -> bool | None:
    """Whether the published value is at most two deviations over seeds from the mean; None where that cannot be told."""
    found = estimate(values)
    if published is None or found is None or found.deviation is None:
        return None
    return abs(found.mean - published) <= 2 * max(found.deviation, LEAST) + 1e-12


def _difference(values: Sequence[float], published: float | None) -> Estimate | None:
    found = estimate(values)
    return None if found is None or published is None else Estimate(round(100 * (found.mean - published), 2) + 0.0)


def _said(answer: bool | None) -> str:
    return "-" if answer is None else "yes" if answer else "no"


def comparison_table(rows: Sequence[Row]) -> Table:
    """A row each: ours, published and the difference in percent, of average and last accuracy."""
    titles = (
        "method",
        "average %",
        "published",
        "difference",
        "within 2 sd",
        "last %",
        "published ",
        "difference ",
        "within 2 sd ",
    )
    cells = [
        [
            row.method,
            row.average,
            None if row.published_average is None else Estimate(100 * row.published_average),
            _difference(row.averages, row.published_average),
            _said(within(row.averages, row.published_average)),
            row.last,
            None if row.published_last is None else Estimate(100 * row.published_last),
            _difference(row.lasts, row.published_last),
            _said(within(row.lasts, row.published_last)),
            ", ".join(map(str, row.seeds)) or "-",
            row.source or "-",
            row.differs or "-",
        ]
        for row in rows
    ]
    return Table([Column(title) for title in (*titles, "seeds", "source", "what differs")], cells)


def reproduction_page(title: str, facts: Mapping[str, str], findings: Sequence[str], rows: Sequence[Row]) -> str:
    """HTML. Raises ConfigError if Jinja2 is missing."""
    table = comparison_table(rows)
    return rendered(
        "reproduction.html.jinja",
        "reproduce",
        title=title,
        facts=facts,
        findings=findings,
        titles=table.titles,
        rows=table.texts(),
    )


def record(facts: Mapping[str, str], findings: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """The page as data."""
    return {"facts": dict(facts), "findings": list(findings), "rows": [row._asdict() for row in rows]}

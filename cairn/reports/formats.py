"""One table in the forms that pages, papers and programs take: Markdown, LaTeX (booktabs), CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cairn.experiment.metrics import mean_and_deviation


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation over seeds; no deviation where there is a single one."""

    mean: float
    deviation: float | None = None

    def parts(self, digits: int) -> list[str]:
        return [f"{part:.{digits}f}" for part in (self.mean, self.deviation) if part is not None]


@dataclass(frozen=True)
class Interval:
    """A mean difference, and the interval that holds the true one with 95 % confidence."""

    mean: float
    low: float
    high: float

    def parts(self, digits: int) -> list[str]:
        return [f"{part:+.{digits}f}" for part in (self.mean, self.low, self.high)]


Cell = str | Estimate | Interval | None


@dataclass(frozen=True)
class Column:
    title: str
    digits: int = 2


def estimate(values: Sequence[float | None], factor: float = 1) -> Estimate | None:
    """Over seeds; None if there are none, or one of them is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    mean, deviation = mean_and_deviation(numbers)
    return Estimate(factor * mean, factor * deviation if len(values) > 1 else None)


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many cells: words, estimates, intervals, or None where there is nothing to tell."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    @property
    def titles(self) -> list[str]:
        return [column.title for column in self.columns]

    @property
    def words(self) -> list[bool]:
        """Which columns hold words, not figures."""
        return [not any(isinstance(row[i], Estimate | Interval) for row in self.rows) for i in range(len(self.columns))]

    def texts(self) -> list[list[str]]:
        """The cells as a reader sees them."""
        return [
            [_text(cell, column.digits) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]

    def markdown(self) -> str:
        lines = [self.titles, *([_in_markdown(text) for text in row] for row in self.texts())]
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([rows[0], "|---" * len(self.columns) + "|", *rows[1:]])

    def latex(self) -> str:
        """A tabular for the packages booktabs and, where names need it, inputenc."""
        kinds = "".join("l" if words else "r" for words in self.words)
        lines = [
            [_in_latex(title) for title in self.titles],
            *(
                [_latex(cell, column.digits) for cell, column in zip(row, self.columns, strict=True)]
                for row in self.rows
            ),
        ]
        rows = [" & ".join(line) + r" \\" for line in lines]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{kinds}}}",
                r"\toprule",
                rows[0],
                r"\midrule",
                *rows[1:],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def csv(self) -> str:
        """Figures in full; a deviation or the ends of an interval are columns of their own."""
        titles, columns = [], []
        for i, title in enumerate(self.titles):
            cells = [row[i] for row in self.rows]
            if any(isinstance(cell, Interval) for cell in cells):
                fields = {title: "mean", f"{title}, low": "low", f"{title}, high": "high"}
            elif any(isinstance(cell, Estimate) and cell.deviation is not None for cell in cells):
                fields = {title: "mean", f"{title}, deviation": "deviation"}
            else:
                fields = {title: "mean"}
            titles += fields
            columns += [[_in_csv(cell, field) for cell in cells] for field in fields.values()]
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([titles, *zip(*columns, strict=True)])
        return file.getvalue().rstrip("\n")


FORMS = {"md": Table.markdown, "tex": Table.latex, "csv": Table.csv}
"""File suffix and what it holds."""


def _text(cell: Cell, digits: int) -> str:
    match cell:
        case None:
            return "-"
        case str():
            return cell
        case Estimate():
            return " ± ".join(cell.parts(digits))
        case Interval():
            return "{} [{}, {}]".format(*cell.parts(digits))


def _in_markdown(text: str) -> str:
    """Words stay words: they end no cell and open no tag."""
    return re.sub(r"[\\|<]", r"\\\g<0>", text)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "*": "{*}", "±": r"$\pm$",
}  # fmt: skip
"""A bracket or a star after the end of a row would be an argument of it."""


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _latex(cell: Cell, digits: int) -> str:
    match cell:
        case Estimate():
            return "$" + r" \pm ".join(cell.parts(digits)) + "$"
        case Interval():
            return "${}$ $[{}, {}]$".format(*cell.parts(digits))
    return _in_latex(_text(cell, digits))


def _in_csv(cell: Cell, field: str) -> str | float | None:
    return csv_text(cell) if isinstance(cell, str) else getattr(cell, field, None)


def csv_text(text: str) -> str:
    """Words for a cell. Those that a spreadsheet would take for a formula get an apostrophe in front."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

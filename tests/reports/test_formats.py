"""One table, three forms: the same figures, and words that stay words."""

from __future__ import annotations

import csv
import io

import pytest

from cairn.reports.formats import Column, Estimate, Interval, Table, estimate

TABLE = Table(
    [Column("method"), Column("average %"), Column("gain", 1), Column("memory", 0)],
    [
        ["a & b_c|d", Estimate(88.125, 0.5), Interval(1.25, -0.5, 3.0), Estimate(26.0)],
        ["[=x]", Estimate(70.0), None, None],
    ],
)


def test_markdown_keeps_its_cells():
    assert TABLE.markdown().splitlines() == [
        "| method | average % | gain | memory |",
        "|---|---|---|---|",
        "| a & b_c\\|d | 88.12 ± 0.50 | +1.2 [-0.5, +3.0] | 26 |",
        "| [=x] | 70.00 | - | - |",
    ]


def test_latex_is_a_booktabs_tabular():
    assert TABLE.latex().splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & average \% & gain & memory \\",
        r"\midrule",
        r"a \& b\_c\textbar{}d & $88.12 \pm 0.50$ & $+1.2$ $[-0.5, +3.0]$ & $26$ \\",
        r"{[}=x{]} & $70.00$ & - & - \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_has_figures_in_full():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows == [
        ["method", "average %", "average %, deviation", "gain", "gain, low", "gain, high", "memory"],
        ["a & b_c|d", "88.125", "0.5", "1.25", "-0.5", "3.0", "26.0"],
        ["[=x]", "70.0", "", "", "", "", ""],
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x"])
def test_no_word_is_a_formula_of_a_spreadsheet(text):
    assert Table([Column("a")], [[text]]).csv().splitlines()[1] == f"'{text}"


def test_an_estimate_needs_all_its_values():
    assert estimate([1.0, 2.0, 3.0], 10) == Estimate(20.0, 10.0)
    assert estimate([1.0]) == Estimate(1.0)
    assert estimate([1.0, None]) is None
    assert estimate([]) is None

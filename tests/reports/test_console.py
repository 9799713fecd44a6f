"""What is printed: escaped, and in columns that break between words."""

import io
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

from cairn.errors import one_line, printable
from cairn.reports.console import Console, column_widths
from cairn.reports.formats import csv_text

UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_every_unseen_character_is_escaped():
    unseen = [sign for sign in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(sign) in UNSEEN]
    assert [sign for sign in unseen if one_line(sign) == sign] == []
    assert one_line("猫 été κότα [red] 100% ±") == "猫 été κότα [red] 100% ±"
    assert printable("a\x1b[31m\nb\u202ec") == "a\\x1b[31m\nb\\u202ec"


def test_the_console_prints_no_escape_of_a_terminal():
    file = io.StringIO()
    console = Console(file)
    console.note("owl\x1b]0;title\x07\nnext")
    console.table("t", ("name",), [("\x1b[2J\u202e",)])
    assert not {"\x1b", "\x07", "\u202e"} & set(file.getvalue())
    assert "owl\\x1b]0;title\\x07\nnext" in file.getvalue()


def test_each_share_of_a_result_has_its_percent_sign():
    file = io.StringIO()
    figures = {
        "average": 0.5,
        "last": 0.25,
        "forgetting": 0.125,
        "last_by_frequency": None,
        "any_time": None,
        "mIoU": None,
        "macro_f1": None,
        "seconds": 3.0,
    }
    result = SimpleNamespace(method="lda", metric="accuracy", **figures)
    Console(file).result(result, Path("r.json"))
    assert file.getvalue() == "lda: average 50.00 %, last 25.00 %, forgetting 12.50 %, 3 s -> r.json\n\n"
    file.truncate(file.seek(0))
    Console(file).result(SimpleNamespace(**{**vars(result), "forgetting": None}), Path("r.json"))
    assert "forgetting none yet, 3 s" in file.getvalue()
    Console(file).result(SimpleNamespace(**{**vars(result), "any_time": 0.5, "chunk_accuracy": [0.5] * 130}), Path("r"))
    assert f"any-time accuracy 50.00 %; after each of 130 chunks: {44 * '▅'}\n" in file.getvalue()
    groups = {"last_by_frequency": {"head": 0.5, "tail": 0.25}, "frequency_terciles": True}
    Console(file).result(SimpleNamespace(**{**vars(result), **groups}), Path("r.json"))
    assert "training images a class has: head 50.00 %, tail 25.00 % (thirds of the classes)" in file.getvalue()


def test_columns_break_between_words_while_there_is_room():
    rows = [("name", "what it is"), ("descriptions", "two words and more"), ("a", "b")]
    assert column_widths(rows, 80) == [12, 18]
    assert column_widths(rows, 24) == [12, 10]
    assert column_widths(rows, 19) == [12, 5]  # as wide as the longest word of each
    assert sum(column_widths(rows, 12)) + 2 == 12  # no room: words are broken, the longest ones


def test_no_word_of_the_list_is_broken_at_80_columns(monkeypatch, capsys):
    from cairn.cli.app import list_
    from cairn.methods.catalogue import METHODS
    from cairn.towers.catalogue import KNOWN

    monkeypatch.setenv("COLUMNS", "80")
    list_()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed = {word for line in lines for word in line.split()}
    for entry in METHODS.values():
        assert {
            *f"{entry.name} {entry.card.trains} {entry.card.keeps} {', '.join(entry.uses)} {entry.card.source}".split()
        } <= printed
    assert {*KNOWN} <= printed


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_cells_that_start_a_formula_are_quoted(start):
    assert csv_text(f"{start}1+1") == f"'{start}1+1"
    assert csv_text(f"a{start}") == f"a{start}"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("run", "dmc", "--step", "abc"), "cairn: --step abc: must be a whole number; see `cairn run --help`\n"),
        (("run", "dmc", "--validation=x"), "cairn: --validation x: must be a number; see `cairn run --help`\n"),
        (("run", "dmc", "--on-bad-image", "no"), "cairn: --on-bad-image no: must be stop or skip\n"),
        (("predict",), "cairn: Missing argument 'learner'; see `cairn predict --help`\n"),
        (("cache", "info", "--x"), "see `cairn cache info --help`\n"),
    ],
)
def test_a_wrong_command_line_names_the_value(cairn, call, said):
    status, out, err = cairn(*call)
    assert (status, out) == (2, "")
    assert err.endswith(said)

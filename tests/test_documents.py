"""What the documents say is true: the README's Python runs, its table is what the stored results give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cairn.methods.catalogue import METHODS
from cairn.reports.drift import drift_reports_below, drift_table
from cairn.reports.tables import difference_table, markdown_table, results_below
from cairn.run import RunResult

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs_offline(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "MB kept of 40 classes, no image" in out


def test_the_commands_of_the_readme_are_make_targets():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert target in targets


def blocks():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for kind, name, text in re.findall(
            r"<!-- cairn (table|compare) (\S+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL
        ):
            yield pytest.param(kind, name, text, id=f"{page.stem}-{kind}-{name}")


@pytest.mark.parametrize(("kind", "name", "text"), list(blocks()))
def test_every_table_is_what_the_stored_results_give(kind, name, text):
    if not all((ROOT / "results" / half).is_dir() for half in name.split(":")):
        assert not text.strip(), "a number without a stored result"
    elif kind == "table" and (reports := drift_reports_below([ROOT / "results" / name])):
        assert text.strip() == drift_table(reports)
    elif kind == "table":
        assert text.strip() == markdown_table(results_below([ROOT / "results" / name]))
    else:
        pair = [results_below([ROOT / "results" / half]) for half in name.split(":")]
        assert text.strip() == difference_table(*pair)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").rglob("result.json")), ids=lambda p: str(p.parent.relative_to(ROOT))
)
def test_stored_results_are_readable_and_name_no_machine(path):
    text = path.read_text(encoding="utf-8")
    RunResult.model_validate_json(text)
    assert str(Path.home()) not in text


def test_every_key_of_a_result_is_documented():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert not [key for key in RunResult.model_fields if f"`{key}`" not in page]


def test_every_method_is_in_the_readme():
    assert not [name for name in METHODS if f"`{name}`" not in README]


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

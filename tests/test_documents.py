"""What the documents say is true: their Python runs, their commands exist, their tables are what the stored results give."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

import cairn
from cairn.cli.app import app
from cairn.experiment.schema import RunResult
from cairn.methods.catalogue import METHODS
from cairn.reports.drift import drift_reports_below, drift_table
from cairn.reports.tables import difference_table, markdown_table, results_below

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
NETWORK = "# needs the network"


def experiment(name):
    """What a script defines, which imports others beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        return runpy.run_path(str(ROOT / "experiments" / name))


RESULTS = experiment("results.py")


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def fenced(page: Path, info: str) -> list[str]:
    return [
        found["text"] for found in FENCE.finditer(page.read_text(encoding="utf-8")) if found["info"].strip() == info
    ]


# Python


def run_python(page: Path) -> None:
    """The blocks of a page one after the other, as a reader would type them."""
    scope = {"__name__": page.stem.replace("-", "_")}
    for block in fenced(page, "python"):
        exec(compile(block, page.name, "exec", dont_inherit=True), scope)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if fenced(page, "python")], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_python_of_a_page_runs_offline(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python(page)
    out = capsys.readouterr().out
    if page.name == "README.md":
        assert "right, among 10 classes" in out
    if page.name == "index.md":
        drawn, shown = (np.asarray(Image.open(path)) for path in (tmp_path / "world.png", DOCS / "pictures/world.png"))
        assert np.array_equal(drawn, shown)
    if page.name == "your-images.md":
        assert "[None None None None None]" in out.splitlines()[-1]


def test_a_block_that_is_not_run_needs_the_network():
    for page in PAGES:
        infos = {found["info"].strip() for found in FENCE.finditer(page.read_text(encoding="utf-8"))}
        assert not [info for info in infos if info.startswith("python") and info not in ("python", "python no-run")]
        assert all(NETWORK in block for block in fenced(page, "python no-run")), page.name


@pytest.mark.parametrize(("name", "number"), [("README.md", 20), ("docs/index.md", 20)])
def test_first_examples_are_short(name, number):
    first = fenced(ROOT / name, "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= number


def test_the_method_of_ones_own_has_twelve_statements():
    (source,) = fenced(DOCS / "extend.md", "python")
    (method,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    bodies = [method.body, *(node.body for node in method.body if isinstance(node, ast.FunctionDef))]
    statements = [
        node
        for body in bodies
        for node in body
        if not isinstance(node, ast.FunctionDef)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    assert len(statements) == 12


# commands


def test_the_commands_of_the_documents_are_make_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        code = re.findall(r"`(make [\w-]+)", text := page.read_text(encoding="utf-8"))
        code += re.findall(r"^(make [\w-]+)", text, re.MULTILINE)
        assert not [words for words in code if words.split()[1] not in targets], page.name


def commands():
    """Every call of `cairn` in a block, and in the text in backquotes."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shells = "".join(found["text"] for found in FENCE.finditer(text) if found["info"].strip() in ("sh", ""))
        calls = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?cairn (.*)$", shells.replace("\\\n", " "), re.MULTILINE)
        calls += [" ".join(call.split()) for call in re.findall(r"`cairn ([^`]+)`", FENCE.sub("", text))]
        for call in dict.fromkeys(calls):
            yield pytest.param(call, id=f"{page.stem}: {call}")


@pytest.mark.parametrize("call", list(commands()))
def test_a_command_of_the_documents_parses(call):
    words, command = shlex.split(call, comments=True), typer.main.get_command(app)
    context = command.context_class(command, info_name="cairn")
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands or "|" in name, f"no command '{name}'"
        if "|" in name:  # `cairn cache info|clear`
            assert all(part in command.commands for part in name.split("|"))
            return
        command = command.commands[name]
        context = command.context_class(command, info_name=name, parent=context)
    _, left, _ = command.make_parser(context).parse_args(words)
    assert not left, f"too many arguments: {left}"


# tables


def blocks():
    for page in PAGES:
        for kind, name, text in re.findall(
            r"<!-- cairn (table|compare) (\S+) -->\n(.*?)<!-- end -->", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            yield pytest.param(kind, name, text, id=f"{page.stem}-{kind}-{name}")


@pytest.mark.parametrize(("kind", "name", "text"), list(blocks()))
def test_every_table_is_what_the_stored_results_give(kind, name, text):
    folders = [ROOT / folder for folder in RESULTS["folders"](name)]
    assert name in [
        name for names in RESULTS["TABLES" if kind == "table" else "COMPARISONS"].values() for name in names
    ]
    if not all(folder.is_dir() for folder in folders):
        assert not text.strip(), "a number without a stored result"
    elif kind == "table" and (reports := drift_reports_below(folders)):
        assert text.strip() == drift_table(reports)
    elif kind == "table":
        assert text.strip() == markdown_table(results_below(folders))
    else:
        assert text.strip() == difference_table(*(results_below([folder]) for folder in folders))


@pytest.mark.parametrize(("page", "name"), [("README.md", "best"), ("docs/choose-a-method.md", "ranking")])
def test_rankings_are_what_the_stored_results_give(page, name):
    blocks = experiment("ranking.py")["blocks"]()
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(rf"<!-- cairn {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)[1] == blocks[page]


def test_stored_rows_were_made_with_the_seeds_and_settings_that_their_calls_name():
    stored = [job for job in RESULTS["jobs"]() if (ROOT / "results" / job[0] / job[1] / "summary.json").exists()]
    assert len(stored) > 200
    assert [job[:2] for job in stored if not RESULTS["done"](job)] == []


def test_a_row_of_another_number_of_seeds_or_other_settings_is_to_be_made():
    done, job = RESULTS["done"], ("shapes", "dmc", "dmc", [], "1,2,3,4,5")
    assert done(job)
    assert not done((*job[:4], "1,2,3"))
    assert not done((*job[:3], ["stage1.tuning=none"], job[4]))
    assert not done((job[0], "no-such-row", *job[2:]))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").rglob("result.json")), ids=lambda p: str(p.parent.relative_to(ROOT))
)
def test_stored_results_are_readable_and_name_no_machine(path):
    text = path.read_text(encoding="utf-8")
    RunResult.model_validate_json(text)
    assert str(Path.home()) not in text


# completeness


def test_every_key_of_a_result_is_documented():
    page = read("results.md")
    assert not [key for key in RunResult.model_fields if f"`{key}`" not in page]


@pytest.mark.parametrize("page", ["README.md", "docs/choose-a-method.md"])
def test_the_table_of_methods_is_what_their_cards_say(page):
    table = experiment("methods.py")["PAGES"][page]().markdown()
    assert f"<!-- cairn methods -->\n{table}\n<!-- end -->" in (ROOT / page).read_text(encoding="utf-8")
    assert [name for name in METHODS if f"| `{name}` |" not in table] == []


def test_the_page_on_the_api_has_every_public_name():
    named = re.findall(r"^::: cairn\.(\S+)\.(\w+)$", read("api.md"), re.MULTILINE)
    assert {name: home for home, name in named} == cairn._HOMES
    assert sorted(name for _, name in named) == sorted(cairn.__all__)


def test_equations_are_those_of_the_files_that_are_named():
    """Each line of a block in methods.md stands, up to spaces, in a file that its section links to."""
    for section in read("methods.md").split("\n## ")[1:]:
        files = [DOCS / target for target in re.findall(r"\]\((\.\./cairn/[^)]+)\)", section)]
        code = " ".join(" ".join(file.read_text(encoding="utf-8") for file in files).split())
        lines = [line for found in FENCE.finditer(section) for line in found["text"].splitlines()]
        assert not [line for line in lines if " ".join(line.split()) not in code], section.splitlines()[0]


# links and the site


def headings(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", text):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(found), f"{page.name}: {target}#{anchor}"


def in_nav(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in in_nav(part)]


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
OF_THE_TOP = {"overview.md", "contributing.md", "changelog.md"}
"""Pages that docs/hooks.py makes of files at the top."""


def test_every_page_is_in_the_navigation_once():
    pages = in_nav(SITE["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == {page.name for page in DOCS.glob("*.md")} | OF_THE_TOP


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_for_nothing_elsewhere(tmp_path):
    pytest.importorskip("material", reason="pip install '.[docs]'")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    site = tmp_path / "site"
    built = {page.name for page in site.glob("*.html")} - {"404.html"}
    assert built == {Path(page).with_suffix(".html").name for page in in_nav(SITE["nav"])}
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            for address in re.findall(r'(?:src|href)="([^"]+)"', tag):
                assert not address.startswith(("http:", "https:", "//")), f"{page.name}: {tag}"
        article = text[text.index("<article") : text.index("</article>")]
        assert "```" not in article, f"{page.name}: a block that is not one"
        for source in re.findall(r'<img[^>]* src="([^"]+)"', text):
            assert source.startswith("data:") or (page.parent / source).is_file(), f"{page.name}: {source}"
    api = (site / "api.html").read_text(encoding="utf-8")
    assert not [name for name in cairn.__all__ if f'id="cairn.{cairn._HOMES[name]}.{name}"' not in api]
    for page in DOCS.glob("*.md"):
        tables = len(re.findall(r"^\|(?:---\|)+$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE))
        html = (site / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert html.count("<table>") >= tables, f"{page.name}: a table that is not one"

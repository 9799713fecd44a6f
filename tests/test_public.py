"""What the package shows to the outside, and what it must not do on import."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import cairn

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_there_and_nothing_is_forgotten():
    assert set(cairn.__all__) == set(cairn._HOMES) == set(dir(cairn))
    for name in cairn.__all__:
        assert getattr(cairn, name) is not None


def test_importing_has_no_effect():
    code = (
        "import sys, os; before = (os.getcwd(), len(sys.path))\n"
        "import cairn, cairn.cli.app, cairn.reports.tables\n"
        "assert (os.getcwd(), len(sys.path)) == before\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_anywhere():
    for path in (ROOT / "cairn").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bimport pickle\b|torch\.(load|save)\(|trust_remote_code\s*=\s*True", text), path


DECLARED = {"method", "method_", "towers", "_towers", "images", "source", "batches", "loader", "learner", "encoder"}
"""How variables with a declared contract are called."""


def test_nothing_is_guessed_of_methods_towers_and_images():
    """What they have stands in their protocols; what only some have is asked for with isinstance."""
    for path in (ROOT / "cairn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                asked = re.split(r"\W", ast.unparse(node.args[0]))[-1]
                assert asked not in DECLARED, f"{path}:{node.lineno}"


def test_prompts_of_the_repository_name_no_machine():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert str(Path.home()) not in path.read_text(), path


def test_no_modules_import_one_another_in_a_circle():
    """Imports inside functions count too."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "cairn").rglob("*.py")}
    imported: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        named = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        imported[module] = {name for name in named | {str(node.module) for node in froms} if name in paths}
    while leaves := {module for module, below in imported.items() if not below}:
        imported = {module: below - leaves for module, below in imported.items() if module not in leaves}
    assert not imported, "these import one another, or what does"


def test_type_hints_of_public_names_resolve():
    for name in cairn.__all__:
        value = getattr(cairn, name)
        if not callable(value):
            continue
        typing.get_type_hints(value)
        for member in vars(value).values() if inspect.isclass(value) else ():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(function):
                typing.get_type_hints(function)

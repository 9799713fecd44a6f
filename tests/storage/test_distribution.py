"""The name under which cairn is installed: not that of another project on the index."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from cairn.storage import distribution
from cairn.storage.versions import changes, versions

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = [
    path
    for pattern in (
        "*.md",
        "*.toml",
        "Makefile",
        ".ci/*",
        ".github/**/*.yml",
        "docs/**/*.md",
        "cairn/**/*.py",
        "examples/**/*",
        "experiments/*.py",
        "configs/**/*.toml",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file()
]


def test_the_distribution_has_a_name_of_its_own_and_the_command_stays():
    assert PROJECT["name"] == distribution.NAME == "cairn-cil"
    assert PROJECT["scripts"] == {"cairn": "cairn.cli:main"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_says_to_install_the_other_project(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"""\bcairn\[[a-z]|pip install[^\n`]*[ "']cairn(?![\w_-])""", text.replace("in a clone of cairn", "")
    )


def test_every_remedy_names_an_extra_that_there_is():
    named = {
        found
        for path in (ROOT / "cairn").rglob("*.py")
        for found in re.findall(r"""extra_remedy\(["'](\w+)["']\)""", path.read_text(encoding="utf-8"))
    }
    assert named == {"serve", "ray", "onnx", "hub", "parallel", "report", "track", "describe", "search"}
    assert named <= PROJECT["optional-dependencies"].keys()
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in named)


def test_a_remedy_is_a_clone_or_a_wheel_of_this_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"cairn-cil": "1.2.3"}.__getitem__)
    assert distribution.extra_remedy("serve") == (
        'pip install ".[serve]" in a clone of cairn, or pip install "cairn_cil-1.2.3-py3-none-any.whl[serve]" beside its wheel'
    )


@pytest.mark.parametrize(
    ("installed", "version"),
    [({"cairn-cil": "2.0"}, "2.0"), ({"cairn": "0.1.0"}, "0.1.0"), ({"cairn-cil": "2.0", "cairn": "7.7"}, "2.0")],
)
def test_the_version_is_ours_also_of_an_install_under_the_former_name(monkeypatch, installed, version):
    plain = metadata.version

    def found(name: str) -> str:
        if name not in ("cairn", "cairn-cil"):
            return plain(name)
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", found)
    assert versions()["cairn"] == version


def test_what_is_of_another_version_is_named():
    now = versions()
    assert changes(now) == ""
    assert changes(now | {"torch": "1.0"}) == f"torch 1.0 -> {now['torch']}"
    assert changes({key: number for key, number in now.items() if key != "peft"}) == f"peft None -> {now['peft']}"

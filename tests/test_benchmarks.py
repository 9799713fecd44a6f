"""Benchmarks run, and the pages show what is stored. No time is asserted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "results" / "benchmarks"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> dict:
    """The report of the smallest form, by the command line."""
    out = tmp_path_factory.mktemp("bench")
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", "--size", "tiny", "--out", out],
        check=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads((out / "bench.json").read_text())


def test_the_smallest_form_runs_and_says_where(bench):
    assert bench["items"].keys() == {"transport", "bures", "draws"}
    assert bench["machine"].keys() == {"cores", "threads", "processor", "memory_bytes"}
    assert {"torch", "POT"} <= bench["versions"].keys()
    assert all(row["plain_amount"] > 0 and row["amount"] > 0 and row["ratio"] > 0 for row in bench["rows"])


def test_both_forms_give_the_same(bench):
    transport, bures, draws = (bench["items"][name] for name in ("transport", "bures", "draws"))
    assert all(row["error"] <= 0.0101 and row["mass_elsewhere"] < 0.01 for row in transport["rows"])
    assert all(row["residual"] < 1e-9 and row["to_pot"] < 1e-6 for row in bures["rows"])
    assert draws["full"]["difference"] < 1e-6
    assert draws["low_rank"]["covariance_error"] < 2 * draws["low_rank"]["torch_covariance_error"]


def shown(page: str, block: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- cairn {block} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return found.strip()


@pytest.mark.parametrize(
    ("file", "page", "block"),
    [("bench", "speed.md", "bench"), ("alignment", "spa.md", "alignment"), ("calibration", "drift.md", "calibration")],
)
def test_the_pages_show_what_is_stored(file, page, block, monkeypatch):
    path, text = STORED / f"{file}.json", shown(page, block)
    if not path.exists():
        assert not text, "figures without a stored report"
        return
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    report = json.loads(path.read_text())
    assert text == (run.bench_table(report) if file == "bench" else run.ITEMS[file].table(report))

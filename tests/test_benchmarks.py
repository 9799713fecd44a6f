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
        check=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads((out / "bench.json").read_text())


def test_the_smallest_form_runs_and_says_where(bench):
    assert bench["items"].keys() == {"trunk", "transport", "bures", "draws", "input", "compiled"}
    assert bench["machine"].keys() == {"cores", "threads", "processor", "memory_bytes"}
    assert {"torch", "POT"} <= bench["versions"].keys()
    assert all(row["plain_amount"] > 0 and row["amount"] > 0 and row["ratio"] > 0 for row in bench["rows"])


def test_both_forms_give_the_same(bench):
    transport, bures, draws = (bench["items"][name] for name in ("transport", "bures", "draws"))
    assert all(row["error"] <= 0.0101 and row["mass_elsewhere"] < 0.01 for row in transport["rows"])
    assert all(row["residual"] < 1e-9 and row["to_pot"] < 1e-6 for row in bures["rows"])
    assert draws["full"]["difference"] < 1e-6
    assert draws["low_rank"]["covariance_error"] < 2 * draws["low_rank"]["torch_covariance_error"]
    assert bench["items"]["input"]["equal"]
    assert all(row["equal"] for row in bench["items"]["trunk"]["rows"])
    compiled = bench["items"]["compiled"]
    assert compiled["reason"] is None
    assert compiled["loss_difference"] < 1e-5
    assert compiled["gradient_difference"] < 1e-4


def test_ways_of_decoding_are_told_with_how_far_they_are_apart(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import decoding

    report = decoding.measured(**decoding.SIZES["tiny"])
    (one,) = report["pictures"].values()
    assert one["images_per_second"].keys() == {*decoding.ways(), decoding.LIMIT}
    assert one["agreement"][decoding.PLAIN] == {"largest": 0, "mean": 0, "cosine": pytest.approx(1)}
    off = one["agreement"][decoding.REDUCED]
    assert 0 < off["mean"] < 4
    assert off["cosine"] > 0.99
    (row,) = decoding.rows(report)
    assert row.target is None
    assert decoding.table(report).count(decoding.REDUCED) == 1


def test_the_parts_of_a_run_on_an_accelerator_are_told(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "accelerator.py", "--size", "tiny", "--out", tmp_path / "report.json"],
        check=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    report = json.loads((tmp_path / "report.json").read_text())
    run = report["run"]
    assert run["parts"].keys() == {
        "stage 1",
        "passes before and after",
        "calibration",
        "statistics",
        "stage 2",
        "evaluation",
        "all else",
    }
    assert all(seconds > 0 for seconds in run["parts"].values())
    assert sum(run["parts"].values()) == pytest.approx(run["seconds"])
    assert 0 < run["waited"] < run["seconds"]
    assert all(one["stage1_launches"] > 0 and one["prompt_launches"] > 0 for one in report["towers"])
    # A float32 step of the embedded towers: twice the forward pass, which is 2 x 50 tokens x 1.84 M weights and attention
    assert report["towers"][0]["operations_per_image"] == pytest.approx(2 * 2 * 50 * 1.84e6, rel=0.15)


def test_what_a_machine_lacks_is_said_and_no_rows_come_of_it(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import accelerator
    import compiled

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["accelerator.py"])
    with pytest.raises(SystemExit):
        accelerator.main()
    assert "--size full: PyTorch finds no CUDA here" in capsys.readouterr().err

    def refused(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nfound in a list of names")

    monkeypatch.setattr("torch.compile", lambda *args, **kwargs: refused)
    report = compiled.measured(**compiled.SIZES["tiny"])
    assert report["reason"] == "RuntimeError: no C++ compiler"
    assert compiled.rows(report) == []


def shown(page: str, block: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- cairn {block} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return found.strip()


@pytest.mark.parametrize(
    ("file", "page", "block"),
    [
        ("bench", "speed.md", "bench"),
        ("accelerator", "speed.md", "accelerator"),
        ("alignment", "speed.md", "alignment"),
        ("calibration", "speed.md", "calibration"),
        ("startup", "speed.md", "startup"),
        ("pool", "speed.md", "pool"),
        ("predicting", "speed.md", "predicting"),
        ("retrieval", "speed.md", "retrieval"),
        ("launches", "speed.md", "launches"),
        ("decoding", "speed.md", "decoding"),
    ],
)
def test_the_pages_show_what_is_stored(file, page, block, monkeypatch):
    path, text = STORED / f"{file}.json", shown(page, block)
    if not path.exists():
        assert not text, "figures without a stored report"
        return
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import accelerator
    import run

    tables = {"bench": run.bench_table, "accelerator": accelerator.table}
    tables |= {name: run.ITEMS[name].table for name in run.OWN}
    report = json.loads(path.read_text())
    assert text == tables[file](report)

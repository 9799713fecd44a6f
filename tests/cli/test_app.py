"""The command as a user types it: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from cairn.cli.app import app
from cairn.methods.catalogue import METHODS


def test_a_run_leaves_a_result_and_its_events(cairn, features, tmp_path):
    status, out, err = cairn("run", "simplecil", "--data", features, "--step", 2, "--out", "here")
    assert (status, err) == (0, "")
    assert "simplecil: average" in out
    stored = json.loads((tmp_path / "here" / "result.json").read_text())
    assert stored["method"] == "simplecil"
    for key in (
        "config",
        "data",
        "towers",
        "class_order",
        "base",
        "step",
        "seed",
        "accuracy",
        "seen_accuracy",
        "average",
        "last",
        "forgetting",
        "bwt",
        "seconds",
        "peak_rss_bytes",
        "memory_bytes",
        "tower_passes",
        "versions",
    ):
        assert key in stored
    events = [json.loads(line) for line in (tmp_path / "here" / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("task") == 3


def test_the_default_folder_carries_method_and_data(cairn, features, tmp_path):
    assert cairn("run", "zero-shot", "--data", features, "--step", 3)[0] == 0
    assert (tmp_path / "runs" / "zero-shot-made" / "result.json").is_file()


def test_the_same_call_again_shows_what_is_there_and_another_call_is_refused(cairn, features, tmp_path):
    call = ("run", "simplecil", "--data", features, "--step", 2, "--out", "here")
    cairn(*call)
    before = (tmp_path / "here" / "result.json").read_bytes()
    status, out, _ = cairn(*call)
    assert status == 0
    assert "already finished" in out
    status, _, err = cairn(*call[:-3], 3, "--out", "here")
    assert status == 2
    assert "holds another run (step 2, not 3)" in err
    assert (tmp_path / "here" / "result.json").read_bytes() == before
    status, out, _ = cairn(*call[:-3], 3, "--out", "here", "--overwrite")
    assert status == 0
    assert json.loads((tmp_path / "here" / "result.json").read_text())["step"] == 3


def test_seeds_write_a_folder_each_and_a_summary(cairn, features, tmp_path):
    status, out, _ = cairn("run", "dmc", "--data", features, "--step", 3, "--seeds", "1,2,3", "--out", "s")
    assert status == 0
    results = [json.loads((tmp_path / "s" / f"seed-{n}" / "result.json").read_text()) for n in (1, 2, 3)]
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    values = [r["average"] for r in results]
    assert [r["seed"] for r in results] == summary["seeds"] == [1, 2, 3]
    assert summary["average"]["mean"] == pytest.approx(np.mean(values))
    assert summary["average"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert "over 3 seeds" in out


def test_seeds_of_data_that_has_changed_have_no_mean(cairn, features_file, embedded_dataset, tmp_path):
    call = ("run", "simplecil", "--data", features_file(), "--step", 3, "--out", "s")
    assert cairn(*call, "--seeds", "1,2")[0] == 0
    before = (tmp_path / "s" / "summary.json").read_bytes()
    train = embedded_dataset.train
    for kept, what in ((slice(1, None), "images"), (slice(None), "towers")):
        features_file(train_features=1.5 * train.values[kept], train_labels=train.labels[kept])
        status, _, err = cairn(*call, "--seeds", "1,3")
        assert status == 2
        assert f"seed 1 was run on other {what} than seed 3" in err
        assert (tmp_path / "s" / "summary.json").read_bytes() == before
        shutil.rmtree(tmp_path / "s" / "seed-3")
    assert cairn(*call, "--seeds", "1,3", "--overwrite")[0] == 0


def test_a_table_goes_into_a_document_whole_or_not_at_all(cairn, features, tmp_path):
    assert cairn("run", "simplecil", "--data", features, "--step", 3, "--out", "s")[0] == 0
    page = tmp_path / "page.md"
    for content, says in ((None, "No such file"), (b"\xff", "not UTF-8"), (b"no block", "no block")):
        if content is not None:
            page.write_bytes(content)
        status, out, err = cairn("table", "s", "--into", page)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert says in err
        assert not page.exists() if content is None else page.read_bytes() == content
    page.write_text("a\n<!-- cairn table results -->\n<!-- end -->\n")
    assert cairn("table", "s", "--into", page)[0] == 0
    assert "| simplecil |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "dcm"), "unknown method 'dcm': did you mean dmc"),
        (("run", "dmc", "--data", "nowhere/pictures"), "nowhere/pictures"),
        (("run", "dmc", "--data", "cifar10"), "did you mean cifar100"),
        (("run", "dmc", "--set", "stage9.x=1"), "unknown setting 'stage9.x'"),
        (("run", "dmc", "--step", "41"), "step 41 is larger than the number of classes, 40"),
        (("run", "dmc", "--seeds", "1,1"), "--seeds 1,1: must be different"),
        (("run", "dmc", "--seed", "3", "--seeds", "1,2"), "--seed 3 and --seeds 1,2: give only one of them"),
        (("run", "--resume", "r", "--device", "cpu"), "leave --device out"),
        (("run", "--resume", "r", "--set", "a=1"), "leave --set out"),
        (("run", "dmc", "--precision", "float7"), "--precision float7"),
        (("run", "dmc", "--seed", "-3"), "--seed -3"),
        (("run", "dmc", "--towers", "tinny"), "did you mean tiny"),
        (("run",), "no method given"),
        (("runn", "dmc"), "No such command 'runn'"),
        (("run", "dmc", "--stepp", "3"), "No such option"),
        (("explain", "dmc-x"), "unknown method 'dmc-x'"),
        (("table", "."), "no result.json there"),
    ],
)
def test_bad_calls_are_one_line_status_2_and_leave_nothing(cairn, tmp_path, arguments, says):
    status, out, err = cairn(*arguments)
    assert status == 2
    assert says in err
    assert err.startswith("cairn: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not list(tmp_path.rglob("*.json*"))


def test_a_folder_of_pictures_from_end_to_end(cairn, tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 2)):
        for name, colour in (("red things", (200, 30, 30)), ("blue_things", (30, 30, 200)), ("{odd}", (30, 200, 30))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                noise = rng.integers(0, 40, (40, 50, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    quick = ("--set", "stage1.schedule.epochs=1", "--set", "stage2.schedule.epochs=1")
    status, _, err = cairn("run", "dmc", "--data", "pictures", "--step", 2, "--out", "p", "--device", "cpu", *quick)
    assert (status, err) == (0, "")
    stored = json.loads((tmp_path / "p" / "result.json").read_text())
    assert sorted(stored["class_order"]) == ["blue_things", "red things", "{odd}"]
    assert stored["task_sizes"] == [2, 1]

    (tmp_path / "pictures" / "train" / "{odd}" / "broken.png").write_bytes(b"this is no picture")
    status, _, err = cairn("run", "dmc", "--data", "pictures", "--step", 2, "--out", "q", "--device", "cpu", *quick)
    assert status == 2
    assert "broken.png" in err
    assert not (tmp_path / "q").exists()


def test_list_and_explain_tell_the_table(cairn):
    status, out, _ = cairn("list")
    assert status == 0
    for name in (*METHODS, "cifar100", "objectnet", "tiny", "exemplars", "second-order"):
        assert name in out
    status, out, _ = cairn("explain", "dmc")
    assert status == 0
    for part in ("2511.10974", "stage1.tuning", "stage2.schedule.epochs", "cairn/methods/dmc.py", "embedding form"):
        assert part in out


def test_version(cairn):
    status, out, _ = cairn("version")
    assert status == 0
    assert "torch" in out


def test_a_table_from_results(cairn, features, tmp_path):
    cairn("run", "simplecil", "--data", features, "--step", 2, "--out", "r/simplecil")
    cairn("run", "dmc", "--data", features, "--step", 2, "--seeds", "1,2", "--out", "r/dmc")
    status, out, _ = cairn("table", "r")
    assert status == 0
    assert out.count("\n") == 4
    assert "| simplecil |" in out
    assert " ± " in out
    (tmp_path / "page.md").write_text("before\n<!-- cairn table t -->\nold\n<!-- end -->\nafter\n")
    assert cairn("table", "r", "--into", "page.md", "--name", "t")[0] == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!-- cairn table t -->\n| method")
    assert page.endswith("<!-- end -->\nafter\n")
    assert "old" not in page
    cairn("run", "zero-shot", "--data", features, "--step", 3, "--out", "r/zero-shot")
    status, _, err = cairn("table", "r")
    assert status == 2
    assert "differ in split or class order" in err


def test_a_cache_spares_the_second_run_its_passes(cairn, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "kept"))
    call = ("run", "simplecil", "--step", 20, "--limit-train", 2, "--limit-test", 1, "--device", "cpu")
    for out, more in (("plain", ()), ("first", ("--cache",)), ("second", ("--cache",))):
        status, _, err = cairn(*call, "--out", out, *more)
        assert (status, err) == (0, "")
    assert cairn("cache", "info")[1].startswith(f"{tmp_path / 'kept'}: 0.1 of 20000.0 MB")
    stored = {out: json.loads((tmp_path / out / "result.json").read_text()) for out in ("plain", "first", "second")}
    assert stored["plain"]["accuracy"] == stored["first"]["accuracy"] == stored["second"]["accuracy"]
    assert stored["plain"]["tower_passes"] == {"images": 80, "text_tokens": 0, "stored": 0, "continued": 0}
    assert stored["second"]["tower_passes"] == {"images": 0, "text_tokens": 0, "stored": 80, "continued": 0}
    assert stored["second"]["evaluation_passes"]["images"] == 0

    assert "120" in cairn("cache", "info")[1].splitlines()[-2]
    monkeypatch.setattr("typer.confirm", lambda text, abort: (_ for _ in ()).throw(typer.Abort()))
    assert cairn("cache", "clear")[0] == 130
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    assert "0.1 MB freed" in cairn("cache", "clear", "--yes")[1]
    assert cairn("cache", "info")[1] == f"{tmp_path / 'kept'}: 0.0 of 20000.0 MB\n"
    monkeypatch.setenv("CAIRN_CACHE_BYTES", "much")
    status, _, err = cairn("cache", "info")
    assert (status, err.count("\n")) == (2, 1)
    assert "CAIRN_CACHE_BYTES 'much'" in err


@pytest.mark.parametrize("group", [(), ("cache",)])
def test_no_summary_of_a_command_is_cut_off(cairn, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = cairn(*group, "--help")
    commands = out.partition("Commands:\n")[2].splitlines()
    assert status == 0
    assert len(commands) > 1
    assert [line for line in commands if "..." in line] == []
    assert max(map(len, out.splitlines())) <= 80


def test_no_two_commands_have_one_name():
    """The later one would hide the other without a word."""
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) == len({*names})


NO_MEMORY = [
    (MemoryError(), ""),
    (np._core._exceptions._ArrayMemoryError((1 << 40, 3), np.dtype("float32")), " (Unable to allocate 12.0 TiB)"),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 "
            "bytes."
        ),
        " (allocate 80 bytes)",
    ),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139 GiB"),
        " (allocate 2.50 GiB)",
    ),
]


@pytest.mark.parametrize(("error", "asked"), NO_MEMORY)
def test_where_there_is_no_memory_it_is_said_in_one_line(cairn, features, monkeypatch, error, asked):
    def learn(self, task, ctx):
        raise error

    monkeypatch.setattr(METHODS["lda"].build, "learn", learn)
    status, _, err = cairn("run", "lda", "--data", features, "--step", 2, "--out", "x")
    assert (status, err) == (2, f"cairn: out of memory{asked}; free some, or give less at once\n")

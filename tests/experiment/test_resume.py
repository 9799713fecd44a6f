"""Runs that are cut off and gone on with: equal, bit for bit, to runs that nobody touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutting import Cut, Cutting

from cairn.cli.app import main
from cairn.data.loading import Loader
from cairn.errors import NotFinite, ResultError
from cairn.experiment.folder import CALL, CHECKPOINT, EVENTS, LOCK, RESULT, Call, Lock, RunFolder
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods import dmc
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import LearnsOnline, LearnsUnlabelled
from cairn.storage.archive import Archive
from cairn.storage.files import read_json
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "dmc": ("stage1.schedule.epochs=2", "stage2.schedule.epochs=2"),
    "dmc-ot": ("stage1.schedule.epochs=2", "stage2.schedule.epochs=2"),
    "finetune": ("stage1.schedule.epochs=2",),
    "joint": ("stage1.schedule.epochs=2", "stage2.schedule.epochs=2"),
    **dict.fromkeys(
        ("spa", "rapf", "proof", "engine", "calfuse", "capnet", "reco", "fm-lora", "mccl"), ("schedule.epochs=2",)
    ),
    "clipood": ("stage1.schedule.epochs=2",),
    "slca": ("stage1.schedule.epochs=2", "stage2.schedule.epochs=2", "stage2.per_class=16"),
    "aper": ("schedule.epochs=2",),
    "ranpac": ("width=100",),
    "acil": ("width=100",),
    "cgil": ("generator.steps=3", "stage2.schedule.epochs=2"),
}


def atomic_write(config):
    """Result, learned state and units of work of an untouched run."""
    states, checkpoint = [], Cutting()
    result = run_stream(
        config, learned=lambda learned: states.append(learned.method.state_dict()), checkpoint=checkpoint
    )
    return result, states[0], len(checkpoint.names)


def cut_and_gone_on(config, archive, after):
    """The same in pieces of `after` units each."""
    states, pieces = [], 0
    while True:
        try:
            result = run_stream(
                config,
                learned=lambda learned: states.append(learned.method.state_dict()),
                checkpoint=Cutting(after),
                archive=archive,
            )
            return result, states[0], pieces
        except Cut:
            pieces += 1
            assert pieces < 500, "it never gets on"


def assert_same(one, other):
    assert one[0].accuracy == other[0].accuracy
    assert one[0].zero_shot_accuracy == other[0].zero_shot_accuracy
    assert one[1].keys() == other[1].keys()
    assert not [key for key in one[1] if not torch.equal(one[1][key], other[1][key])]


@pytest.mark.parametrize("name", METHODS)
def test_cut_off_anywhere_the_end_is_the_same(name, features, tmp_path):
    config = RunConfig(method=name, data=features, step=2, settings=QUICK.get(name, ()))
    reference = atomic_write(config)
    units = reference[2]
    for after in sorted({max(2, units // 7), units // 2 + 1}):
        found = cut_and_gone_on(config, Archive(tmp_path / str(after), "run"), after)
        assert_same(reference, found)
        assert found[2] > 0 or units < after
        assert found[0].resumed == found[2]


@pytest.mark.parametrize("name", [name for name in METHODS if LearnsUnlabelled in METHODS[name].capabilities])
def test_with_images_without_labels_too(name, features, tmp_path):
    config = RunConfig(method=name, data=features, step=2, labelled=0.25, settings=QUICK.get(name, ()))
    reference = atomic_write(config)
    found = cut_and_gone_on(config, Archive(tmp_path, "run"), max(2, reference[2] // 6))
    assert_same(reference, found)
    assert found[2] > 0
    assert found[0].temperature == reference[0].temperature


@pytest.mark.parametrize("name", [name for name in METHODS if LearnsOnline in METHODS[name].capabilities])
def test_within_an_online_stream_too(name, features, tmp_path):
    stream = {"stream": "online", "chunk": 13, "blurry": 0.3}
    config = RunConfig(method=name, data=features, step=2, settings=QUICK.get(name, ()), **stream)
    reference = atomic_write(config)
    found = cut_and_gone_on(config, Archive(tmp_path, "run"), max(2, reference[2] // 6))
    assert_same(reference, found)
    assert found[0].chunk_accuracy == reference[0].chunk_accuracy
    # What ranpac takes for its sums' product anew is equal up to rounding
    exact = name != "ranpac"
    assert found[0].temperature == (
        reference[0].temperature if exact else pytest.approx(reference[0].temperature, 1e-3)
    )
    assert len(found[0].seconds_per_task) == 3
    assert found[2] > 0 or name == "zero-shot"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dmc-ot", ("probes=1", "stage1.schedule.batch=8", "stage2.schedule.epochs=1")),
        ("dmc", ("stage1.tuning=full", "stage1.schedule.batch=8", "stage2.text=prompts", "stage2.schedule.epochs=1")),
        ("dmc", ("stage1.schedule.optimizer=sgd", "stage1.schedule.batch=8", "stage2.schedule.epochs=1")),
        ("spa", ("schedule.epochs=2", "local.score=plan")),
    ],
)
def test_on_images_too(name, settings, tmp_path):
    config = RunConfig(
        method=name, data="shapes", step=20, limit_train=1, limit_test=1, device="cpu", settings=settings
    )
    reference = atomic_write(config)
    assert_same(reference, cut_and_gone_on(config, Archive(tmp_path, "run"), reference[2] // 3 + 1))


def test_what_is_finished_is_not_done_again(features, tmp_path):
    """A stage that is done is handed back: its epochs are not told a second time."""
    config = RunConfig(method="dmc", data=features, step=2, settings=QUICK["dmc"])
    events, archive = [], Archive(tmp_path, "run")
    while True:
        try:
            run_stream(config, Log(keep=events.append), checkpoint=Cutting(5), archive=archive)
            break
        except Cut:
            continue
    told = [(e["task"], e["stage"], e["epoch"]) for e in events if e["event"] == "epoch"]
    assert len(told) == len(set(told)) == 3 * 4


@pytest.mark.parametrize("part", ["manifest", "tensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(features, tmp_path, part):
    config = RunConfig(method="dmc", data=features, step=2, settings=QUICK["dmc"])
    reference, archive = atomic_write(config), Archive(tmp_path, "run")
    with pytest.raises(Cut):
        run_stream(config, checkpoint=Cutting(6), archive=archive)
    newest = max(tmp_path.glob("run-*.json"))
    entries = [entry["file"] for entry in read_json(newest)["parts"].values()]
    before = max(set(tmp_path.glob("run-*.json")) - {newest})
    kept = {entry["file"] for entry in read_json(before)["parts"].values()}
    own = [file for file in entries if file not in kept]
    target = newest if part == "manifest" else tmp_path / own[0]
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    events, states = [], []
    result = run_stream(
        config,
        Log(keep=events.append),
        lambda learned: states.append(learned.method.state_dict()),
        checkpoint=Checkpoint(),
        archive=Archive(tmp_path, "run"),
    )
    assert [target.name in e["text"] for e in events if e["event"] == "warning"] == [True]
    assert_same(reference, (result, states[0]))


def test_another_call_data_or_towers_is_not_gone_on_with(features, tmp_path):
    config, archive = RunConfig(method="dmc", data=features, step=2, settings=QUICK["dmc"]), Archive(tmp_path, "run")
    with pytest.raises(Cut):
        run_stream(config, checkpoint=Cutting(4), archive=archive)
    with pytest.raises(ResultError, match="another call"):
        run_stream(config.model_copy(update={"seed": 5}), checkpoint=Checkpoint(), archive=archive)


def test_a_loss_that_is_no_number_keeps_the_last_good_state(features, tmp_path):
    """Task, stage and step are named, and what was learned before can be gone on with."""
    config, archive = RunConfig(method="dmc", data=features, step=2, settings=QUICK["dmc"]), Archive(tmp_path, "run")
    calls = []
    plain = dmc.class_cross_entropy

    def spoilt(*args, **kwargs):
        calls.append(1)
        value = plain(*args, **kwargs)
        return value * float("nan") if len(calls) == 5 else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmc, "class_cross_entropy", spoilt)
        with pytest.raises(NotFinite, match=r"task \d, stage \d, epoch \d, step \d+: the loss is nan"):
            run_stream(config, checkpoint=Checkpoint(steps=1), archive=archive)
    states = []
    result = run_stream(
        config,
        learned=lambda learned: states.append(learned.method.state_dict()),
        checkpoint=Checkpoint(),
        archive=Archive(tmp_path, "run"),
    )
    assert_same(atomic_write(config), (result, states[0]))


def test_a_statistic_that_is_no_number_names_the_task(features, monkeypatch):
    plain = Loader._next
    monkeypatch.setattr(Loader, "_next", lambda self, ahead: (lambda x, y: (x * float("inf"), y))(*plain(self, ahead)))
    with pytest.raises(NotFinite, match="task 0"):
        run_stream(RunConfig(method="dmc", data=features, step=2, settings=("stage1.schedule.epochs=0",)))


def test_below_zero_shot_is_a_warning(features):
    events = []
    hopeless = ("stage1.schedule.lr=50", "stage1.schedule.epochs=3", "stage2.text=templates")
    run_stream(RunConfig(method="finetune", data=features, step=2, settings=hopeless[:2]), Log(keep=events.append))
    assert any("below" in e["text"] and "zero-shot" in e["text"] for e in events if e["event"] == "warning")


def test_zero_shot_itself_is_never_below_zero_shot():
    # Of these 1,000 test images one lies within 7e-8 of the border between two classes
    events = []
    result = run_stream(RunConfig(method="zero-shot", data="shapes", step=5, limit_train=1), Log(keep=events.append))
    assert result.seen_accuracy == pytest.approx(result.zero_shot_accuracy, abs=1e-12)
    assert not [e for e in events if e["event"] == "warning"]


# the command


def command(*words, out):
    return ["run", "dmc", "--data", "shapes", "--step", "20", "--limit-train", "6", "--limit-test", "1", "--device", "cpu",
            "--set", "stage2.schedule.epochs=2", "--checkpoint-steps", "1", *words, "--out", str(out)]  # fmt: skip


def called(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["cairn", *words])
    main()


def test_a_signal_finishes_the_step_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    called(monkeypatch, *command(out=tmp_path / "whole"))
    plain = Checkpoint.step
    steps = []

    def interrupted(self, name, state):
        steps.append(name)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "step", interrupted)
        with pytest.raises(SystemExit) as stop:
            called(patch, *command(out=tmp_path / "cut"))
    assert stop.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert said == f"cairn: interrupted (SIGTERM); to go on: cairn run --resume {tmp_path / 'cut'}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (tmp_path / "cut" / LOCK).exists()
    called(monkeypatch, "run", "--resume", str(tmp_path / "cut"))
    results = [json.loads((tmp_path / name / RESULT).read_text()) for name in ("whole", "cut")]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[1]["resumed"] == 1
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {RESULT, EVENTS}
    told = [json.loads(line)["event"] for line in (tmp_path / "cut" / EVENTS).read_text().splitlines()]
    assert told.count("start") == 2
    assert "resumed" in told
    with pytest.raises(SystemExit):
        called(monkeypatch, "run", "--resume", str(tmp_path / "cut"))
    assert "finished" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--resume",)])
def test_a_kill_between_the_result_and_the_last_removal_leaves_nothing_for_good(words, tmp_path, monkeypatch, capsys):
    def cut(self):
        raise Cut

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "clear", cut)
        with pytest.raises(Cut):
            called(patch, *command(out=folder))
    assert {RESULT, CHECKPOINT, CALL} <= {path.name for path in folder.iterdir()}
    again = ["run", "--resume", str(folder)] if words else command(out=folder)
    other = Lock(folder).take()  # somebody writes there
    called(monkeypatch, *again)
    assert (folder / CHECKPOINT).exists()
    assert (folder / LOCK).exists()
    other.release()
    called(monkeypatch, *again)
    assert "already finished" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {RESULT, EVENTS}


def test_who_takes_a_lock_twice_holds_it_until_the_last(tmp_path):
    lock = Lock(tmp_path).take().take()
    lock.release()
    with pytest.raises(ResultError, match="is being written by"):
        Lock(tmp_path).take()
    lock.release()
    assert not (tmp_path / LOCK).exists()
    Lock(tmp_path).take().release()


def test_seeds_are_gone_on_with_by_the_folder_above(tmp_path, monkeypatch):
    count = []
    plain = Checkpoint.step

    def interrupted(self, name, state):
        count.append(name)
        if len(count) == 14:
            self.stop(signal.SIGINT)
        plain(self, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "step", interrupted)
        with pytest.raises(SystemExit):
            called(patch, *command("--seeds", "1,2", out=tmp_path))
    called(monkeypatch, "run", "--resume", str(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"] == [1, 2]
    assert not list(tmp_path.rglob(CALL))


def test_a_folder_of_another_call_is_refused_and_kept(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoint, "step", lambda self, name, state: (self.save(), self.stop(signal.SIGINT), self.poll())
        )
        with pytest.raises(SystemExit):
            called(patch, *command(out=tmp_path))
    held = sorted((p.name, p.read_bytes()) for p in (tmp_path / CHECKPOINT).iterdir())
    with pytest.raises(SystemExit):
        called(monkeypatch, *command("--seed", "9", out=tmp_path))
    assert "holds another run (seed 1, not 9)" in capsys.readouterr().err
    assert held == sorted((p.name, p.read_bytes()) for p in (tmp_path / CHECKPOINT).iterdir())
    called(monkeypatch, *command("--seed", "9", "--overwrite", out=tmp_path))
    assert json.loads((tmp_path / RESULT).read_text())["seed"] == 9


@pytest.mark.parametrize("words", [("run", "--resume", "nowhere"), ("run", "dmc", "--resume", "nowhere")])
def test_resume_says_what_it_needs(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        called(monkeypatch, *words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# one writer


def test_a_second_process_is_refused_and_a_dead_one_is_succeeded(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from cairn.experiment.folder import Lock; "
        "held = Lock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResultError, match=f"is being written by process {other.pid} on "):
            Lock(tmp_path).take()
        folder = RunFolder(tmp_path, Call(run=RunConfig(method="dmc"), checkpoint_seconds=60))
        with pytest.raises(ResultError, match="is being written by"):
            folder.open()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    lock = Lock(tmp_path).take()
    assert lock.stale.startswith(f"process {other.pid} on ")
    lock.release()
    again = Lock(tmp_path).take()
    assert again.stale is None
    again.release()


@pytest.mark.timeout(1800)
def test_eight_kills_change_no_bit():
    """Real processes, killed for real; `make torture` does two hundred."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "stress" / "torture.py", "--kills", "8"],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    report = json.loads(done.stdout)
    assert report["kills"] >= 8
    assert report["different"] == []

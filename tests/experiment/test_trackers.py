"""What trackers are told. TensorBoard is the real one, and its files are read back. For wandb, trackio and mlflow modules
stand in that have the calls which accelerate makes of them and write down what they are told: no client of theirs is needed,
and nothing is sent."""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from cairn.errors import ConfigError, UnknownName
from cairn.experiment.schema import RunConfig
from cairn.experiment.trackers import Tracking
from cairn.storage.distribution import extra_remedy

DMC = ("run", "dmc", "--step", 3, "--set", "stage1.schedule.epochs=2", "--set", "stage2.schedule.epochs=3")


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the event files of a folder hold, by name: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {name: [(item.step, item.value) for item in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_holds_what_the_events_and_the_result_say(cairn, features, tmp_path):
    pytest.importorskip("tensorboard")
    status, _, err = cairn(*DMC, "--data", features, "--out", "here", "--track", "tensorboard")
    assert (status, err) == (0, "")
    found = scalars(tmp_path / "here" / "tensorboard")
    result = json.loads((tmp_path / "here" / "result.json").read_text())

    epochs = events(tmp_path / "here", "epoch")
    for stage in (1, 2):
        told = [(number, event["loss"]) for number, event in enumerate(epochs) if event["stage"] == stage]
        assert found[f"loss/stage {stage}"] == [(step, pytest.approx(loss)) for step, loss in told]
    assert found["accuracy/seen"] == [(i, pytest.approx(value)) for i, value in enumerate(result["seen_accuracy"])]
    assert found["accuracy/task 0"] == [(i, pytest.approx(row[0])) for i, row in enumerate(result["accuracy"])]
    assert found["accuracy/task 1"] == [(1, pytest.approx(result["accuracy"][1][1]))]
    assert found["accuracy/future"] == [
        (0, pytest.approx(result["future_accuracy"][0]))
    ]  # after the last task: nothing
    assert [step for step, _ in found["accuracy/zero_shot"]] == [0, 1]
    assert found["seconds"] == [(i, pytest.approx(value)) for i, value in enumerate(result["seconds_per_task"])]
    assert found["memory_bytes"][-1] == (1, result["memory_bytes"])
    for key in ("average", "last", "forgetting", "seconds", "peak_rss_bytes"):
        assert found[f"result/{key}"] == [(1, pytest.approx(result[key]))]

    (settings,) = (tmp_path / "here" / "tensorboard").rglob("hparams.yml")
    assert "settings.stage1.schedule.epochs: 2" in settings.read_text()
    assert "method: dmc" in settings.read_text()


def test_tracking_moves_no_number(cairn, features, tmp_path):
    pytest.importorskip("tensorboard")
    for out, more in (("plain", ()), ("told", ("--track", "tensorboard"))):
        assert cairn(*DMC, "--data", features, "--seeds", "1,2", "--out", out, *more)[0] == 0
    plain, told = (json.loads((tmp_path / out / "seed-2" / "result.json").read_text()) for out in ("plain", "told"))
    assert plain["accuracy"] == told["accuracy"]
    assert scalars(tmp_path / "told" / "seed-1" / "tensorboard") != scalars(
        tmp_path / "told" / "seed-2" / "tensorboard"
    )
    assert not (tmp_path / "plain" / "seed-1" / "tensorboard").exists()


# --- the others, by stand-ins -----------------------------------------------------------------------------------------


class Told:
    """What a stand-in was told: settings, and rows as (step, values)."""

    def __init__(self):
        self.begun: list[dict] = []
        self.settings: dict = {}
        self.rows: list[tuple[int | None, dict]] = []
        self.finished = 0

    def row(self, values, step=None):
        self.rows.append((step, dict(values)))

    def finish(self):
        self.finished += 1

    def values(self, name: str) -> list[float]:
        return [values[name] for _, values in self.rows if name in values]


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module in a client's place and hands out what it is told."""

    def put(name: str) -> Told:
        told, module = Told(), types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # accelerate asks find_spec, which refuses a module without one
        config = types.SimpleNamespace(update=lambda values, allow_val_change: told.settings.update(values))
        run = types.SimpleNamespace(log=lambda values, step=None, **_: told.row(values, step), finish=told.finish)

        def begin(**arguments):
            told.begun.append(arguments)
            return run

        if name == "mlflow":
            validation = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
            module.utils = types.SimpleNamespace(validation=validation)
            module.search_experiments = lambda filter_string: []
            module.create_experiment = lambda name, **_: name
            module.start_run = begin
            module.log_params = told.settings.update
            module.log_metrics = lambda values, step: told.row(values, step)
            module.end_run = told.finish
        else:
            module.init, module.config, module.finish = begin, config, told.finish
        monkeypatch.setitem(sys.modules, name, module)
        return told

    return put


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_is_told_the_whole_run(cairn, features, tmp_path, stand_in, name, monkeypatch):
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})  # no other tracker has been started in this process
    told = stand_in(name)
    status, _, err = cairn(*DMC, "--data", features, "--out", "runs/here", "--track", name)
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "runs" / "here" / "result.json").read_text())
    (begun,) = told.begun
    assert begun["run_name" if name == "mlflow" else "name"] == "runs/here"
    assert told.settings["settings.stage2.schedule.epochs"] == 3
    assert told.settings["step"] == 3
    assert told.values("loss/stage 1") + told.values("loss/stage 2") == [
        event["loss"]
        for stage in (1, 2)
        for event in events(tmp_path / "runs" / "here", "epoch")
        if event["stage"] == stage
    ]
    assert told.values("accuracy/seen") == pytest.approx(result["seen_accuracy"])
    assert told.values("result/average") == [result["average"]]
    assert told.finished == 1
    if name == "mlflow":
        assert [step for step, values in told.rows if "accuracy/seen" in values] == [0, 1]
    else:  # these two number their rows themselves
        assert {step for step, _ in told.rows} == {None}
        assert told.values("epoch") == list(range(10))
        assert told.values("task") == [0, 1, 1]


def test_several_trackers_at_once(cairn, features, stand_in):
    first, second = stand_in("wandb"), stand_in("mlflow")
    call = (*DMC, "--data", features, "--track", "wandb", "--track", "mlflow", "--track", "wandb")
    assert cairn(*call)[0] == 0
    assert len(first.begun) == len(second.begun) == 1
    assert first.values("accuracy/seen") == second.values("accuracy/seen")


@pytest.mark.parametrize("where", ["begin", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    cairn, features, tmp_path, stand_in, monkeypatch, where
):
    told, other = stand_in("wandb"), stand_in("mlflow")

    def fail(*_, **__):
        raise OSError("the line\nis dead")

    client = sys.modules["wandb"]
    if where == "begin":
        monkeypatch.setattr(client, "init", fail)
    elif where == "settings":
        monkeypatch.setattr(client.config, "update", fail)
    else:
        run = client.init()
        monkeypatch.setattr(run, where, fail)
        monkeypatch.setattr(client, "init", lambda **_: run)
    status, out, err = cairn(*DMC, "--data", features, "--out", "here", "--track", "wandb", "--track", "mlflow")
    assert (status, err) == (0, "")
    warning = r"--track wandb: the line\nis dead; the run goes on without it"
    assert [event["text"] for event in events(tmp_path / "here", "warning")] == [warning]
    assert f"WARNING: {warning}" in out
    assert (tmp_path / "here" / "result.json").is_file()
    assert bool(told.rows) == (where == "finish")
    assert other.values("result/average")


def test_a_run_that_goes_on_counts_its_epochs_on(stand_in, tmp_path):
    told = stand_in("mlflow")
    tracking = Tracking(["mlflow"], tmp_path, RunConfig(method="dmc"), warn=pytest.fail)
    epoch = {"event": "epoch", "stage": 1, "loss": 0.5}
    tracking.begin([{"event": "start"}, epoch, epoch, {"event": "task"}, epoch])
    tracking(epoch)
    tracking(epoch | {"stage": 2})
    assert [step for step, _ in told.rows] == [3, 4]


def test_a_run_that_was_asked_to_track_goes_on_tracking(cairn, features, stand_in, monkeypatch, tmp_path):
    told = stand_in("mlflow")
    from cairn.experiment.evaluator import Evaluator

    after = Evaluator.after

    def stopped(self, task, method, *others, **more):
        if task == 1:
            raise KeyboardInterrupt
        return after(self, task, method, *others, **more)

    call = (*DMC, "--data", features, "--out", "here", "--checkpoint-seconds", 0, "--log-lines")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "after", stopped)
        assert cairn(*call, "--track", "mlflow")[0] == 130
    assert (len(told.begun), told.finished) == (1, 1)
    assert len(told.values("accuracy/seen")) == 1
    status, out, _ = cairn("run", "--resume", "here")
    assert status == 0
    seen = json.loads((tmp_path / "here" / "result.json").read_text())["seen_accuracy"]
    assert told.values("accuracy/seen") == pytest.approx(seen)
    assert (len(told.begun), told.finished) == (2, 2)
    assert f"CNN top1 curve: {[round(100 * value, 2) for value in seen]}" in out


# --- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("tensorboard", ""), *((name, f", and pip install {name}") for name in ("wandb", "trackio", "mlflow"))],
)
def test_a_missing_client_is_one_line_before_anything_happens(cairn, features, tmp_path, monkeypatch, name, remedy):
    monkeypatch.setitem(sys.modules, name, None)
    before = sorted(tmp_path.rglob("*"))
    status, _, err = cairn(*DMC, "--data", features, "--track", name)
    assert status == 2
    assert err.startswith(f"cairn: --track {name}: not there (")
    assert err.endswith(f"{extra_remedy('track')}{remedy}\n")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_client_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    def broken(name):
        raise AttributeError("no attribute\nof that name")

    monkeypatch.setattr("cairn.experiment.trackers.importlib.import_module", broken)
    with pytest.raises(ConfigError, match=r"--track wandb: not there \(no attribute\)"):
        Tracking(["wandb"], tmp_path, RunConfig(method="dmc"), warn=pytest.fail)


def test_an_unknown_tracker_is_named_beside_the_known_ones(tmp_path):
    with pytest.raises(UnknownName, match="unknown tracker 'tensorbord': did you mean tensorboard"):
        Tracking(["tensorbord"], tmp_path, RunConfig(method="dmc"), warn=pytest.fail)

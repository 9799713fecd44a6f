"""Sweeps: what a file asks for, what is refused, what is done once and only once, and what is not lost."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cairn.errors import CairnError, ConfigError, Interrupted, NotFinite, ResultError
from cairn.experiment import run as running
from cairn.experiment.config_file import read_run_file
from cairn.experiment.folder import CALL, EVENTS, LOCK, RESULT, Call, Lock, read_result
from cairn.experiment.schema import RunConfig
from cairn.reports.page import page_of
from cairn.storage.distribution import extra_remedy
from cairn.sweep import worker
from cairn.sweep.file import read_sweep_file
from cairn.sweep.ledger import SWEEP, Job, Ledger, View, picture
from cairn.sweep.plan import folder_name, points_of
from cairn.sweep.runner import Serial, Sweep, outcome_of, problem
from cairn.sweep.search import JOURNAL
from cairn.sweep.worker import Outcome, attempt, attempt_in_ray
from cairn.training.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
QUICK = "[settings]\nstage1.schedule.epochs = 1\nstage2.schedule.epochs = 1\n"
SEARCH = "[search]\ntrials = 3\n[search.space]\nstage1.schedule.lr = {low = 1e-4, high = 1e-1, log = true}\n"


@pytest.fixture
def write(tmp_path, features):
    """Writes a sweep file on the embedded data and reads it."""

    def text(body: str, name: str = "sweep.toml", head: str = ""):
        path = tmp_path / name
        path.write_text(f'data = "{features}"\nstep = 2\n{head}\n{body}', encoding="utf-8")
        return path

    return text


@pytest.fixture
def sweep(write, tmp_path):
    """Carries out a file's sweep into a folder, one run after the other; the ledger."""

    def call(body: str, out: str = "out", pool=Serial, head: str = "") -> Ledger:
        return Sweep(read_sweep_file(write(body, head=head)), tmp_path / out, View(io.StringIO())).run(pool)

    return call


def names(ledger: Ledger) -> list[str]:
    return [job.name for job in ledger.jobs]


def events(folder: Path, kind: str) -> list[dict]:
    told = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return [event for event in told if event["event"] == kind]


def accuracies(folder: Path) -> dict[str, list]:
    found = {path.parent.relative_to(folder).as_posix(): read_result(path) for path in folder.rglob(RESULT)}
    return {name: result.accuracy for name, result in found.items()}


# what a file asks for


def test_runs_are_the_product_of_the_axes_and_named_after_them(write):
    path = write(
        '[grid]\nmethod = ["dmc", "dmc-ot"]\nlimit_train = [5, 10]\nstage1.schedule.lr = [0.001]\nseeds = [1, 2]\n'
        + QUICK
    )
    points = points_of(read_sweep_file(path))
    assert [point.name for point in points] == [
        f"{method},limit_train={limit},stage1.schedule.lr=0.001" for method in ("dmc", "dmc-ot") for limit in (5, 10)
    ]
    name, config = points[1].runs()[1]
    assert name == "dmc,limit_train=10,stage1.schedule.lr=0.001/seed-2"
    assert (config.method, config.limit_train, config.seed, config.step) == ("dmc", 10, 2, 2)
    assert config.settings == {"stage1.schedule.lr": 0.001, "stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1}


def test_sets_of_settings_go_together_and_a_choice_comes_before_its_parts(write):
    body = '[grid]\nsettings = [{drift.kind = "none"}, {"drift.lam" = 0.1, drift.kind = "local"}]\n'
    first, second = points_of(read_sweep_file(write(body, head='method = "dmc-ot"')))
    assert first.config.settings == {"drift": "none"}
    assert list(second.config.settings.items()) == [("drift", "local"), ("drift.lam", 0.1)]
    assert second.name == "dmc-ot,drift.lam=0.1,drift=local"


def test_a_value_of_the_grid_takes_the_place_of_the_shared_one(write):
    body = "[settings]\nprobes = 0\n[grid]\nprobes = [0, 1]\n"
    configs = [point.config for point in points_of(read_sweep_file(write(body, head='method = "dmc-ot"')))]
    assert [config.settings for config in configs] == [{"probes": 0}, {"probes": 1}]


def test_the_step_is_the_usual_one_of_each_data_set(tmp_path):
    (tmp_path / "s.toml").write_text('method = "dmc"\n[grid]\ndata = ["shapes", "cifar100"]\n')
    assert [point.config.step for point in points_of(read_sweep_file(tmp_path / "s.toml"))] == [5, 10]


def test_folders_of_odd_values_are_safe_and_unique():
    odd = ["a/b", "a:b", "a,b", "../..", "x" * 300, "a=b", "ü"]
    found = [folder_name("dmc", {"data": value}) for value in odd]
    assert len(set(found)) == len(odd)
    assert all("/" not in name and len(name) < 150 and name.startswith("dmc,data=") for name in found)
    assert folder_name("dmc", {"a": "1,b=2"}) != folder_name("dmc", {"a": "1", "b": "2"})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            'method = "dmc"\nlimit_trian = 3',
            "unknown key of sweep file 'sweep.toml': 'limit_trian': did you mean limit_train",
        ),
        ('method = "dmc"\ncpu = 3', "'cpu': did you mean cpus"),
        ('method = "dmc"\ncpus = 0', "cpus = 0: must be greater than or equal to 1"),
        ('method = "dmc"\nmemory = "4 XB"', "memory = '4 XB': could not interpret byte unit: XB"),
        ('method = "dmc"\ngpus = 1.5', "gpus = 1.5: must be a share of one, or a whole number"),
        ('method = "dmc"\n[grid]\nlimit_trian = [3]', "'limit_trian': did you mean limit_train"),
        ('method = "dmc"\n[grid]\nsteps = 3', "grid.steps = 3: must be a list of values"),
        ('method = "dmc"\n[grid]\nstage9.lr = [3]', "unknown key of [grid] in 'sweep.toml': 'stage9.lr'"),
        ('method = "dmc"\n[settings]\nstage9.lr = 3', "unknown key of [settings] in 'sweep.toml': 'stage9.lr'"),
        ('method = "dmc"\n[grid]\nvalidation = ["x"]', "validation = 'x': must be a number"),
        ('method = "dmc"\nseed = 1\n[grid]\nseeds = [1]', "seeds are given twice"),
        ('method = "dmc"\n[grid]\nseeds = [1, 1]', "must differ"),
        ('method = "dmc"\ngrid = 3', "grid = 3: must be a table"),
        ('method = "dmc"\n[grid]\nsettings = [3]', "must be a list of tables"),
        ('[grid]\nmethod = ["dmc", "dcm"]', "unknown method 'dcm': did you mean dmc"),
        ("[grid]\nstep = [3]", "no method"),
        (
            'method = "dmc"\n[search]\ntrial = 3',
            "unknown key of [search] in sweep file 'sweep.toml': 'trial': did you mean trials",
        ),
        ('method = "dmc"\n[search]\ntrials = 3', "search.space"),
        (f'method = "dmc"\n{SEARCH}probes = {{lo = 3}}', "search.space.probes.lo = 3: must be a table"),
        (f'method = "dmc"\n{SEARCH}stage2.text = {{low = 3}}', "must have low and high, or choices"),
        (f'method = "dmc"\n{SEARCH}stage2.text = {{low = 3, hihg = 4}}', "'hihg': did you mean high"),
        (f'method = "dmc"\n{SEARCH}stage2.text = {{low = 3, high = 3}}', "low must be less than high"),
        (f'method = "dmc"\n{SEARCH}order = {{choices = ["natural"]}}', "trials would not be comparable"),
        (f'method = "dmc"\n{SEARCH}[grid]\nstage1.schedule.lr = [0.1]', "both in [grid] and in [search]"),
        ("method = ", "not TOML"),
    ],
)
def test_a_file_that_is_no_sweep_is_one_line(cairn, tmp_path, body, says):
    (tmp_path / "sweep.toml").write_text(body, encoding="utf-8")
    status, out, err = cairn("sweep", "sweep.toml", "--engine", "serial")
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('[grid]\nmethod = ["dmc-ot", "dmc"]\nprobes = [0]', "run 'dmc,probes=0': unknown setting 'probes'"),
        ('[grid]\nmethod = ["dmc"]\nstage1.schedule.lr = [0.1, "x"]', "stage1.schedule.lr=x"),
        ('[grid]\nmethod = ["dmc"]\nlimit_train = [5]\ndata = ["nowhere/at-all"]', "nowhere/at-all"),
        (
            '[grid]\nmethod = ["dmc-ot"]\nprobes = [0, 1]',
            "run 'dmc-ot,probes=1': probes: a features file has no images",
        ),
        ('[grid]\nmethod = ["dmc"]\nstep = [2, 41]', "step 41 is larger"),
        ('[grid]\nmethod = ["dmc"]\ndevice = ["cpu", "gpu"]', "run 'dmc,device=gpu': device 'gpu'"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_any_runs(cairn, write, tmp_path, body, says):
    status, _, err = cairn("sweep", write(body), "--engine", "serial", "--out", "out")
    assert status == 2
    assert says in err
    assert not (tmp_path / "out").exists()


# done once


def test_a_sweep_leaves_run_folders_and_tables(cairn, write, tmp_path):
    path = write('seeds = [1, 2]\n[grid]\nmethod = ["simplecil", "dmc"]\n')
    status, out, err = cairn("sweep", path, "--engine", "serial", "--out", "out")
    assert (status, err) == (0, "")
    assert "[4/4] dmc/seed-2: average" in out
    stored = json.loads((tmp_path / "out" / SWEEP).read_text())
    assert stored["state"] == "finished"
    assert [run["folder"] for run in stored["runs"]] == [f"{m}/seed-{n}" for m in ("simplecil", "dmc") for n in (1, 2)]
    results = {run["folder"]: read_result(tmp_path / "out" / run["folder"]) for run in stored["runs"]}
    for run in stored["runs"]:
        assert (run["state"], run["attempts"]) == ("finished", 1)
        assert run["average"] == results[run["folder"]].average
        assert {path.name for path in (tmp_path / "out" / run["folder"]).iterdir()} == {RESULT, EVENTS}
    values = [results[f"dmc/seed-{n}"].average for n in (1, 2)]
    assert stored["table"][1]["average"] == {
        "mean": pytest.approx(sum(values) / 2),
        "deviation": pytest.approx(abs(values[0] - values[1]) / 2**0.5),
        "values": values,
    }
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | average % | last % |")
    assert lines[3].startswith("| dmc |")
    assert 'method,average %,"average %, deviation"' in (tmp_path / "out" / "table.csv").read_text()
    assert not list((tmp_path / "out").rglob(LOCK))
    assert cairn("table", "out")[0] == 0


def test_what_is_finished_is_not_run_again_also_when_the_sweep_grows(sweep, tmp_path):
    head = 'method = "dmc"'
    sweep("[grid]\nlimit_train = [5]\nseeds = [1]", head=head)
    first = tmp_path / "out" / "dmc,limit_train=5" / "seed-1"
    before = (first / RESULT).stat().st_mtime_ns
    grown = sweep("[grid]\nlimit_train = [5, 6]\nseeds = [1, 2]", head=head)
    assert [job.attempts for job in grown.jobs] == [1, 1, 1, 1]
    assert len(names(grown)) == 4
    # A key more: its first value is the default, written out, so that run is there under its old name
    wider = sweep("[grid]\nlimit_train = [5]\nstage1.schedule.epochs = [10, 1]\nseeds = [1]", head=head)
    assert names(wider) == ["dmc,limit_train=5/seed-1", "dmc,limit_train=5,stage1.schedule.epochs=1/seed-1"]
    assert (first / RESULT).stat().st_mtime_ns == before


def test_stored_runs_of_data_that_has_changed_are_refused(sweep, features_file, embedded_dataset):
    """Their means with new runs would be of two data sets."""
    sweep("[grid]\nseeds = [1]", head='method = "simplecil"')
    train = embedded_dataset.train
    features_file(train_features=train.values[1:], train_labels=train.labels[1:])
    with pytest.raises(ResultError, match="run 'simplecil/seed-1' saw other images than its call finds today"):
        sweep("[grid]\nseeds = [1, 2]", head='method = "simplecil"')


def test_equal_configs_are_one_run(cairn, write, tmp_path):
    path = write(
        "[grid]\nsettings = [{}, {stage1.schedule.epochs = 10}, {stage1.schedule.epochs = 1e1}]\n",
        head='method = "dmc"',
    )
    status, out, _ = cairn("sweep", path, "--engine", "serial", "--out", "out")
    assert status == 0
    assert "1 finished (2 more the same as one of these)" in " ".join(out.split())
    assert len(list((tmp_path / "out").rglob(RESULT))) == 1


def test_a_folder_of_another_sweep_is_refused(sweep):
    sweep("[grid]\nseeds = [1]", head='method = "simplecil"')
    with pytest.raises(ResultError, match=r"holds another run \(limit_train None, not 3\)"):
        sweep("[grid]\nseeds = [1]", head='method = "simplecil"\nlimit_train = 3')


def test_two_sweeps_do_not_share_a_folder(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out").take()
    with pytest.raises(ResultError, match="is being written by"):
        sweep("[grid]\nseeds = [1]", head='method = "simplecil"')
    lock.release()


def call_of(features) -> dict:
    return Call(run=RunConfig(method="dmc", data=features, step=2), checkpoint_seconds=60.0).model_dump(mode="json")


def test_a_run_that_is_being_written_is_waited_for_and_not_begun_again(tmp_path, features, monkeypatch):
    """The first of two attempts still writes when the second comes; the second takes over what the first has done."""
    plain, writing, go_on = worker._run, threading.Event(), threading.Event()

    def slow(folder, checkpoint):
        writing.set()
        go_on.wait()
        return plain(folder, checkpoint)

    monkeypatch.setattr(worker, "_run", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(attempt, tmp_path / "r", call_of(features), Checkpoint())
        writing.wait()
        second = threads.submit(attempt, tmp_path / "r", call_of(features), Checkpoint())
        time.sleep(0.3)
        assert not second.done()
        go_on.set()
        outcomes = first.result(), second.result()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].state == "finished"
    assert len(events(tmp_path / "r", "attempt")) == 1


def test_a_run_that_is_written_for_too_long_is_told(tmp_path, features, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", 0.0)
    lock = Lock(tmp_path).take()
    outcome = attempt(tmp_path, call_of(features), Checkpoint())
    lock.release()
    assert outcome.state == "failed"
    assert "is being written by" in outcome.reason


# not lost


@pytest.mark.parametrize("error", [NotFinite("the loss is nan"), RuntimeError("a fault")])
def test_a_run_that_fails_is_told_and_the_others_go_on(cairn, write, tmp_path, monkeypatch, error):
    plain = running.run_stream

    def spoilt(config, *args, **kwargs):
        if config.seed == 2:
            raise error
        return plain(config, *args, **kwargs)

    path = write("seeds = [1, 2, 3]", head='method = "simplecil"')
    with monkeypatch.context() as patch:
        patch.setattr(running, "run_stream", spoilt)
        status, out, err = cairn("sweep", path, "--engine", "serial", "--out", "out")
    assert status == 2
    assert str(error) in err
    assert "1 of 3 runs did not end" in err
    stored = json.loads((tmp_path / "out" / SWEEP).read_text())
    assert [run["state"] for run in stored["runs"]] == ["finished", "failed", "finished"]
    assert stored["runs"][1]["attempts"] == 1
    assert stored["table"][0]["missing"] == [2]
    assert "2 failed" in (tmp_path / "out" / "table.md").read_text()
    assert "Traceback" in events(tmp_path / "out" / "simplecil" / "seed-2", "error")[0]["traceback"]
    status, out, _ = cairn("sweep", path, "--engine", "serial", "--out", "out")
    assert status == 0
    assert "3 finished" in out
    assert [run["attempts"] for run in json.loads((tmp_path / "out" / SWEEP).read_text())["runs"]] == [1, 2, 1]


class Losing(Serial):
    """The worker of one run is gone as often as it may be begun."""

    def submit(self, path, call):
        from ray.exceptions import WorkerCrashedError

        if path.name != "seed-3":
            return super().submit(path, call)
        lost: Future[Outcome] = Future()
        lost.set_exception(WorkerCrashedError())
        return lost


def test_a_lost_run_is_told_and_the_next_call_begins_it_again(sweep):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    ledger = sweep("seeds = [1, 2, 3]", pool=Losing, head='method = "simplecil"')
    assert [job.state for job in ledger.jobs] == ["finished", "finished", "lost"]
    assert "simplecil/seed-3: WorkerCrashedError" in str(problem(ledger))
    again = sweep("seeds = [1, 2, 3]", head='method = "simplecil"')
    assert [(job.state, job.attempts) for job in again.jobs] == 3 * [("finished", 1)]
    assert problem(again) is None


def test_what_ray_says_of_a_task_is_its_outcome():
    errors = pytest.importorskip("ray.exceptions", reason="pip install '.[ray]'")
    said = {}
    for error in (
        errors.TaskCancelledError(),
        errors.NodeDiedError("gone"),
        errors.RayTaskError("f", "t", ValueError("x")),
    ):
        ended: Future[Outcome] = Future()
        ended.set_exception(error)
        said[type(error).__name__] = outcome_of(ended).state
    assert said == {"TaskCancelledError": "stopped", "NodeDiedError": "lost", "RayTaskError": "failed"}


def test_interrupted_it_keeps_its_state_and_the_same_call_goes_on(cairn, write, tmp_path, monkeypatch):
    path = write('seeds = [1, 2]\n[grid]\nmethod = ["dmc"]\n' + QUICK)
    assert cairn("sweep", path, "--engine", "serial", "--out", "whole")[0] == 0
    plain, steps, before = Checkpoint.step, [], signal.getsignal(signal.SIGINT)

    def interrupted(self, name, state):
        steps.append(name)
        if len(steps) == 12:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)  # until the thread that looks on has seen it
        plain(self, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "step", interrupted)
        status, _, err = cairn("sweep", path, "--engine", "serial", "--out", "cut")
    assert status == 130
    assert err == "cairn: interrupted (Ctrl-C); the same call goes on where it was\n"
    assert signal.getsignal(signal.SIGINT) is before
    stored = json.loads((tmp_path / "cut" / SWEEP).read_text())
    assert stored["state"] == "stopped"
    assert "waiting" in [run["state"] for run in stored["runs"]]
    assert list((tmp_path / "cut").rglob(CALL))
    assert not list((tmp_path / "cut").rglob(LOCK))
    assert cairn("sweep", path, "--engine", "serial", "--out", "cut")[0] == 0
    assert accuracies(tmp_path / "cut") == accuracies(tmp_path / "whole")
    assert sum(read_result(found).resumed for found in (tmp_path / "cut").rglob(RESULT)) == 1


# searching

HELD_OUT = 'method = "dmc"\nvalidation = 0.3'


def trials(folder: Path) -> list[tuple]:
    runs = json.loads((folder / SWEEP).read_text())["runs"]
    return [(run["folder"], run["average"]) for run in runs]


def test_a_search_never_sees_the_test_images(cairn, write, tmp_path):
    path = write(SEARCH, head='method = "dmc"')
    status, _, err = cairn("sweep", path, "--engine", "serial", "--out", "out")
    assert status == 2
    assert "search with validation 0: it would choose by the test images; set validation = 0.2" in err
    assert not (tmp_path / "out").exists()


def test_a_search_leaves_trials_as_runs_and_the_best_as_a_run_file(cairn, write, tmp_path):
    body = QUICK + 'stage2.text = "templates"\n' + SEARCH.replace("trials = 3", 'trials = 3\nmetric = "last"')
    body += "stage1.schedule.batch = {low = 4, high = 64}\nprecision = {choices = ['float32']}\n"
    path = write(body, head=HELD_OUT + "\nseeds = [1, 2]")
    status, out, err = cairn("sweep", path, "--engine", "serial", "--out", "out")
    assert (status, err) == (0, "")
    stored = json.loads((tmp_path / "out" / SWEEP).read_text())
    assert len(stored["runs"]) == 6
    (best,) = stored["best"]
    means = [row["last"]["mean"] for row in stored["table"]]
    assert best["value"] == pytest.approx(max(means))
    assert best["varies"] == stored["table"][means.index(max(means))]["varies"]
    assert f"cairn run --config {Path('out') / best['file']}" in " ".join(out.split())
    file = read_run_file(tmp_path / "out" / best["file"])
    assert file.seeds == (1, 2)
    assert file.validation == 0.0
    result = read_result(next((tmp_path / "out" / best["trial"]).rglob(RESULT)))
    assert file.settings == result.run.settings
    assert result.run.validation == 0.3


def test_a_search_that_grows_asks_for_what_it_would_have_asked_for(sweep, tmp_path):
    for out, numbers in (("once", [4]), ("twice", [2, 4])):
        for number in numbers:
            sweep(QUICK + SEARCH.replace("trials = 3", f"trials = {number}"), out=out, head=HELD_OUT)
    assert trials(tmp_path / "once") == trials(tmp_path / "twice")
    assert len(trials(tmp_path / "once")) == 4


def test_a_trial_that_was_cut_off_is_gone_on_with(sweep, tmp_path):
    class Stopping(Serial):
        def submit(self, path, call):
            if "trial-001" in str(path):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().submit(path, call)

    with pytest.raises(Interrupted):
        sweep(QUICK + SEARCH, pool=Stopping, head=HELD_OUT)
    assert json.loads((tmp_path / "out" / SWEEP).read_text())["runs"][1]["state"] == "waiting"
    sweep(QUICK + SEARCH, head=HELD_OUT)
    sweep(QUICK + SEARCH, out="whole", head=HELD_OUT)
    assert trials(tmp_path / "out") == trials(tmp_path / "whole")


def test_a_trial_that_fails_is_told_once_and_the_search_goes_on(sweep, tmp_path, monkeypatch):
    plain = running.run_stream

    def spoilt(config, *args, **kwargs):
        if "trial-001" in str(kwargs["archive"].folder):
            raise NotFinite("the loss is nan")
        return plain(config, *args, **kwargs)

    monkeypatch.setattr(running, "run_stream", spoilt)
    ledger = sweep(QUICK + SEARCH, head=HELD_OUT)
    assert [job.state for job in ledger.jobs] == ["finished", "failed", "finished"]
    again = sweep(QUICK + SEARCH, head=HELD_OUT)
    assert sorted(job.attempts for job in again.jobs) == [1, 1, 1]
    assert [job.reason for job in again.jobs if job.state == "failed"] == ["the loss is nan"]
    assert again.best[0]["trials"] == 2


def test_another_search_in_the_same_folder_is_refused(sweep):
    sweep(QUICK + SEARCH.replace("trials = 3", "trials = 1"), head=HELD_OUT)
    with pytest.raises(ResultError, match="begun with another space; only trials may change"):
        sweep(QUICK + SEARCH.replace("1e-1", "1e-2"), head=HELD_OUT)
    with pytest.raises(ResultError, match="begun with another seeds"):
        sweep(QUICK + SEARCH, head=HELD_OUT + "\nseeds = [1, 2]")


def test_a_search_of_before_there_was_an_option_is_gone_on_with(sweep, tmp_path):
    sweep(QUICK + SEARCH.replace("trials = 3", "trials = 1"), head=HELD_OUT)
    journal = tmp_path / "out" / JOURNAL
    told = journal.read_text()
    assert '"imbalance":1.0,' in told
    journal.write_text(told.replace('"imbalance":1.0,', ""))
    assert len(sweep(QUICK + SEARCH.replace("trials = 3", "trials = 2"), head=HELD_OUT).jobs) == 2


def test_every_corner_of_a_search_is_found_good_first(write, tmp_path):
    body = QUICK + SEARCH + 'stage2.text = {choices = ["templates", "tempaltes"]}\n'
    held = Sweep(read_sweep_file(write(body, head=HELD_OUT)), tmp_path / "out", View(io.StringIO()))
    with pytest.raises(ConfigError, match=r"stage2.text=tempaltes': unknown stage2.text 'tempaltes'"):
        held.run()
    assert not (tmp_path / "out").exists()


def test_a_grid_of_searches_is_one_search_for_each(sweep, tmp_path):
    body = QUICK + SEARCH.replace("trials = 3", "trials = 2") + '[grid]\nmethod = ["dmc", "dmc-ot"]\n'
    ledger = sweep(body, head="validation = 0.3")
    assert [Path(best["file"]).parent.name for best in ledger.best] == ["dmc", "dmc-ot"]
    assert len(ledger.jobs) == 4
    assert (tmp_path / "out" / JOURNAL).is_file()


def test_a_journal_that_is_none_is_refused(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text("{}\nnothing\n")
    with pytest.raises(CairnError):
        sweep(QUICK + SEARCH, head=HELD_OUT)


# what is shown


def test_the_live_view_tells_what_runs_and_where_it_is(tmp_path, write):
    (point,) = points_of(read_sweep_file(write("seeds = [1, 2, 3]", head='method = "dmc"')))
    jobs = [Job(*run, point, state) for run, state in zip(point.runs(), ("running", "running", "waiting"), strict=True)]
    (tmp_path / jobs[0].name).mkdir(parents=True)
    told = [
        {"event": "start", "tasks": 4},
        {"event": "task", "task": 0, "seen": 0.9},
        {"event": "epoch", "task": 1, "stage": 2, "epoch": 2, "loss": 0.25},
    ]
    (tmp_path / jobs[0].name / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in told) + '{"event": "ta')
    assert picture(Ledger(tmp_path, {}, jobs)).splitlines() == [
        "dmc/seed-1  task 2  stage 2  epoch 3  loss 0.250",
        "dmc/seed-2  begins",
        "1 waiting, 2 running, 0 finished",
    ]


def test_a_dry_run_lists_and_leaves_nothing(cairn, write, tmp_path):
    path = write('seeds = [1, 2]\n[grid]\nmethod = ["simplecil", "dmc"]\n')
    status, out, _ = cairn("sweep", path, "--dry-run", "--out", "out")
    assert status == 0
    assert "waiting   dmc/seed-2" in out
    assert "4 runs: 4 waiting" in out
    assert not (tmp_path / "out").exists()


# on Ray


def test_a_device_that_ray_hands_out_is_not_chosen(cairn, write, tmp_path):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    status, _, err = cairn("sweep", write("seeds = [1]", head='method = "dmc"\ndevice = "cuda:1"'), "--out", "out")
    assert status == 2
    assert """give device = "cuda\"""" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["ray", "optuna"])
def test_what_is_not_installed_is_one_line(cairn, write, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    path = write(QUICK + SEARCH, head=HELD_OUT)
    status, _, err = cairn("sweep", path, "--out", "out", *(["--engine", "serial"] if missing == "optuna" else []))
    assert status == 2
    assert f"{missing} is missing; {extra_remedy('ray')}" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_threads_of_a_run_follow_its_cpus(tmp_path, features, monkeypatch):
    seen = {}

    def looked(path, call, checkpoint):
        seen["torch"] = torch.get_num_threads()
        seen["environment"] = [os.environ[name] for name in names]
        return Outcome("finished")

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    monkeypatch.chdir(tmp_path)
    for name in names:
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(worker, "attempt", looked)
    before = torch.get_num_threads()
    try:
        attempt_in_ray(tmp_path / "r", call_of(features), str(tmp_path), 3, accelerator=False)
    finally:
        torch.set_num_threads(before)
    assert seen == {"torch": 3, "environment": ["3", "3", ""]}
    elsewhere = attempt_in_ray(tmp_path / "r", call_of(features), "/not/there", 1, accelerator=True)
    assert elsewhere.state == "failed"
    assert "nodes must share files" in elsewhere.reason


CLUSTER = """
data = "shapes"
step = 10
limit_train = 2
limit_test = 1
device = "cpu"
seeds = [1, 2]
checkpoint_seconds = 0.1
[settings]
stage1.schedule.epochs = 1
stage1.schedule.batch = 4
stage2.schedule.epochs = 4
[grid]
method = ["dmc", "dmc-ot"]
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.timeout(1800)  # on a machine with much else to do
@pytest.mark.skipif(sys.platform != "linux", reason="which node a process is of is read from /proc")
def test_a_node_of_a_cluster_is_lost_and_no_run_is(tmp_path):
    """Three nodes, one of them taken away while it works: every run ends once, as if nothing had happened."""
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    file.write_text(CLUSTER)
    ended = subprocess.run(
        [sys.executable, ROOT / "tests" / "sweep" / "sweep_cluster.py", file, out],
        capture_output=True,
        text=True,
        timeout=1500,
        env=environment(),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["status"] == 0, told["printed"][-3000:]
    assert told["lost"] is not None
    stored = json.loads((out / SWEEP).read_text())
    assert stored["state"] == "finished"
    runs = {run["folder"]: run for run in stored["runs"]}
    assert len(runs) == 4
    assert {path.parent.relative_to(out).as_posix() for path in out.rglob(RESULT)} == runs.keys()
    for name, run in runs.items():
        attempts = 2 if name == told["lost"] else 1
        assert (run["state"], run["attempts"], run["resumed"]) == ("finished", attempts, attempts - 1)
        assert [event["number"] for event in events(out / name, "attempt")] == list(range(1, attempts + 1))
        if attempts == 1:
            assert len(events(out / name, "task")) == 4
    Sweep(read_sweep_file(file), tmp_path / "whole", View(io.StringIO())).run()
    assert accuracies(out) == accuracies(tmp_path / "whole")
    assert "dmc-ot" in page_of([out]).html()


@pytest.mark.slow
def test_on_this_machine_an_interrupt_keeps_what_goes_on_and_workers_that_die_are_replaced(tmp_path):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    file.write_text(CLUSTER.replace("checkpoint_seconds = 0.1", "checkpoint_seconds = 60").replace("[1, 2]", "[1]"))
    words = [sys.executable, "-c", "from cairn.cli.app import main; main()", "sweep", str(file), "--out", str(out)]

    def begun() -> subprocess.Popen:
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=tmp_path,
            start_new_session=True,
        )

    def under_way(calls: int) -> list[dict]:
        """The newest attempts, once this call has begun to train."""
        until = time.monotonic() + 200
        while time.monotonic() < until:
            found = [folder for folder in out.glob("*/seed-1") if (folder / EVENTS).exists()]
            kept = [folder for folder in found if len(events(folder, "attempt")) == calls and events(folder, "epoch")]
            if kept:
                return [events(folder, "attempt")[-1] for folder in kept]
            time.sleep(0.05)
        raise AssertionError("it never began")

    sweep = begun()
    under_way(1)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
    printed, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 130, printed
    assert "cairn: interrupted (Ctrl-C); the same call goes on where it was" in printed
    assert not list(out.rglob(LOCK))
    sweep = begun()
    os.kill(under_way(2)[0]["process"], signal.SIGKILL)
    printed, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, printed
    runs = json.loads((out / SWEEP).read_text())["runs"]
    assert sorted(run["attempts"] for run in runs) in ([2, 3], [1, 3])
    Sweep(read_sweep_file(file), tmp_path / "whole", View(io.StringIO())).run()
    assert accuracies(out) == accuracies(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cpus", "4096"], "cpus 4096: no node has that much"),
        (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: "),
        (["--address", "auto"], "`ray start --head` begins a cluster"),
    ],
)
def test_a_cluster_that_is_not_there_or_too_small_is_one_line(tmp_path, words, says):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    (tmp_path / "sweep.toml").write_text(CLUSTER)
    command = [sys.executable, "-c", "from cairn.cli.app import main; main()", "sweep", "sweep.toml", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(), cwd=tmp_path)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.rglob(RESULT))


# what it costs


def test_the_page_shows_the_stored_overhead(monkeypatch):
    stored = ROOT / "results" / "benchmarks" / "sweep.json"
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- cairn sweep -->\n")[2].partition("<!-- end -->")[0].strip()
    if not stored.exists():
        assert not shown, "figures without a stored report"
        return
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sweep

    assert shown == sweep.table(json.loads(stored.read_text()))


@pytest.mark.slow
def test_the_smallest_benchmark_runs_and_its_parts_add_up(tmp_path):
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    words = [sys.executable, ROOT / "benchmarks" / "sweep.py", "--size", "tiny", "--out", tmp_path / "sweep.json"]
    subprocess.run(words, check=True, capture_output=True, timeout=300, env=environment())
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert sum(report["parts"].values()) == pytest.approx(report["overhead"])
    assert report["overhead"] > 0

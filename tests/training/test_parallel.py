"""Runs of two real processes against runs of one: the same statistics, parameters, accuracies; stopped, gone on with, refused.

What threads can show is in training/test_ranks.py. Starting a process takes seconds, so what is compared shares one start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cairn.classifier.folder import NAME
from cairn.experiment.folder import CALL, CHECKPOINT, EVENTS, LOCK, RESULT
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig, RunResult
from cairn.storage.archive import Archive
from cairn.training.checkpoint import Checkpoint

BIN = Path(sys.executable).parent
SHORT = {"data": "shapes", "step": 20, "limit_train": 2, "limit_test": 2, "device": "cpu"}
STAGES = ("stage1.schedule.batch=16", "stage1.schedule.epochs=2", "stage2.schedule.epochs=2")
PLAIN = "stage2.schedule.optimizer=sgd"
"""Adam divides gradients that are nearly zero by their size, which makes much of the last bit of a feature."""

RUNS = {
    "dmc": {"method": "dmc", "settings": (*STAGES, PLAIN)},
    "dmc-full": {"method": "dmc", "settings": ("stage1.tuning=full", *STAGES, PLAIN)},
    "dmc-ot": {"method": "dmc-ot", "settings": ("probes=1", *STAGES)},
    "spa": {"method": "spa", "settings": ("schedule.epochs=2", "schedule.batch=16")},
    "bfloat16": {"method": "dmc", "precision": "bfloat16", "settings": (*STAGES, PLAIN)},
}
LIMITS = {"image": 1e-5, "memory": 1e-6, "texts": 1e-5, "prior": 1e-4}
"""Largest differences, by sums in another order: of what stage 1 moves; of class means and factors of the scatter; of what
stage 2 moves; of losses that choose the weight of the prior."""

COARSE = {"image": 5e-3, "memory": 2e-3, "texts": 1e-2, "prior": 0.2}
"""The same in bfloat16, where an order of sums shows in the third digit."""

WORKER = """
import json, sys
from pathlib import Path

from safetensors.torch import save_file

from cairn.training.distributed import World
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.training.checkpoint import Checkpoint

folder, world = Path(sys.argv[1]), World.launched()
with world.connected("cpu"):
    for name, asked in json.loads((folder / "runs.json").read_text()).items():
        keep = lambda learned: save_file(learned.method.state_dict(), folder / f"{name}.safetensors")
        result = run_stream(RunConfig(**asked), learned=keep, checkpoint=Checkpoint(world=world))
        if world.is_main:
            (folder / f"{name}.json").write_text(result.model_dump_json())
"""


def environment(**more):
    left_out = ("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def pair(folder: Path, *words: str, other: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """`cairn` in two processes, without a launcher whose own words and status would be in the way; the second one is told
    `other` besides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "cairn", *words, *(other if rank else ())],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**launch, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Statuses, and the lines of cairn's on standard error."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line for _, err in said for line in err.splitlines() if line.startswith(("cairn", "Traceback"))]
    return [process.returncode for process in processes], lines


def assert_close(one: dict, other: dict, limits: dict[str, float]) -> None:
    """Whole numbers, counts among them, are equal, and so are those that no stage of two processes moves."""
    for key, value in one.items():
        if not value.is_floating_point():
            assert torch.equal(value, other[key]), key
        elif value.numel():
            assert (value - other[key]).abs().max() <= limits.get(key.partition(".")[0], 0.0), key


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes that torchrun started made of the runs."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    (folder / "runs.json").write_text(json.dumps({name: SHORT | asked for name, asked in RUNS.items()}))
    words = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "worker.py", "."]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(two, name):
    states = []
    alone = run_stream(
        RunConfig(**SHORT, **RUNS[name]), learned=lambda learned: states.append(learned.method.state_dict())
    )
    both = RunResult.model_validate_json((two / f"{name}.json").read_text())
    one, other = states[0], load_file(two / f"{name}.safetensors")
    assert both.processes == 2
    assert one.keys() == other.keys()
    assert_close(one, other, {"spa": {}, "bfloat16": COARSE}.get(name, LIMITS))
    assert both.zero_shot_accuracy == alone.zero_shot_accuracy
    if name == "bfloat16":
        assert both.seen_accuracy == pytest.approx(alone.seen_accuracy, abs=0.06)
    else:
        assert (both.accuracy, both.future_accuracy) == (alone.accuracy, alone.future_accuracy)
    assert both.tower_passes.images == alone.tower_passes.images  # shared out, none seen twice
    assert both.evaluation_passes.images == alone.evaluation_passes.images


def test_one_stops_two_go_on_stop_and_one_finishes(cairn, tmp_path, monkeypatch):
    words = ("run", "dmc", "--step", "20", "--limit-train", "4", "--limit-test", "1", "--device", "cpu", "--keep-learner",
             "--set", "stage1.schedule.batch=8", "--set", "stage2.schedule.epochs=2", "--set", PLAIN,
             "--checkpoint-steps", "1")  # fmt: skip
    assert cairn(*words, "--out", "whole")[0] == 0
    plain, steps = Checkpoint.step, []

    def cut(self, name, state):
        steps.append(name)
        if len(steps) == 7:
            self.stop(signal.SIGTERM)
        plain(self, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "step", cut)
        assert cairn(*words, "--out", "cut")[0] == 143

    folder = tmp_path / "cut"
    processes, since = pair(tmp_path, "run", "--resume", "cut"), time.monotonic()
    while '"resumed"' not in (folder / EVENTS).read_text() and time.monotonic() - since < 60:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes) == ([143, 143], ["cairn: interrupted (SIGTERM); to go on: cairn run --resume cut"])
    assert {path.name for path in folder.iterdir()} == {CALL, CHECKPOINT, EVENTS}

    assert cairn("run", "--resume", "cut")[0] == 0
    whole, gone_on = (json.loads((tmp_path / out / RESULT).read_text()) for out in ("whole", "cut"))
    assert gone_on["accuracy"] == whole["accuracy"]
    assert (gone_on["resumed"], gone_on["processes"]) == (2, 1)
    learned = [Archive(tmp_path / out / "learner", NAME).read() for out in ("whole", "cut")]
    assert_close(*(found.parts["method"] for found in learned if found), LIMITS)
    assert not (folder / LOCK).exists()


def test_an_error_in_one_process_ends_both_with_its_line_and_leaves_nothing(tmp_path):
    words = ("run", "simplecil", "--step", "20", "--limit-train", "1", "--limit-test", "1", "--out", "here")
    statuses, lines = ended(pair(tmp_path, *words, other=("--data", "./nowhere")))
    assert (statuses, lines) == ([2, 2], ["cairn: data './nowhere': no such folder or file; check the path"])
    assert not (tmp_path / "here").exists()


def test_processes_without_one_another_and_other_commands_are_refused(tmp_path):
    words = [
        "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "cairn",
        "run",
        "zero-shot",
        "--out",
        "here",
    ]
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "cairn: accelerate launch: asked for several processes, but started one; use torchrun" in done.stderr
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("learn", "here", "pictures"), "cairn learn: for one process, not for 2; start it without torchrun"),
        (("run", "no-method"), "unknown method 'no-method'"),
        (("run", "dmc", "--no-option"), "No such option"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_the_first_tells_what_is_wrong_with_the_call(cairn, monkeypatch, words, says, rank):
    launch = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for key, value in launch.items():
        monkeypatch.setenv(key, str(value))
    status, _, err = cairn(*words)
    assert status == 2
    assert err.startswith("cairn: ") and says in err if rank == 0 else err == ""

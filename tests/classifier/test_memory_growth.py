"""Memory that does not creep: what a process holds grows by what a method declares, and by nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TASKS, WARM, DIM = 200, 40, 128
SLACK = 6e6
"""What an allocator may keep: less than half of what one forgotten covariance per task would take."""

NOTHING_KEPT = {"MKL_DISABLE_FAST_MM": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""What is freed goes back at once. Else some processors' products keep buffers of 5 MB, now and then one more."""

PROGRAM = """
import ctypes, gc, json, sys
from pathlib import Path
import numpy as np, torch
from cairn.training.seeds import Seeds
from cairn.training.context import Context
from cairn.data.images import Dataset
from cairn.data.embeddings import Rows
from cairn.data.stream import task_stream
from cairn.experiment.evaluator import Evaluator
from cairn.methods.catalogue import METHODS
from cairn.config import with_settings
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.seeds import Seeds

torch.set_num_threads(1)
name, tasks, warm, d = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
centres = rng.normal(size=(tasks, d))
rows = lambda n: (centres[:, None] + rng.normal(size=(tasks, n, d))).reshape(-1, d).astype("float32")
labels = lambda n: np.repeat(np.arange(tasks), n)
names = tuple(f"class {c}" for c in range(tasks))
data = Dataset("made", names, Rows(rows(6), labels(6), "train"), Rows(rows(2), labels(2), "test"), ("{}",))
towers = FeatureTowers(name="made", dim=d, logit_scale=100.0, fingerprint="made", names=names, text=centres.astype("float32"))
entry = METHODS[name]
known = {"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1, "schedule.epochs": 1}
config = entry.default_config(towers)
fields = [f"{key}={value}" for key, value in known.items() if hasattr(config, key.split(".")[0])]
method = entry.build(towers, with_settings(config, fields), seed=1)
stream = task_stream(data, step=1)
evaluator = Evaluator(stream, towers)

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

marks = {}
for task in stream.tasks:
    method.learn(task, Context(Seeds(1)))
    if task.index % 20 == 19:
        evaluator.after(task.index, method)
    if task.index + 1 in (warm, tasks):
        marks[task.index + 1] = (resident(), method.memory_bytes, sum(t.nbytes for t in method.state_dict().values()))
(r0, _, s0), (r1, _, s1) = marks[warm], marks[tasks]
print(json.dumps({"grown": r1 - r0, "declared": s1 - s0}))
"""


@pytest.mark.parametrize(
    "name", ["simplecil", "dmc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spa", "dmc-ot"))]
)
def test_two_hundred_tasks_of_one_class(name):
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(TASKS), str(WARM), str(DIM)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | NOTHING_KEPT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["grown"] <= report["declared"] + SLACK, report

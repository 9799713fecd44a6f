"""Kill runs at random moments, go on with them, and compare with one that nobody touched: bit for bit.

    python tests/stress/torture.py [--kills 200] [--seed 0] [--out FOLDER]

Runs of DMC-OT and SPA on few images of the drawn world are begun with `cairn run`, killed with SIGKILL after a random time,
and begun again with the same call, until they finish. Their accuracies and everything they learned must be equal to those
of an untouched run. Prints where the kills fell; exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from cairn.cli import app as cli
from cairn.experiment.folder import CHECKPOINT, EVENTS, LEARNER, read_result
from cairn.storage.archive import Archive
from cairn.towers.catalogue import load_towers

COMMON = [
    "--data",
    "shapes",
    "--step",
    "10",
    "--limit-train",
    "4",
    "--limit-test",
    "1",
    "--keep-learner",
    "--device",
    "cpu",
]
CALLS = {
    "dmc-ot": ["--set", "stage1.schedule.batch=8", "--set", "stage2.schedule.epochs=3", "--set", "stage2.schedule.batch=16",
               "--set", "stage1.tuning.kind=full", "--set", "stage1.tuning.average=0.5"],
    "spa": ["--set", "schedule.epochs=8", "--set", "schedule.batch=8"],
}  # fmt: skip


def begun(method: str, folder: Path) -> int:
    """The process that runs `cairn run` with these words: a copy of this one, so that nothing is imported again."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # the copy's own pool, made before threads of a loader would each try to
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = [
            "cairn",
            "run",
            method,
            *COMMON,
            *CALLS[method],
            "--checkpoint-seconds",
            "0.05",
            "--out",
            str(folder),
        ]
        cli.main()
        os._exit(0)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)


def finished(child: int, after: float | None) -> int | None:
    """Exit status of a process, None if it was killed because it took longer than `after` seconds."""
    until = time.monotonic() + after if after is not None else None
    while True:
        done, status = os.waitpid(child, os.WNOHANG if until is not None else 0)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def where(folder: Path) -> str:
    """What the run was at, from its last event."""
    events = folder / EVENTS
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    while lines:
        try:
            event = json.loads(lines.pop())
        except ValueError:  # cut off in the middle of a line
            continue
        return f"after {event['event']}" + (f" of stage {event['stage']}" if "stage" in event else "")
    return "before the first event"


def same(folder: Path, reference: Path) -> list[str]:
    """What differs between two finished runs."""
    found = []
    one, other = read_result(folder), read_result(reference)
    if one.accuracy != other.accuracy or one.zero_shot_accuracy != other.zero_shot_accuracy:
        found.append("accuracies")
    states = [Archive(path / LEARNER, "learner").read().parts["method"] for path in (folder, reference)]
    if states[0].keys() != states[1].keys():
        found.append("names of what was learned")
    else:
        found += [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    return found


def tortured(kills: int, seed: int, out: Path) -> dict:
    rng = random.Random(seed)
    load_towers("tiny", device="cpu")  # what a process needs is there before it is copied
    length, places, runs, different, fallen = {}, Counter(), 0, [], 0
    for method in CALLS:
        mark = time.monotonic()
        if (status := finished(begun(method, out / f"{method}-whole"), None)) != 0:
            raise SystemExit(f"{method}: the untouched run ended with status {status}: see {out / method}-whole.log")
        length[method] = time.monotonic() - mark
    while fallen < kills:
        method = list(CALLS)[runs % len(CALLS)]
        folder = out / f"{method}-{runs}"
        while True:
            status = finished(begun(method, folder), rng.uniform(0.02, 0.7) * length[method])
            if status is not None:
                break
            fallen += 1
            places[f"{method} {where(folder)}"] += 1
        if status != 0:
            raise SystemExit(f"{folder}: ended with status {status}: {folder.with_suffix('.log').read_text()[-2000:]}")
        if (folder / CHECKPOINT).exists():
            different.append(f"{folder.name}: a checkpoint is left")
        different += [f"{folder.name}: {what}" for what in same(folder, out / f"{method}-whole")]
        runs += 1
    return {"kills": fallen, "runs": runs, "places": dict(places), "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to keep; a temporary one if left out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as passing:
        out = args.out or Path(passing)
        out.mkdir(parents=True, exist_ok=True)
        report = tortured(args.kills, args.seed, out)
    print(json.dumps(report, indent=2))
    sys.exit(1 if report["different"] else 0)


if __name__ == "__main__":
    main()

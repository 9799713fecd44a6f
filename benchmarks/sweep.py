"""What a sweep adds to its runs: the wall clock of runs of about a minute on Ray, against their own seconds.

    python benchmarks/sweep.py [--size full|quick|tiny] [--out results/benchmarks/sweep.json] [--into docs/sweeps.md]

R runs of DMC on the drawn world, each of one core and one thread, P at once. A run's own seconds are those in `result.json`:
learning and evaluation, without what precedes them. So

    overhead = wall * P / (sum of the runs' seconds) - 1,

with the wall clock of the whole command. When a run began follows from when its result was written and its own seconds, which
parts the overhead: before the first run learns (Python, Ray, finding the runs good, imports in the workers), between runs, after
the last, and places that stand empty while the last run ends, which is no fault of who hands out runs. Other work on the machine
slows wall clock and runs alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import handed_out, machine_line, surroundings

SIZES = {
    "full": {"runs": 16, "parallel": 2, "epochs": 15},
    "quick": {"runs": 4, "parallel": 2, "epochs": 10},
    "tiny": {"runs": 2, "parallel": 2, "epochs": 1},
}
PARTS = ("before", "between", "after", "empty at the end")

FILE = """
method = "dmc"
data = "shapes"
step = 10
limit_train = 10
limit_test = 10
device = "cpu"
seeds = {seeds}
parallel = {parallel}

[settings]
stage1.schedule.epochs = {epochs}
stage2.schedule.epochs = 1
"""


def measured(runs: int, parallel: int, epochs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = list(range(1, runs + 1))
        (folder / "sweep.toml").write_text(FILE.format(seeds=seeds, parallel=parallel, epochs=epochs))
        command = [
            sys.executable,
            "-c",
            "from cairn.cli.app import main; main()",
            "sweep",
            "sweep.toml",
            "--out",
            "out",
        ]
        load, began = os.getloadavg()[0], time.time()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        times = []
        for run in json.loads((folder / "out" / "sweep.json").read_text())["runs"]:
            end = (folder / "out" / run["folder"] / "result.json").stat().st_mtime
            times.append((end - run["seconds"], end))
    busy, wall = sum(end - start for start, end in times), ended - began
    last = sorted(end for _, end in times)[-parallel:]
    parts = {
        "before": parallel * (min(start for start, _ in times) - began),
        "after": parallel * (ended - last[-1]),
        "empty at the end": sum(last[-1] - end for end in last),
    }
    parts["between"] = parallel * wall - busy - sum(parts.values())
    return {
        "runs": runs,
        "parallel": parallel,
        "epochs": epochs,
        "wall_seconds": wall,
        "run_seconds": [end - start for start, end in times],
        "overhead": parallel * wall / busy - 1,
        "parts": {part: seconds / busy for part, seconds in parts.items()},
        "load_before": load,
    }


def table(report: dict[str, Any]) -> str:
    seconds, parts = report["run_seconds"], report["parts"]
    mean = sum(seconds) / len(seconds)
    shares = " | ".join(f"{100 * parts[part]:.1f} %" for part in PARTS)
    once = (parts["before"] + parts["after"]) * sum(seconds) / report["parallel"]
    return "\n".join(
        [
            "| runs | at once | seconds of a run | wall clock | overhead | " + " | ".join(PARTS) + " |",
            "|---" * (5 + len(PARTS)) + "|",
            f"| {report['runs']} | {report['parallel']} | {mean:.0f} ({min(seconds):.0f} to {max(seconds):.0f}) | "
            f"{report['wall_seconds']:.0f} s | {100 * report['overhead']:.1f} % | {shares} |",
            "",
            f"Before and after, {once:.0f} s in all, come once, however many runs there are. The machine's load was "
            f"{report['load_before']:.1f} before. {machine_line(report)}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--out", type=Path, help="the report, a JSON file")
    parser.add_argument("--into", type=Path, help="the page")
    args = parser.parse_args()
    report = measured(**SIZES[args.size]) | {"size": args.size}
    handed_out(report, table(report | surroundings()), "sweep", args.out, args.into)


if __name__ == "__main__":
    main()

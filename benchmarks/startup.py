"""Processor time from a command's start to its end: imports are most of it, so it is seen what is imported needlessly.

    python benchmarks/startup.py [--size full|quick] [--out results/benchmarks/startup.json] [--into docs/speed.md]

Every call is a new process with one thread, and all ways take turns. Processor time, user and system, depends less on
other work on the machine than seconds do. As with any installed package bytecode is there: a first round, which makes it, does
not count. A prediction is of one picture, by a stored learner with the embedded towers.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import Row, handed_out, machine_line, seconds_cell, surroundings
from PIL import Image

SIZES = {"full": {"repeats": 5, "warm": True}, "quick": {"repeats": 1, "warm": False}}
CLASSES, PICTURES = ("red", "green", "blue"), 8
CAIRN = ("-m", "cairn")
BARE = "import torch; from transformers import CLIPModel"
TARGETS = {"import cairn": 0.1, "cairn --help": 0.5, "cairn predict, simplecil": 3.5, "cairn predict, dmc": 3.5}
"""Most seconds asked for."""


def processor_seconds(bytecode: Path | None, *arguments: str) -> float:
    """User and system time of Python with these arguments, and with the bytecode of modules in that folder, if one is given."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if bytecode is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def drawn_pictures(folder: Path) -> Path:
    """A folder per class, of noise in the class's colour; gives one of the pictures."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(PICTURES):
            pixels = rng.integers(0, 80, (56, 56, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder / CLASSES[0] / "0.png"


def measured(repeats: int, warm: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, bytecode = Path(name), Path(name) / "bytecode" if warm else None
        picture = drawn_pictures(folder / "pictures")
        ways: dict[str, Sequence[str]] = {
            "import torch": ("-c", "import torch"),
            BARE: ("-c", BARE),
            "import cairn": ("-c", "import cairn"),
            "cairn --help": (*CAIRN, "--help"),
        }
        for method in ("simplecil", "dmc"):
            learner = str(folder / method)
            learn = ("learn", learner, str(folder / "pictures"), "--method", method, "--towers", "tiny")
            processor_seconds(bytecode, *CAIRN, *learn, "--device", "cpu")
            ways[f"cairn predict, {method}"] = (*CAIRN, "predict", learner, str(picture), "--device", "cpu")
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + warm):
            for way, arguments in ways.items():
                seconds = processor_seconds(bytecode, *arguments)
                if repeat >= warm:
                    taken[way].append(seconds)
    medians = {way: median(all_seconds) for way, all_seconds in taken.items()}
    return {"seconds": medians, "all_seconds": taken} | surroundings()


def rows(report: dict[str, Any]) -> list[Row]:
    """None in the table of all benchmarks: nothing here is a faster form of the same thing."""
    return []


def table(report: dict[str, Any]) -> str:
    lines = ["| what a new process does | processor time | target |", "|---|---|---|"]
    for way, seconds in report["seconds"].items():
        target = TARGETS.get(way)
        met = "" if target is None else f"≤ {target:g} s: {'met' if seconds <= target else 'missed'}"
        lines.append(f"| {way} | {seconds_cell(seconds)} | {met} |")
    return "\n".join([*lines, "", machine_line(report)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--out", type=Path, help="file of the report")
    parser.add_argument("--into", type=Path, help="page whose table is written")
    args = parser.parse_args()
    report = measured(**SIZES[args.size])
    handed_out(report, table(report), "startup", args.out, args.into)


if __name__ == "__main__":
    main()

"""What calibration costs: its share of a task's time and its memory, with 200 old classes at width 512.

The task is CUB-like, 20 new classes of 30 images, through a ViT-B/32 of random weights (times do not depend on weights).
The 200 old classes have synthetic full covariances. Task time is measured without calibration, and calibration apart, on
the same features in the same process; memory is the growth of the resident set's peak over the call (Linux).

    python benchmarks/calibration.py [--out FILE] [--into docs/speed.md] [--classes 200] [--images 30]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Row, handed_out, in_turns
from standins import Noise, old_classes, vit_b

from cairn.config import with_settings
from cairn.data.stream import Task
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.catalogue import METHODS
from cairn.methods.dmc_ot import DMCOT, Motion
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

NEW = 20
SIZES = {"full": {"classes": 200, "images": 30}, "quick": {"classes": 50, "images": 3}}


class Watched(DMCOT):
    """DMC-OT that keeps the motion which it was to calibrate, and when that was known."""

    def calibrated(self, motion: Motion, log: Log) -> GaussianMemory:
        self.motion, self.moved = motion, time.perf_counter()
        return super().calibrated(motion, log)


def measured(classes: int, images: int) -> dict[str, Any]:
    k = classes
    towers, entry = vit_b(32), METHODS["dmc-ot"]
    method = Watched(towers, with_settings(entry.default_config(towers), ["drift=none"]), seed=1)
    names = [f"class {c}" for c in range(k)]
    method.memory = memory = old_classes(k, towers.dim, 30)
    method.anchors = towers.class_texts(names, ("a photo of a {}.",)).cpu()
    method.texts.grow(names, method.anchors, torch.Generator().manual_seed(0))
    labels = np.repeat(np.arange(k, k + NEW), images)
    new = tuple(f"class {c}" for c in range(k, k + NEW))
    task = Task(1, range(k, k + NEW), new, ("a photo of a {}.",), Noise(labels))

    began = time.perf_counter()
    method.learn(task, Context(Seeds(1)))
    stages = {"stage 1 and statistics": method.moved - began, "stage 2": time.perf_counter() - method.moved}
    whole = sum(stages.values())

    rows = []
    for name in ("mean", "sdc", "bures", "sinkhorn", "paired", "local"):
        learner = entry.build(towers, with_settings(entry.default_config(towers), [f"drift={name}"]), seed=1)
        learner.memory = memory
        (own,) = in_turns(
            {name: lambda own=learner: own.calibrated(method.motion, Log()).bytes}, 1, warm=False
        ).values()
        rows.append(
            {
                "estimator": name,
                "seconds": own.seconds,
                "share": own.seconds / (whole + own.seconds),
                "extra_bytes": own.extra_bytes,
                "copies": None if own.extra_bytes is None else own.extra_bytes / own.value,
            }
        )
    return {
        "classes": k,
        "dim": towers.dim,
        "images": len(labels),
        "statistics_bytes": memory.bytes,
        "stages": stages,
        "rows": rows,
    }


def rows(report: dict[str, Any]) -> list[Row]:
    what = f"calibration of {report['classes']} old classes, d = {report['dim']}"
    whole = sum(report["stages"].values())
    return [
        Row(
            what,
            f"the task without it, {report['images']} images",
            whole,
            f"`{row['estimator']}`",
            row["seconds"],
            extra_bytes=row["extra_bytes"],
            equal="what it adds",
        )
        for row in report["rows"]
        if row["estimator"] in ("bures", "local")
    ]


def table(report: dict[str, Any]) -> str:
    stages = ", ".join(f"{key} {seconds:.1f} s" for key, seconds in report["stages"].items())
    lines = [
        f"{report['classes']} old classes, d = {report['dim']}, {report['images']} new images; statistics "
        f"{report['statistics_bytes'] / 1e6:.0f} MB. The task without calibration: {sum(report['stages'].values()):.1f} s "
        f"({stages}).",
        "",
        "| estimator | seconds | share of the task % | extra memory MB | in copies of the statistics |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        memory = ["", ""] if row["extra_bytes"] is None else [f"{row['extra_bytes'] / 1e6:.0f}", f"{row['copies']:.2f}"]
        lines.append(f"| {row['estimator']} | {row['seconds']:.2f} | {100 * row['share']:.2f} | {' | '.join(memory)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--classes", type=int, default=200, help="old classes")
    parser.add_argument("--images", type=int, default=30, help="images of each of the 20 new classes")
    args = parser.parse_args()
    report = measured(args.classes, args.images)
    handed_out(report, table(report), "calibration", args.out, args.into)


if __name__ == "__main__":
    main()

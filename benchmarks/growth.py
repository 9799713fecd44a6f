"""What a task costs as classes gather: a stage-2 step, calibration and `GaussianMemory.add`, by the number of old classes.

d = 512, 10 new classes of 30 images, full covariances. A step is one of an epoch of stage 2 with residual texts and a batch
of 128, the epoch's draws included; the first draw, which factorises every covariance, is apart. Calibration is DMC-OT's own,
with its default estimator. Where three times the statistics do not fit into half of the memory that is free, the classes
are kept at low rank instead, and the table says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import Row, bytes_cell, in_turns, seconds_cell
from standins import class_rows, old_classes

from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.memory.covariances import Covariance, Full, LowRank
from cairn.methods.catalogue import METHODS
from cairn.methods.dmc_ot import Motion
from cairn.methods.parts.stages import TextStage, align_text
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.fit import Schedule
from cairn.training.log import Log
from cairn.training.seeds import Seeds

SIZES = {
    "full": {"classes": [100, 300, 1000, 3000, 10_000], "repeats": 3},
    "quick": {"classes": [100, 300], "repeats": 1},
}
DIM, NEW, IMAGES = 512, 10, 30


def kind_that_fits(k: int) -> Covariance:
    free = next(
        (int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), 8e9
    )
    return Full() if 3 * k * 2 * DIM * (DIM + 1) <= free / 2 else LowRank()


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text().splitlines() if path.exists() else []


def measured_at(k: int, repeats: int) -> dict[str, Any]:
    kind = kind_that_fits(k)
    memory = old_classes(k, DIM, IMAGES, kind)
    z, y = class_rows(NEW, DIM, IMAGES, seed=1)
    y = y + k
    turned = z + 0.05 * z @ torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2)) / DIM**0.5
    motion = Motion(z, unit(turned), y)

    mark = time.perf_counter()
    memory.draw(1, torch.Generator().manual_seed(0))
    first = time.perf_counter() - mark

    towers = FeatureTowers(name="none", dim=DIM, logit_scale=100.0, fingerprint="none", names=(), text=None)
    entry = METHODS["dmc-ot"]
    learner = entry.build(towers, entry.config.embedding(), seed=1)
    learner.memory = memory
    anchors, names = class_rows(k + NEW, DIM, 1, seed=3)[0], [f"class {c}" for c in range(k + NEW)]
    seen: list[int] = []

    def epoch() -> None:
        stage = TextStage(schedule=Schedule(epochs=1, batch=128, lr=0.2))
        texts = stage.text.build(towers)
        texts.grow(names, anchors, torch.Generator().manual_seed(0))
        seen.clear()
        log = Log(show=lambda event: seen.append(event["step"]))
        align_text(stage, texts, z, y, memory, towers.logit_scale, class_cross_entropy, Context(Seeds(1), log))

    found = in_turns({"step": epoch, "add": lambda: memory.add(z, y).bytes}, repeats)
    found |= in_turns({"calibration": lambda: learner.calibrated(motion, Log()).bytes}, 1, warm=False)
    steps = len(seen)
    row = {
        "classes": k,
        "kind": kind.kind,
        "bytes": memory.bytes,
        "steps": steps,
        "estimator": learner.config.drift.kind,
    }
    row["seconds"] = {"first draw": first} | {key: own.seconds for key, own in found.items()}
    row["seconds"]["step"] /= steps
    row["extra_bytes"] = {key: own.extra_bytes for key, own in found.items()}
    return row


def measured(classes: Sequence[int], repeats: int) -> dict[str, Any]:
    return {"d": DIM, "new": NEW, "images": IMAGES, "rows": [measured_at(k, repeats) for k in classes]}


def rows(report: dict[str, Any]) -> list[Row]:
    """None: what is compared is the number of classes. See `table`."""
    return []


def table(report: dict[str, Any]) -> str:
    lines = [
        "| old classes | stored | first draw | stage-2 step (extra memory of its epoch) | calibration (extra memory) "
        "| `add` of 10 classes (extra memory) |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [
            f"{row['classes']:,}",
            f"{bytes_cell(row['bytes'])}, {row['kind'].replace('_', ' ')}",
            seconds_cell(row["seconds"]["first draw"]),
        ]
        for part in ("step", "calibration", "add"):
            extra = row["extra_bytes"][part]
            cells.append(seconds_cell(row["seconds"][part]) + ("" if extra is None else f" ({bytes_cell(extra)})"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(report: dict[str, Any], path: Path) -> None:
    """Seconds on the left, memory on the right, over the number of old classes."""
    picture = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    k = [row["classes"] for row in report["rows"]]
    titles = {"first draw": "first draw", "step": "stage-2 step", "calibration": "calibration", "add": "add 10 classes"}
    for colour, (part, title) in enumerate(titles.items()):
        left.plot(
            k,
            [row["seconds"][part] for row in report["rows"]],
            marker="o",
            markersize=3,
            color=f"C{colour}",
            label=title,
        )
        extra = [row["extra_bytes"].get(part) for row in report["rows"]]
        if None not in extra:
            right.plot(k, [1e-6 * b for b in extra], marker="o", markersize=3, color=f"C{colour}", label=title)
    right.plot(k, [1e-6 * row["bytes"] for row in report["rows"]], color="black", linestyle="--", label="stored")
    for axis, title in ((left, "seconds"), (right, "extra memory of a call, and what is stored, MB")):
        axis.set(xscale="log", yscale="log", xlabel="old classes", title=title)
        axis.title.set_fontsize(10)
        axis.set_xticks(k, [f"{number:,}" for number in k])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture.savefig(path, dpi=150)

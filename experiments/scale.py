"""What a million classes and a billion images would cost, from what was measured here.

    python experiments/scale.py [--measure]     # write docs/speed.md's tables; --measure: time the towers anew first

Bytes are exact. Seconds are the measured time of a unit (results/benchmarks/bench.json, results/benchmarks/scale.json) times
the number of units, on the machine that both reports name: nothing is assumed to run faster together than alone. What the
towers take on an accelerator comes from results/benchmarks/accelerator.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stored import write_block

from cairn.memory.covariances import Diagonal, Full, LowRank, Shared
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.catalogue import METHODS
from cairn.reports.formats import Column, Table
from cairn.storage.files import read_json, write_json
from cairn.storage.versions import versions

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "benchmarks"
PAGE = ROOT / "docs" / "speed.md"
K, N, D = 10**6, 10**9, 512
"""Classes, images, numbers per embedding."""

NEW = 1000
"""Classes of a task that arrives when all others are there."""


def measure() -> dict[str, Any]:
    """Seconds per image of ViT-B/16, per class text, and of a stage-2 step over classes, on this machine."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from standins import vit_b

    towers = vit_b(16)
    pixels, prompts = torch.randn(16, 3, 224, 224), [f"a photo of a thing {i}." for i in range(64)]

    def median(call: Any, units: int) -> float:
        """Seconds per unit, of five calls after one."""
        call()
        took = []
        for _ in range(5):
            since = time.perf_counter()
            call()
            took.append(time.perf_counter() - since)
        return sorted(took)[2] / units

    k = 20_000
    r, T, z = torch.zeros(k, D, requires_grad=True), torch.randn(k, D), torch.randn(128, D)

    def step() -> None:
        logits = 100 * torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(T + r).T
        torch.nn.functional.cross_entropy(logits, torch.arange(128)).backward()

    stage2 = median(step, k)
    with torch.no_grad():
        image, text = median(lambda: towers.image(pixels), 16), median(lambda: towers.text(prompts), 64)
    return {
        "image": image,
        "text": text,
        "stage2_class": stage2,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} EB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
    for limit, per, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (6.3e7, 86_400, "days")):
        if seconds < limit:
            return f"{seconds / per:.3g} {unit}"
    return f"{seconds / 31_557_600:.3g} years"


def kept() -> Table:
    """Bytes by what is kept of a class. Every row is what an empty and a one-class memory differ by, or a method declares."""
    rows = []
    for name, kind in (("full", Full()), ("rank 16", LowRank(rank=16)), ("diagonal", Diagonal()), ("shared", Shared())):
        one = GaussianMemory(D, kind).add(torch.randn(3, D), torch.zeros(3, dtype=torch.long))
        fixed = GaussianMemory(D, kind).bytes
        each = one.bytes - fixed
        rows.append([f"Gaussian, {name} covariance", size(each), size(fixed + each * K)])
    for name in ("simplecil", "acil", "ranpac", "cgil", "proof"):
        entry = METHODS[name]
        total, fewer = (entry.card.bytes(k, D, N, 3 * 224**2, D) for k in (K, K // 2))
        rows.append([f"`{name}`: {entry.card.keeps}", size((total - fewer) / (K // 2)), size(total)])
    for name, each in (
        ("class texts", 4 * D),
        ("residual texts with Adam's two moments", 3 * 4 * D),
        ("a linear head in closed form, 10,000 features", 4 * 10_000),
    ):
        rows.append([name, size(each), size(each * K)])
    return Table([Column("kept"), Column("a class"), Column("a million classes")], rows)


def spent(bench: dict[str, Any], here: dict[str, Any], accelerator: dict[str, Any]) -> Table:
    """Seconds of each part, for all images or for one task of NEW classes when the others are there."""
    growth = next(row for row in reversed(bench["items"]["growth"]["rows"]) if row["kind"] == "full")
    each = {part: seconds / growth["classes"] for part, seconds in growth["seconds"].items()}
    many = bench["items"]["draws"]["many"]
    rank16 = many["ours"]["seconds"] / many["classes"]
    fast = accelerator["towers"][-1]
    rows = [
        ["image tower, one pass of a billion images", "an image", here["image"], N, "images_per_second"],
        ["stage 1, one epoch (three passes' work)", "an image", 3 * here["image"], N, "stage1_images_per_second"],
        ["class texts, one template", "a text", here["text"], K, "texts_per_second"],
        ["stage-2 step, residual texts of all classes, batch 128", "a class", here["stage2_class"], K, None],
        ["stage-2 step, prompts of all classes (three passes' work)", "a text", 3 * here["text"], K, None],
        ["factors of full covariances, before drawing", "a class", each["first draw"], K, None],
        ["4 draws of rank-16 Gaussians, factors included", "a class", rank16, K, None],
        ["calibration, `local` (one map per class, full)", "a class", each["calibration"], K, None],
        ["`add`, which copies the statistics (full)", "a class", each["add"], K, None],
    ]
    cells = []
    for what, unit, cost, number, speed in rows:
        there = duration(number / fast[speed]) if speed else "not measured"
        cells.append([what, unit, duration(cost), duration(cost * number), there])
    device = f"{fast['precision']} on one {accelerator['device']}"
    titles = ["part", "unit", "measured a unit", "in all", f"in all, {device}"]
    return Table([Column(title) for title in titles], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", action="store_true", help="time the towers anew, into results/benchmarks/scale.json"
    )
    args = parser.parse_args()
    if args.measure:
        write_json(FOLDER / "scale.json", measure())
    write_block(PAGE, "scale kept", kept().markdown())
    reports = [read_json(FOLDER / f"{name}.json") for name in ("bench", "scale", "accelerator")]
    write_block(PAGE, "scale spent", spent(*reports).markdown())


if __name__ == "__main__":
    main()

"""What calibration costs: its share of a task's time and its memory, with 200 old classes at width 512.

The task is CUB-like, 20 new classes of 30 images, through a ViT-B/32 of random weights (times do not depend on weights).
The 200 old classes have synthetic full covariances. Task time is measured without calibration, and calibration apart, on
the same features in the same process; memory is the growth of the resident set's peak over the call (Linux).

    python benchmarks/calibration.py [--out FILE] [--classes 200] [--images 30]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from cairn.data.stream import Task
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.catalogue import METHODS
from cairn.methods.settings import with_settings
from cairn.run import versions
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.preprocessing import Preprocessing
from cairn.training.log import Log


class Noise:
    """Photographs of nothing, 256 x 256."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (256, 256, 3), dtype=np.uint8)

    def describe(self, index: int) -> str:
        return f"noise {index}"


def vit_b_32() -> ClipTowers:
    """ViT-B/32 of random weights; the text tower is CLIP's in size, the tokenizer the embedded one."""
    torch.manual_seed(0)
    tiny = load_towers("tiny", device="cpu")
    text = {"vocab_size": 49408, "bos_token_id": tiny.bos, "eos_token_id": tiny.eos, "pad_token_id": 1}
    config = CLIPConfig(projection_dim=512, text_config=text, vision_config={"patch_size": 32, "image_size": 224})
    return ClipTowers(CLIPModel(config), tiny.tokenizer, Preprocessing(size=224), name="random ViT-B/32", device="cpu")


def old_classes(k: int, d: int, n: int) -> GaussianMemory:
    """k classes of n correlated unit rows."""
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=rng) / d**0.5 * torch.logspace(0, -1.5, d)
    x = torch.randn(k, 1, d, generator=rng) @ mixing + 0.5 * torch.randn(k, n, d, generator=rng) @ mixing
    return GaussianMemory(d).add(unit(x.flatten(0, 1)), torch.arange(k).repeat_interleave(n))


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak since `forget_peak`), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(key)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--classes", type=int, default=200, help="old classes")
    parser.add_argument("--images", type=int, default=30, help="images of each of the 20 new classes")
    args = parser.parse_args()
    k, new = args.classes, 20

    towers, entry = vit_b_32(), METHODS["dmc-ot"]
    method = entry.build(towers, with_settings(entry.default_config(towers), ["drift=none"]), seed=1, log=Log())
    names = [f"class {c}" for c in range(k)]
    method.memory = memory = old_classes(k, towers.dim, args.images)
    method.anchors = towers.class_texts(names, ("a photo of a {}.",)).cpu()
    method.texts.grow(names, method.anchors, torch.Generator().manual_seed(0))
    labels = np.repeat(np.arange(k, k + new), args.images)
    task = Task(
        1, range(k, k + new), tuple(f"class {c}" for c in range(k, k + new)), ("a photo of a {}.",), Noise(labels)
    )

    began = time.perf_counter()
    motion, Z1, y = method.move(task)
    moved = time.perf_counter()
    method.settle(task, motion, Z1, y)
    stages = {"stage 1 and statistics": moved - began, "stage 2": time.perf_counter() - moved}
    whole = sum(stages.values())

    rows = []
    for name in ("mean", "sdc", "bures", "sinkhorn", "paired", "local"):
        learner = entry.build(towers, with_settings(entry.default_config(towers), [f"drift={name}"]), seed=1, log=Log())
        learner.memory = memory
        forget_peak()
        before, mark = resident("VmRSS"), time.perf_counter()
        calibrated = learner.calibrated(motion, Log())
        seconds, grown = time.perf_counter() - mark, resident("VmHWM") - before
        rows.append(
            {"estimator": name, "seconds": seconds, "share": seconds / (whole + seconds), "extra_bytes": grown,
             "copies": grown / calibrated.bytes}
        )  # fmt: skip

    print(f"{k} old classes, d = {towers.dim}, {len(labels)} new images; statistics {memory.bytes / 1e6:.0f} MB")
    print(f"task without calibration {whole:.1f} s: " + ", ".join(f"{key} {s:.1f} s" for key, s in stages.items()))
    print(
        "| estimator | seconds | share of the task % | extra memory MB | in copies of the statistics |\n|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['estimator']} | {row['seconds']:.2f} | {100 * row['share']:.2f} | {row['extra_bytes'] / 1e6:.0f} "
            f"| {row['copies']:.2f} |"
        )
    if args.out:
        report = {
            "classes": k, "dim": towers.dim, "images": len(labels), "statistics_bytes": memory.bytes, "stages": stages,
            "rows": rows, "machine": {"cores": os.cpu_count(), "processor": platform.machine()}, "versions": versions(),
        }  # fmt: skip
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

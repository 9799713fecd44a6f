"""What SPA's patch branch costs beside the tower: time of scoring against the tower's own, and memory.

ViT-B/16 of random weights (times do not depend on weights), 64 images of 196 patches, d = 512, 8 sentences a class.
`plan` scores classes one by one by the transported likeness, all of them or the 5 likeliest; `feature` makes one local
feature from the 5 likeliest. Patches and sentences are clustered, as real ones are. Memory is the growth of the resident
set's peak over the call (Linux).

    python benchmarks/alignment.py [--out FILE] [--into docs/spa.md] [--classes 100 1000 5000]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cairn.maths.alignment import local_features, local_scores
from cairn.reports.tables import replaced_block
from cairn.run import versions
from cairn.store import write_json
from cairn.towers.patches import embedded_tokens

IMAGES, SENTENCES, BEST, DIM = 64, 8, 5, 512
HOW = {"patches": 24, "eps": 0.1, "iterations": 100}


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak since it was last cleared), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(key)


def measured(call: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Median seconds, and the largest growth of memory."""
    seconds, grown = [], 0
    for _ in range(repeats):
        Path("/proc/self/clear_refs").write_text("5")
        before, mark = resident("VmRSS"), time.perf_counter()
        call()
        seconds.append(time.perf_counter() - mark)
        grown = max(grown, resident("VmHWM") - before)
    return statistics.median(seconds), grown


def clustered(n: int, rng: torch.Generator) -> torch.Tensor:
    centres = torch.randn(50, DIM, generator=rng)
    which = torch.randint(50, (n,), generator=rng)
    return normalize(centres[which] + 0.7 * torch.randn(n, DIM, generator=rng), dim=-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
        image_size=224, projection_dim=DIM,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(config).eval()
    pixels = torch.randn(IMAGES, 3, 224, 224, generator=rng)

    def both(attention: str) -> object:
        return embedded_tokens(tower.vision_model, tower.visual_projection, pixels, attention)

    both("native")
    plain, _ = measured(lambda: tower(pixel_values=pixels), args.repeats)
    value, _ = measured(lambda: both("value"), args.repeats)
    p = clustered(IMAGES * 196, rng).view(IMAGES, 196, DIM)
    rows = []
    for k in args.classes:
        D = clustered(k * SENTENCES, rng).view(k, SENTENCES, DIM)
        b = torch.full((k, SENTENCES), 1 / SENTENCES)
        candidates = torch.rand(IMAGES, k, generator=rng).topk(BEST, dim=1).indices
        prior = torch.full((IMAGES, BEST), 1 / BEST)
        calls = {
            "plan, all classes": lambda D=D, b=b: local_scores(p, D, b, **HOW),
            "plan, 5 likeliest": lambda D=D, b=b, c=candidates: local_scores(p, D, b, c, **HOW),
            "feature, 5 likeliest": lambda D=D, b=b, c=candidates, w=prior: local_features(p, D, b, c, w, **HOW),
        }
        for name, call in calls.items():
            seconds, grown = measured(call, args.repeats if k < 2000 else 1)
            rows.append(
                {"classes": k, "form": name, "seconds": seconds, "share_of_tower": seconds / plain, "extra_bytes": grown}
            )  # fmt: skip
    lines = [
        f"Tower: {plain:.2f} s for {IMAGES} images; with patches by value attention {value:.2f} s.",
        "",
        "| classes | form | seconds | share of the tower's time % | extra memory MB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['classes']} | {row['form']} | {row['seconds']:.3f} | {100 * row['share_of_tower']:.1f} "
            f"| {row['extra_bytes'] / 1e6:.0f} |"
        )
    table = "\n".join(lines)
    print(table)
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()}
    if args.out:
        report = {"images": IMAGES, "tower_seconds": plain, "tower_and_patches_seconds": value, "rows": rows}
        write_json(args.out, report | {"machine": machine, "versions": versions()})
    if args.into:
        text = args.into.read_text(encoding="utf-8")
        args.into.write_text(replaced_block(text, "alignment", table), encoding="utf-8")


if __name__ == "__main__":
    main()

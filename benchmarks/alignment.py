"""What SPA's patch branch costs beside the tower: time of scoring against the tower's own, and memory.

ViT-B/16 of random weights (times do not depend on weights), 64 images of 196 patches, d = 512, 8 sentences a class.
`plan` scores classes one by one by the transported likeness, all of them or the 5 likeliest; `feature` makes one local
feature from the 5 likeliest. Patches and sentences are clustered, as real ones are. Memory is the growth of the resident
set's peak over the call (Linux).

    python benchmarks/alignment.py [--out FILE] [--into docs/speed.md] [--classes 100 1000 5000]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Row, handed_out, in_turns
from standins import clustered_rows, vit_b

from cairn.maths.alignment import local_features, local_scores

SENTENCES, BEST, DIM = 8, 5, 512
HOW = {"patches": 24, "eps": 0.1, "iterations": 100}
SIZES = {
    "full": {"classes": [100, 1000, 5000], "repeats": 3, "images": 64},
    "quick": {"classes": [100], "repeats": 1, "images": 16},
}


@torch.no_grad()
def measured(classes: Sequence[int], repeats: int, images: int = 64) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    towers = vit_b(16)
    pixels = torch.randn(images, 3, 224, 224, generator=rng)

    def clustered(*shape: int) -> torch.Tensor:
        return clustered_rows(*shape, d=DIM, clusters=50, spread=0.7, rng=rng)

    p = clustered(images, 196)
    ways = {
        (0, "tower"): lambda: towers.image(pixels),
        (0, "tower, patches by value attention"): lambda: towers.image_and_patches(pixels, "value"),
    }
    for k in classes:
        D, b = clustered(k, SENTENCES), torch.full((k, SENTENCES), 1 / SENTENCES)
        c, w = torch.rand(images, k, generator=rng).topk(BEST, dim=1).indices, torch.full((images, BEST), 1 / BEST)
        ways |= {
            (k, "plan, all classes"): lambda D=D, b=b: local_scores(p, D, b, **HOW),
            (k, "plan, 5 likeliest"): lambda D=D, b=b, c=c: local_scores(p, D, b, c, **HOW),
            (k, "feature, 5 likeliest"): lambda D=D, b=b, c=c, w=w: local_features(p, D, b, c, w, **HOW),
        }
    towers.image(pixels[:16])
    found = in_turns(ways, repeats, warm=False)
    tower, patches, *scores = found.items()
    return {
        "images": images,
        "tower_seconds": tower[1].seconds,
        "tower_and_patches_seconds": patches[1].seconds,
        "tower_extra_bytes": tower[1].extra_bytes,
        "rows": [
            {
                "classes": k,
                "form": form,
                "seconds": own.seconds,
                "share_of_tower": own.seconds / tower[1].seconds,
                "extra_bytes": own.extra_bytes,
            }
            for (k, form), own in scores
        ],
    }


def rows(report: dict[str, Any]) -> list[Row]:
    tower = f"the tower alone, {report['images']} images"
    return [
        Row(
            f"SPA's patch branch, {row['classes']:,} classes",
            tower,
            report["tower_seconds"],
            row["form"],
            row["seconds"],
            extra_bytes=row["extra_bytes"],
            plain_extra_bytes=report["tower_extra_bytes"],
            equal="what it adds",
        )
        for row in report["rows"]
        if row["form"].startswith("feature")
    ]


def table(report: dict[str, Any]) -> str:
    lines = [
        f"Tower: {report['tower_seconds']:.2f} s for {report['images']} images; with patches by value attention "
        f"{report['tower_and_patches_seconds']:.2f} s.",
        "",
        "| classes | form | seconds | share of the tower's time % | extra memory MB |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}"
        lines.append(
            f"| {row['classes']} | {row['form']} | {row['seconds']:.3f} | {100 * row['share_of_tower']:.1f} | {extra} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    report = measured(args.classes, args.repeats)
    handed_out(report, table(report), "alignment", args.out, args.into)


if __name__ == "__main__":
    main()

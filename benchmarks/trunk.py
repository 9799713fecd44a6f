"""Test images after a task: the whole tower, or the part of it that moves, from what the frozen blocks gave once.

ViT-B/16 of random weights, tuned as stage 1 has it: LoRA on keys and values of the last blocks, or the projection alone. Deltas and
weights are moved as if tasks had been learned; what the trunk made of the images is older than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Row, in_turns
from standins import vit_b
from torch import Tensor

from cairn.errors import counted
from cairn.towers.catalogue import load_towers
from cairn.towers.tuning import ImageEncoder, Lora, Projection, Tuning

SIZES = {
    "full": {"tower": "ViT-B/16", "images": 8, "last": (6, 3, 1), "repeats": 3},
    "quick": {"tower": "ViT-B/16", "images": 8, "last": (3,), "repeats": 1},
    "tiny": {"tower": "tiny", "images": 4, "last": (1,), "repeats": 1},
}


def measured(tower: str, images: int, last: tuple[int, ...], repeats: int) -> dict[str, Any]:
    towers = load_towers("tiny", device="cpu") if tower == "tiny" else vit_b(16)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *[towers.preprocessing.size] * 2, generator=rng)
    depth = len(towers._model.vision_model.encoder.layers)
    tunings: list[tuple[str, int, Tuning]] = [
        *((f"LoRA on {n} of {depth} blocks, the last", n, Lora(layers=n)) for n in last),
        ("the projection alone", 0, Projection()),
    ]
    report: dict[str, Any] = {"tower": tower, "images": images, "blocks": depth, "rows": []}
    for what, moving, tuning in tunings:
        encoder = ImageEncoder(towers, tuning, rng)
        begun = encoder.trunk(pixels)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=rng)
        found = in_turns({"whole": _passed(encoder, pixels), "continued": _passed(encoder, begun)}, repeats)
        report["rows"].append(
            {
                "what": what,
                "moving": moving,
                "kept_bytes": begun.nbytes // images,
                "equal": torch.equal(found["whole"].value, found["continued"].value),
                **{way: {"seconds": one.seconds, "all_seconds": one.all_seconds} for way, one in found.items()},
            }
        )
    return report


def _passed(encoder: ImageEncoder, images: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: encoder(images))


def rows(report: dict[str, Any]) -> list[Row]:
    depth = report["blocks"]
    return [
        Row(
            f"{report['images']} test images after a task, {report['tower']}, {row['what']}",
            f"the whole tower, {depth} blocks",
            row["whole"]["seconds"],
            f"from what is kept, {counted(row['moving'], 'block')}",
            row["continued"]["seconds"],
            equal=f"{'bit for bit' if row['equal'] else 'not equal'}; {row['kept_bytes'] / 1000:,.0f} kB kept of an image",
        )
        for row in report["rows"]
    ]

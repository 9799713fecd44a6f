"""Do descriptions choose patches of the object? On the drawn world, whose masks are known, against chance.

A patch counts as the object's if most of it is. Chance is the share of such patches in all patches; the descriptions are
those of the image's true class, the towers the embedded ones, the images the stream's test split.

    python experiments/patches_on_object.py [--out results/patches.json] [--into docs/measured.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from stored import write_block
from torch.nn.functional import avg_pool2d

from cairn.data.loading import Loader
from cairn.data.shapes import SIZE, shapes_dataset
from cairn.maths.alignment import aligned, padded_tokens
from cairn.maths.similarity import unit
from cairn.storage.files import write_json
from cairn.storage.versions import versions
from cairn.towers.catalogue import load_towers

PATCHES = (4, 8, 16, 24)


@torch.no_grad()
def shares() -> dict:
    towers, data = load_towers("tiny"), shapes_dataset()
    images = data.test
    y = torch.as_tensor(images.labels)
    tokens = [unit(towers.text(said)) for said in data.descriptions.of(data.classes)]
    D, b = padded_tokens(tokens)
    masks = torch.stack([torch.from_numpy(images.mask(i)) for i in range(len(images))]).float()
    rows = []
    for attention in ("native", "value"):
        loader = Loader(images, towers.prepare, towers.pixels, batch=250)
        p = torch.cat([towers.image_and_patches(pixels, attention)[1] for pixels, _ in loader])
        p = unit(p.flatten(0, 1)).view_as(p)
        side = SIZE // round(p.shape[1] ** 0.5)
        on = (avg_pool2d(masks[:, None], side).flatten(1) > 0.5).float()
        cos = torch.einsum("nld,npd->nlp", D[y], p)[:, None]
        for K in PATCHES:
            found = aligned(cos, b[y][:, None], patches=K)
            hit = on.gather(1, found.chosen[:, 0])
            rows.append(
                {
                    "attention": attention,
                    "patches": K,
                    "chosen": hit.mean().item(),
                    "weighted": (hit * found.share[:, 0]).sum(1).mean().item(),
                    "chance": on.mean().item(),
                }
            )
    return {"images": len(images), "towers": towers.fingerprint, "rows": rows, "versions": versions()}


def table(report: dict) -> str:
    lines = [
        "| attention | patches chosen of 49 | on the object % | by transported share % | chance % | times chance |",
        "|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['attention']} | {r['patches']} | {100 * r['chosen']:.1f} | {100 * r['weighted']:.1f} "
            f"| {100 * r['chance']:.1f} | {r['chosen'] / r['chance']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    report = shares()
    print(table(report))
    if args.out:
        write_json(args.out, report)
    if args.into:
        write_block(args.into, "patches", table(report))


if __name__ == "__main__":
    main()

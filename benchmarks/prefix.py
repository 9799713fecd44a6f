"""What a step of soft prompts costs in the text tower: each prompt whole, cut at the last end, or what is shared once.

100 classes with names of two and three tokens behind 16 shared context vectors, forward and backward, through ViT-B/16's
text tower of random weights (12 layers of width 512; times do not depend on weights). The ways take turns in one process,
on one thread, so that other work on the machine slows all of them; seconds are medians.

    python benchmarks/prefix.py [--out FILE] [--repeats 5] [--classes 100] [--shared 16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import Row, handed_out, in_turns, launches, threads
from standins import vit_b
from torch import Tensor
from torch.nn.functional import normalize

from cairn.towers.prompts import Prompts, prompt_embeddings

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "cyan")
SHAPES = ("circle", "square", "star", "cross", "flower", "house", "ring", "heart", "triangle", "moon")
SIZES = {"full": {"repeats": 5, "classes": 100, "shared": 16}, "quick": {"repeats": 1, "classes": 100, "shared": 16}}
TARGETS = (12.0, 3.0)
"""Times faster than padded to 77 tokens, and than cut at the last end."""


def class_names(k: int) -> list[str]:
    """By turns of two words and of three, each one token: red circle, striped red circle, red square, ..."""
    names = [f"{kind}{colour} {shape}" for colour, shape, kind in product(COLOURS, SHAPES, ("", "striped "))]
    if k > len(names):
        raise SystemExit(f"--classes {k}: there are {len(names)} names")
    return names[:k]


def step(texts: Callable[[], Tensor], context: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One forward and backward: the texts, and the gradient in the context."""
    context.grad = None
    value = texts()
    (weight * value).sum().backward()
    return value.detach(), context.grad.clone()


def measured(repeats: int, classes: int, shared: int) -> dict[str, Any]:
    # One block stands for the image tower, which is not used
    towers, names = vit_b(16, image_layers=1), class_names(classes)
    prompts = Prompts(shared=shared, per_class=0, init=None).build(towers)
    prompts.grow(names, torch.zeros(len(names), towers.dim), torch.Generator().manual_seed(0))
    weight = torch.randn(len(names), towers.dim, generator=torch.Generator().manual_seed(1))
    tokens = {}

    def whole(length: int) -> Tensor:
        contexts = prompts.shared.expand(len(names), -1, -1)
        return normalize(prompt_embeddings(towers, contexts, names, length), dim=-1)

    texts = {
        f"padded to {towers.context_length}": lambda: whole(towers.context_length),
        "cut at the last end": lambda: whole(0),
        "shared prefix": prompts,
    }

    def counted(way: str) -> tuple[Tensor, Tensor]:
        before = towers.passes["text_tokens"]
        answer = step(texts[way], prompts.shared, weight)
        tokens[way] = towers.passes["text_tokens"] - before
        return answer

    with threads(1):
        found = in_turns({way: lambda way=way: counted(way) for way in texts}, repeats)
        used = torch.get_num_threads()

    launched = {way: launches(lambda way=way: counted(way)) for way in texts}
    first, *_, last = found.values()
    rows = []
    for way, own in found.items():
        (value, gradient), (expected, theirs) = own.value, first.value
        rows.append(
            {
                "way": way,
                "tokens": tokens[way],
                "launches": launched[way],
                "seconds": own.seconds,
                "all_seconds": own.all_seconds,
                "extra_bytes": own.extra_bytes,
                "times_faster_than_padded": first.seconds / own.seconds,
                "over_shared_prefix": own.seconds / last.seconds,
                "value_difference": float((value - expected).abs().max()),
                "relative_gradient_difference": float((gradient - theirs).norm() / theirs.norm()),
            }
        )
    return {"classes": len(names), "shared": shared, "repeats": repeats, "prefix_threads": used, "rows": rows}


def rows(report: dict[str, Any]) -> list[Row]:
    *others, own = report["rows"]
    equal = f"values {own['value_difference']:.0e}, gradients {own['relative_gradient_difference']:.0e}"
    if "launches" in own:  # reports before it was counted have none
        equal += f"; {own['launches']:,} launches"
    what = f"prompt step: {report['classes']} classes, {report['shared']} context vectors, one thread"
    return [
        Row(
            what,
            other["way"],
            other["seconds"],
            own["way"],
            own["seconds"],
            target=target,
            equal=equal,
            extra_bytes=own["extra_bytes"],
            plain_extra_bytes=other["extra_bytes"],
        )
        for other, target in zip(others, TARGETS, strict=True)
    ]


def table(report: dict[str, Any]) -> str:
    lines = [
        "| way | tokens | launches | seconds | times faster than padded | seconds over the shared prefix's "
        "| max. difference in value | relative difference in gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['way']} | {row['tokens']} | {row['launches']} | {row['seconds']:.3f} | {row['times_faster_than_padded']:.1f} "
            f"| {row['over_shared_prefix']:.1f} | {row['value_difference']:.1e} "
            f"| {row['relative_gradient_difference']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--shared", type=int, default=16, help="context vectors")
    args = parser.parse_args()
    report = measured(args.repeats, args.classes, args.shared)
    print(
        f"{report['classes']} classes, {args.shared} shared context vectors, forward and backward, {args.repeats} repeats\n"
    )
    handed_out(report, table(report), "prefix", args.out, into=None)


if __name__ == "__main__":
    main()

"""What a step of soft prompts costs in the text tower: each prompt whole, cut at the last end, or what is shared once.

100 classes with names of two and three tokens behind 16 shared context vectors, forward and backward, through ViT-B/16's
text tower of random weights (12 layers of width 512; times do not depend on weights). The ways take turns in one process,
on one thread, so that other work on the machine slows all of them; seconds are medians.

    python benchmarks/prefix.py [--out FILE] [--repeats 5] [--classes 100] [--shared 16]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from cairn.run import versions
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.preprocessing import Preprocessing
from cairn.towers.prompts import Prompts, prompt_embeddings

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "cyan")
SHAPES = ("circle", "square", "star", "cross", "flower", "house", "ring", "heart", "triangle", "moon")


def vit_b_16() -> ClipTowers:
    """The text tower is ViT-B/16's, weights random, the tokenizer the embedded one; one block stands for the image tower."""
    torch.manual_seed(0)
    tiny = load_towers("tiny", device="cpu")
    text = {"vocab_size": 49408, "bos_token_id": tiny.bos, "eos_token_id": tiny.eos, "pad_token_id": 1}
    config = CLIPConfig(projection_dim=512, text_config=text, vision_config={"num_hidden_layers": 1, "patch_size": 16})
    return ClipTowers(CLIPModel(config), tiny.tokenizer, Preprocessing(size=224), name="random ViT-B/16", device="cpu")


def class_names(k: int) -> list[str]:
    """By turns of two words and of three, each one token: red circle, striped red circle, red square, ..."""
    names = [f"{kind}{colour} {shape}" for colour, shape, kind in product(COLOURS, SHAPES, ("", "striped "))]
    if k > len(names):
        raise SystemExit(f"--classes {k}: there are {len(names)} names")
    return names[:k]


def step(texts: Callable[[], Tensor], context: Tensor, weight: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds of one forward and backward, the texts, and the gradient in the context."""
    context.grad, began = None, time.perf_counter()
    value = texts()
    (weight * value).sum().backward()
    return time.perf_counter() - began, value.detach(), context.grad.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--shared", type=int, default=16, help="context vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)

    towers, names = vit_b_16(), class_names(args.classes)
    prompts = Prompts(shared=args.shared, per_class=0, init=None).build(towers)
    prompts.grow(names, torch.zeros(len(names), towers.dim), torch.Generator().manual_seed(0))
    weight = torch.randn(len(names), towers.dim, generator=torch.Generator().manual_seed(1))

    def whole(length: int) -> Tensor:
        contexts = prompts.shared.expand(len(names), -1, -1)
        return normalize(prompt_embeddings(towers, contexts, names, length), dim=-1)

    ways = {
        f"padded to {towers.context_length}": lambda: whole(towers.context_length),
        "cut at the last end": lambda: whole(0),
        "shared prefix": prompts,
    }
    seconds, tokens, found = {way: [] for way in ways}, {}, {}
    for _ in range(args.repeats):
        for way, texts in ways.items():
            before = towers.passes["text_tokens"]
            took, *found[way] = step(texts, prompts.shared, weight)
            seconds[way].append(took)
            tokens[way] = towers.passes["text_tokens"] - before

    first, *_, last = ways
    rows = []
    for way in ways:
        (value, gradient), (expected, theirs), own = found[way], found[first], median(seconds[way])
        rows.append({
            "way": way, "tokens": tokens[way], "seconds": own, "all_seconds": seconds[way],
            "times_faster_than_padded": median(seconds[first]) / own, "over_shared_prefix": own / median(seconds[last]),
            "value_difference": float((value - expected).abs().max()),
            "relative_gradient_difference": float((gradient - theirs).norm() / theirs.norm()),
        })  # fmt: skip

    print(f"{len(names)} classes, {args.shared} shared context vectors, forward and backward, {args.repeats} repeats\n")
    print(
        "| way | tokens | seconds | times faster than padded | seconds over the shared prefix's | max. difference in value "
        "| relative difference in gradient |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['way']} | {row['tokens']} | {row['seconds']:.3f} | {row['times_faster_than_padded']:.1f} "
            f"| {row['over_shared_prefix']:.1f} | {row['value_difference']:.1e} "
            f"| {row['relative_gradient_difference']:.1e} |"
        )
    if args.out:
        report = {
            "classes": len(names), "shared": args.shared, "repeats": args.repeats, "threads": torch.get_num_threads(),
            "rows": rows, "machine": {"cores": os.cpu_count(), "processor": platform.machine()}, "versions": versions(),
        }  # fmt: skip
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

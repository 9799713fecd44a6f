"""A step of stage 2 with soft prompts, beside the same step before the pass was made cheaper (`levels.py`), and its limit.

100 classes in 10 tasks, ViT-B/16's text tower of random weights, a batch of 128: texts forward and backward, the loss, the
gradient's norm and AdamW. Either the prompts of all classes pass the tower (4 vectors per class), or those of the last task with
those before kept (DMC-OT). The ways take turns, on one thread and on two.

The limit is the arithmetic of the least products (of the last block queries, output and MLP at the ends alone; no gradient of a
weight) at the pace of the fastest large product, which takes turns with them.
"""

from __future__ import annotations

from typing import Any

import torch
from launches import grown, text_step
from levels import LevelTowers
from measure import Row, in_turns, threads
from standins import vit_b_and_model
from torch import Tensor
from torch.nn.functional import linear
from transformers import CLIPModel

from cairn.methods.dmc_ot import PROMPTS
from cairn.towers.clip import ClipTowers
from cairn.towers.prefix import FrozenLinear
from cairn.towers.prompts import FixedTexts, Prompts, SoftPrompts

SIZES = {
    "full": {"repeats": 9, "classes": 100, "tasks": 10, "batch": 128},
    "quick": {"repeats": 1, "classes": 100, "tasks": 10, "batch": 128},
}
THREADS = (1, 2)
TARGET = 1.5
"""On two threads."""
BEFORE, NOW, LARGE, ORDERED = "level by level", "one attention, frozen products", "a large product", "the same in order"
SIDE = 2048
"""Rows and columns of the large product."""


def least(model: CLIPModel, tokens: int, ends: int) -> int:
    """Operations of the products of one step: multiplications and additions, forward and backward."""
    text = model.config.text_config
    w, m, blocks = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    every = 4 * w * w + 2 * w * m
    return 4 * ((blocks - 1) * tokens * every + tokens * 2 * w * w + ends * (every - 2 * w * w))


def gradients(texts: FixedTexts | SoftPrompts) -> tuple[Tensor, Tensor]:
    """The texts, and the gradient in all that is trained."""
    value = texts()
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return value.detach(), torch.cat(
        [g.flatten() for g in torch.autograd.grad((weight * value).sum(), texts.trainable())]
    )


def measured(repeats: int, classes: int, tasks: int, batch: int) -> dict[str, Any]:
    # One block stands for the image tower, which is not used
    towers, model = vit_b_and_model(16, image_layers=1)
    found = []
    for what, choice in (("all classes", Prompts(init=None)), ("the last task (DMC-OT)", PROMPTS)):
        for number in THREADS:
            with threads(number):
                step = one_step(towers, model, choice, repeats, classes, tasks, batch)
            found.append({"what": what, "prompts_threads": number} | step)
    return {"classes": classes, "tasks": tasks, "batch": batch, "rows": found}


def one_step(
    towers: ClipTowers, model: CLIPModel, choice: Prompts, repeats: int, classes: int, tasks: int, batch: int
) -> dict[str, Any]:
    texts = {BEFORE: grown(LevelTowers(towers), choice, classes, tasks), NOW: grown(towers, choice, classes, tasks)}
    (plain, plain_gradient), (value, gradient) = (gradients(own) for own in texts.values())
    before = towers.passes["text_tokens"]
    texts[NOW]()
    tokens = towers.passes["text_tokens"] - before
    ends = classes // tasks if choice.freeze_old else classes
    x, bias = torch.randn(SIDE, SIDE), torch.zeros(SIDE)
    ordered = FrozenLinear(x, bias, torch.float32)
    products = {LARGE: lambda: linear(x, x, bias), ORDERED: lambda: ordered(x)}
    found = in_turns({way: text_step(towers, own, classes, batch) for way, own in texts.items()} | products, repeats)
    pace = 2 * SIDE**3 / min(found[product].seconds for product in products)
    work = least(model, tokens, ends)
    return {
        "tokens": tokens,
        "least_operations": work,
        "operations_per_second": pace,
        "share_of_limit": work / pace / found[NOW].seconds,
        "value_difference": float((value - plain).abs().max()),
        "relative_gradient_difference": float((gradient - plain_gradient).norm() / plain_gradient.norm()),
        "ways": {
            way: {"seconds": own.seconds, "all_seconds": own.all_seconds, "extra_bytes": own.extra_bytes}
            for way, own in found.items()
        },
    }


def rows(report: dict[str, Any]) -> list[Row]:
    found = []
    for row in report["rows"]:
        before, now = (row["ways"][way] for way in (BEFORE, NOW))
        number = row["prompts_threads"]
        equal = f"values {row['value_difference']:.0e}, gradients {row['relative_gradient_difference']:.0e}"
        found.append(
            Row(
                f"step of stage 2, prompts of {row['what']}, {report['classes']} classes, {number} thread{'s' * (number > 1)}",
                BEFORE,
                before["seconds"],
                NOW,
                now["seconds"],
                target=TARGET if number == 2 else None,
                equal=f"{equal}; {100 * row['share_of_limit']:.0f} % of the limit",
                extra_bytes=now["extra_bytes"],
                plain_extra_bytes=before["extra_bytes"],
            )
        )
    return found

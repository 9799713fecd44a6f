"""How many kernels a step of stage 2 launches: on an accelerator a step of many small ones is bound by their number.

100 classes in 10 tasks, ViT-B/16's text tower of random weights, a batch of 128. Texts are forward and backward; a step adds the
loss, the gradient's norm and AdamW. Counted on the processor are operators that would be a kernel each on an accelerator, where
AdamW and the norm take fewer (they are fused over parameters). Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Row, launches
from prefix import class_names
from standins import vit_b
from torch import Tensor, nn

from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.methods.dmc_ot import PROMPTS
from cairn.towers.clip import ClipTowers
from cairn.towers.prompts import FixedTexts, Prompts, Residual, SoftPrompts, prompt_embeddings
from cairn.training.capture import Captured
from cairn.training.context import Log
from cairn.training.fit import Schedule

SIZES = {
    "full": {"classes": 100, "tasks": 10, "batch": 128},
    "quick": {"classes": 100, "tasks": 10, "batch": 128},
}


def grown(towers: ClipTowers, choice: Prompts | Residual, classes: int, tasks: int) -> FixedTexts | SoftPrompts:
    """Class texts after so many tasks of equal size."""
    texts, names, size = choice.build(towers), class_names(classes), classes // tasks
    anchors = unit(torch.randn(classes, towers.dim, generator=torch.Generator().manual_seed(1))).to(towers.device)
    for start in range(0, classes, size):
        rows = slice(start, start + size)
        texts.grow(names[rows], anchors[rows], torch.Generator().manual_seed(start))
    return texts


def text_step(
    towers: ClipTowers,
    texts: FixedTexts | SoftPrompts,
    classes: int,
    batch: int,
    log: Log | None = None,
) -> Callable[[], None]:
    """One step of stage 2 on a batch that lies on the device; with a `log`, for what is said of it, as CUDA graphs."""
    rng = torch.Generator().manual_seed(0)
    z, y = unit(torch.randn(batch, towers.dim, generator=rng)).to(towers.device), torch.arange(batch) % classes
    y, parameters = y.to(towers.device), texts.trainable()
    optimiser = Schedule(lr=1e-3).optimiser(parameters)

    def plain(z: Tensor, y: Tensor) -> Tensor:
        return class_cross_entropy(z, texts(), y, towers.logit_scale)

    loss = plain if log is None else Captured(plain, parameters, log)

    def step() -> None:
        optimiser.zero_grad()
        loss(z, y).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    return step


def measured(classes: int, tasks: int, batch: int) -> dict[str, Any]:
    towers = vit_b(16, image_layers=1)
    every = Prompts(init=None)
    own, latest = (grown(towers, choice, classes, tasks) for choice in (every, PROMPTS))
    contexts = torch.randn(classes, every.per_class, towers.width, requires_grad=True)

    def backward(texts: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: texts().sum().backward()

    whole = backward(lambda: prompt_embeddings(towers, contexts, class_names(classes)))
    found = {
        "prompts of all classes, each run whole": {"texts": launches(whole)},
        "prompts of all classes, as a tree": both(towers, own, classes, batch),
        "prompts of the last task, those before kept (DMC-OT)": both(towers, latest, classes, batch),
        "residual texts": both(towers, grown(towers, Residual(), classes, tasks), classes, batch),
    }
    rows = [{"what": what, "step": None} | numbers for what, numbers in found.items()]
    return {"classes": classes, "tasks": tasks, "batch": batch, "rows": rows}


def both(towers: ClipTowers, texts: FixedTexts | SoftPrompts, classes: int, batch: int) -> dict[str, int]:
    """Launches of the texts alone and of a step, once the optimiser has its state."""
    step = text_step(towers, texts, classes, batch)
    step()
    return {"texts": launches(lambda: texts().sum().backward()), "step": launches(step)}


def rows(report: dict[str, Any]) -> list[Row]:
    """None: numbers of launches are neither seconds nor bytes. See `table`."""
    return []


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['classes']} classes in {report['tasks']} tasks, ViT-B/16's text tower, a batch of {report['batch']}:",
        "",
        "| class texts | forward and backward | a step |",
        "|---|---|---|",
    ]
    for row in report["rows"]:
        step = "" if row["step"] is None else f"{row['step']:,}"
        lines.append(f"| {row['what']} | {row['texts']:,} | {step} |")
    return "\n".join(lines)

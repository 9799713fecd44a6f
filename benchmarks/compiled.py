"""Whether it pays to compile the stage-1 step: forward, backward and AdamW of LoRA on the embedded towers.

A step is one of stage 1 with its usual settings; the passes through the tower are not counted, since a counter would have
the step compiled anew each time. Compiling happens at the first step, and once more at the first smaller batch, with which
nearly every epoch ends; each is the time of such a first call above that of a second one. `anew` begins with an empty
folder of compiled code, `kept` finds there what `anew` left, as a second process on the same machine would.

Where there is no C++ compiler, or the compiling fails otherwise, the report holds the reason and no rows come of it.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import Row, in_turns
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.methods.parts.stages import VisionStage
from cairn.towers.catalogue import load_towers
from cairn.towers.tuning import ImageEncoder

SIZES = {
    "full": {"batch": 128, "repeats": 9, "backend": "inductor"},
    "quick": {"batch": 128, "repeats": 2, "backend": "inductor"},
    "tiny": {"batch": 4, "repeats": 1, "backend": "eager"},
}
"""The backend `eager` traces the step and compiles nothing: it is there for the test."""

CLASSES, TASK = 10, 50
"""Classes of the task, and steps of a long one."""

FOLDER = "TORCHINDUCTOR_CACHE_DIR"

Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def compiled_code_in(folder: str) -> Iterator[None]:
    before = os.environ.get(FOLDER)
    os.environ[FOLDER] = folder
    try:
        yield
    finally:
        del os.environ[FOLDER]
        if before is not None:
            os.environ[FOLDER] = before


class Stage:
    """Stage 1 of the embedded towers on images of noise, step by step."""

    def __init__(self, batch: int):
        config, towers = VisionStage(), load_towers("tiny", device="cpu")
        rng = torch.Generator().manual_seed(0)
        self.encoder = ImageEncoder(towers, config.tuning, rng)
        self.parameters = self.encoder.parameters()
        self.optimiser, self.clip = config.schedule.optimiser(self.parameters), config.schedule.clip
        size = towers.preprocessing.size
        self.pixels, self.labels = torch.randn(batch, 3, size, size, generator=rng), torch.arange(batch) % CLASSES
        self.anchors, self.s = unit(torch.randn(CLASSES, towers.dim, generator=rng)), towers.logit_scale

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        vision = self.encoder.module
        z = vision.visual_projection(vision.vision_model(pixel_values=pixels).pooler_output)
        return class_cross_entropy(unit(z), self.anchors, labels, self.s)

    def step(self, loss: Loss, images: int | None = None) -> float:
        value = loss(self.pixels[:images], self.labels[:images])
        self.optimiser.zero_grad()
        value.backward()
        clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        return value.item()

    def gradient(self, loss: Loss) -> tuple[float, Tensor]:
        self.optimiser.zero_grad()
        value = loss(self.pixels, self.labels)
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in self.parameters])


def seconds_of(call: Callable[[], Any]) -> float:
    mark = time.perf_counter()
    call()
    return time.perf_counter() - mark


def compiling(stage: Stage, loss: Loss, sizes: tuple[int, int]) -> list[float]:
    """Seconds that the first call with each number of images takes above the second."""
    return [
        max(0.0, seconds_of(lambda n=n: stage.step(loss, n)) - seconds_of(lambda n=n: stage.step(loss, n)))
        for n in sizes
    ]


def measured(batch: int, repeats: int, backend: str) -> dict[str, Any]:
    stage, sizes = Stage(batch), (batch, batch // 2 + 1)
    report: dict[str, Any] = {"batch": batch, "smaller_batch": sizes[1], "backend": backend, "task": TASK}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, compiled_code_in(folder):
        seconds = {}
        for how in ("anew", "kept"):
            torch._dynamo.reset()
            compiled = torch.compile(stage.loss, backend=backend)
            try:
                seconds[how] = compiling(stage, compiled, sizes)
            except Exception as error:  # what is raised depends on what is missing
                return report | {"reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        found = in_turns(
            {"as it is": lambda: stage.step(stage.loss), "compiled": lambda: stage.step(compiled)}, repeats
        )
        (value, gradient), (expected, theirs) = stage.gradient(compiled), stage.gradient(stage.loss)
    plain, own = found["as it is"].seconds, found["compiled"].seconds
    return report | {
        "reason": None,
        "compiling": seconds,
        "rows": [
            {"way": way, "seconds": taken.seconds, "all_seconds": taken.all_seconds, "extra_bytes": taken.extra_bytes}
            for way, taken in found.items()
        ],
        "pays_after": {how: steps_until(sum(spent), plain - own) for how, spent in seconds.items()},
        "loss_difference": abs(value - expected) / abs(expected),
        "gradient_difference": float((gradient - theirs).norm() / theirs.norm()),
    }


def steps_until(spent: float, gained: float) -> int | None:
    """Steps after which what each one gains has made up for what was spent. None if a step gains nothing."""
    return math.ceil(spent / gained) if gained > 0 else None


def rows(report: dict[str, Any]) -> list[Row]:
    if report["reason"]:
        return []
    plain, own = report["rows"]
    equal = f"loss {report['loss_difference']:.0e}, gradients {report['gradient_difference']:.0e}"
    made = [
        Row(
            f"stage-1 step of the embedded towers, batch {report['batch']}",
            plain["way"],
            plain["seconds"],
            own["way"],
            own["seconds"],
            equal=equal,
            extra_bytes=own["extra_bytes"],
            plain_extra_bytes=plain["extra_bytes"],
        )
    ]
    for how, text in (("anew", "compiled"), ("kept", "compiled, code kept by an earlier process")):
        spent, task = sum(report["compiling"][how]), report["task"]
        made.append(
            Row(
                f"a task of {task} such steps, compiling included",
                plain["way"],
                task * plain["seconds"],
                text,
                spent + task * own["seconds"],
                equal=verdict(report["pays_after"][how], task),
            )
        )
    return made


def verdict(after: int | None, task: int) -> str:
    if after is None:
        return "does not pay: no step is faster"
    return f"pays, from step {after:,} on" if after <= task else f"does not pay: it takes {after:,} steps"

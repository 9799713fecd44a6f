"""What `blend` takes and keeps by the number of classes, beyond the pass through the tower: a task of 10 classes, and predicting.

    python benchmarks/run.py --only pool --out results/benchmarks --into docs

Drawn embeddings of d = 512 around unit centres, 16 images per class, class texts beside the centres. All old classes are learned in
one call, which is not timed.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from measure import Row, bytes_cell, machine_line, seconds_cell, surroundings
from torch import Tensor
from torch.nn.functional import normalize

from cairn.methods.blend import Blend, BlendConfig
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context, Seeds

SIZES = {
    "full": {"classes": (100, 1_000, 10_000), "images": 16},
    "quick": {"classes": (100,), "images": 16},
    "tiny": {"classes": (20,), "images": 4},
}
DIM, NEW, ASKED = 512, 10, 100
FORMS = {"default": {}, "compact": {"rank": 8, "features": 512}}


def drawn(k: int, images: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels and texts of k classes."""
    centres = normalize(torch.randn(k, DIM, generator=rng), dim=1)
    noise = torch.randn(k * images, DIM, generator=rng) * torch.logspace(0, -1, DIM)
    x = normalize(centres.repeat_interleave(images, 0) + 0.05 * noise, dim=1)
    texts = normalize(centres + 0.05 * torch.randn(k, DIM, generator=rng), dim=1)
    return x, torch.arange(k).repeat_interleave(images), texts


def measured_at(k: int, images: int, form: str) -> dict[str, Any]:
    rng, names = torch.Generator().manual_seed(0), ("a",)
    towers = FeatureTowers(
        name="none", dim=DIM, logit_scale=100.0, fingerprint="none", names=names, text=torch.zeros(1, DIM).numpy()
    )
    method = Blend(towers, BlendConfig(patches="none", **FORMS[form]), seed=1)
    method.learn_rows(*drawn(k, images, rng), Context(Seeds(1)))
    x, y, texts = drawn(NEW, images, rng)
    mark = perf_counter()
    method.learn_rows(x, y + k, texts, Context(Seeds(1).at(task=1)))
    seconds = perf_counter() - mark
    method.row_scores(x[:1])  # what is made once after a task
    mark = perf_counter()
    method.row_scores(x.repeat(ASKED, 1)[:ASKED])
    return {
        "classes": k,
        "form": form,
        "task": seconds,
        "predict": (perf_counter() - mark) / ASKED,
        "bytes": method.memory_bytes,
    }


def measured(classes: tuple[int, ...], images: int) -> dict[str, Any]:
    found = [measured_at(k, images, form) for k in classes for form in FORMS]
    return {"images": images, "rows": found} | surroundings()


def rows(report: dict[str, Any]) -> list[Row]:
    """None: there is no plain form."""
    return []


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['images']} images per class, d = {DIM}:",
        "",
        f"| classes | form | a task of {NEW} classes | predicting an image | kept |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['classes']:,} | {row['form']} | {seconds_cell(row['task'])} | {seconds_cell(row['predict'])} | "
            f"{bytes_cell(row['bytes'])} |"
        )
    return "\n".join([*lines, "", machine_line(report)])

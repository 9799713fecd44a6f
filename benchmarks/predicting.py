"""Predicting many files: pictures per second beside a plain loop over transformers' own parts, and memory by their number.

    python benchmarks/run.py --only predicting --out results/benchmarks --into docs

Drawn JPEGs of 500 x 375, a ViT-B/32 of random weights, batches of 64. The plain loop opens a batch with Pillow, has transformers'
processor prepare it and its model embed it, and takes the likeliest class by a product with class vectors. Ours is
`IncrementalClassifier.stream` of a `blend` learner, whose rows come with probabilities and known scores, on the same files in the
same process. On one core both are kept to it, with one thread.

Memory and pace by the number of files are those of the embedded towers; beyond a thousand files are links to the first ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measure import Row, bytes_cell, in_turns, machine_line, resident, seconds_cell, surroundings, threads
from PIL import Image
from standins import vit_b_and_model
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPModel

from cairn import IncrementalClassifier
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers

SIZES = {
    "full": {"pictures": 512, "repeats": 3, "numbers": (1_000, 10_000, 100_000)},
    "quick": {"pictures": 128, "repeats": 1, "numbers": (1_000, 10_000)},
    "tiny": {"pictures": 8, "repeats": 1, "numbers": (20, 40)},
}
WIDTH, HEIGHT, BATCH, UNIQUE = 500, 375, 64, 1_000
CLASSES = ("red", "green", "blue", "grey")


def drawn(folder: Path, number: int, width: int, height: int) -> list[Path]:
    """JPEGs of smooth noise, as large as photographs are when they are compressed."""
    rng, files = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(number):
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def linked(files: list[Path], number: int, folder: Path) -> list[Path]:
    """So many files: these ones, and links to them."""
    folder.mkdir()
    found = []
    for i in range(number):
        found.append(folder / f"{i}.jpg")
        os.link(files[i % len(files)], found[-1])
    return found


def learner_of(towers: ClipTowers, files: list[Path]) -> IncrementalClassifier:
    labels = [CLASSES[i % len(CLASSES)] for i in range(len(files))]
    return IncrementalClassifier("blend", towers).partial_fit(files, labels)


def plain(model: CLIPModel, classes: Tensor, files: list[Path]) -> list[int]:
    """The loop that everybody writes; `classes` has a column for each."""
    processor, found = CLIPImageProcessorPil(), []
    for start in range(0, len(files), BATCH):
        images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            z = model.get_image_features(pixel_values=pixels)
        z = z if isinstance(z, Tensor) else z.pooler_output
        found += (normalize(z) @ classes).argmax(1).tolist()
    return found


def ours(learner: IncrementalClassifier, files: list[Path]) -> list[int]:
    return [int(c) for found in learner.stream(files, batch=BATCH) for c in found.scores.argmax(1)]


@contextmanager
def on_cores(number: int) -> Iterator[None]:
    """So many of the cores that this process may use, with a thread for each."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        with threads(number):
            yield
    finally:
        os.sched_setaffinity(0, before)


def measured(pictures: int, repeats: int, numbers: tuple[int, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs = drawn(folder / "photographs", pictures, WIDTH, HEIGHT)
        (towers, model), pace = vit_b_and_model(32), {}
        learner, classes = learner_of(towers, photographs[:8]), towers.class_texts(CLASSES, ("a photo of a {}.",)).T
        for cores in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
            with on_cores(cores):
                ways = {"plain": lambda: plain(model, classes, photographs), "ours": lambda: ours(learner, photographs)}
                both = in_turns(ways, repeats)
            pace[str(cores)] = {
                way: {"seconds": one.seconds, "extra_bytes": one.extra_bytes} for way, one in both.items()
            }
        small = drawn(folder / "small", min(UNIQUE, *numbers), 64, 64)
        learner, growth = learner_of(load_towers("tiny", device="cpu"), small[:8]), {}
        ours(learner, small)  # what is loaded once is loaded
        for number in numbers:
            growth[str(number)] = streamed(learner, linked(small, number, folder / f"links-{number}"))
    return {"pictures": pictures, "pace": pace, "by_number": growth} | surroundings()


def streamed(learner: IncrementalClassifier, files: list[Path]) -> dict[str, float]:
    """Seconds to the first rows and to the last, and by how much memory grew at most."""
    before, mark, first, most = resident("VmRSS"), perf_counter(), 0.0, 0
    for found in learner.stream(files, batch=BATCH):
        first = first or perf_counter() - mark
        most = max(most, resident("VmRSS"))
        assert len(found)
    return {"first": first, "seconds": perf_counter() - mark, "extra_bytes": max(0, most - before)}


def rows(report: dict[str, Any]) -> list[Row]:
    found = []
    for cores, ways in report["pace"].items():
        plainly, own = ways["plain"], ways["ours"]
        found.append(
            Row(
                item=f"predict {report['pictures']} files, ViT-B/32, {cores} core{'s' if cores != '1' else ''}",
                plain="loop over transformers' processor and model",
                plain_amount=plainly["seconds"],
                ours="`stream`, with known scores",
                amount=own["seconds"],
                target=1.0,
                extra_bytes=own["extra_bytes"],
                plain_extra_bytes=plainly["extra_bytes"],
            )
        )
    if "2" in report["pace"]:
        found.append(
            Row(
                item="the same on two cores beside the loop on one",
                plain="loop, one core",
                plain_amount=report["pace"]["1"]["plain"]["seconds"],
                ours="`stream`, two cores",
                amount=report["pace"]["2"]["ours"]["seconds"],
                target=1.8,
            )
        )
    return found


def table(report: dict[str, Any]) -> str:
    lines = ["| files | first rows after | pictures per second | memory on top |", "|---|---|---|---|"]
    for number, one in report["by_number"].items():
        pace = int(number) / one["seconds"]
        lines.append(
            f"| {int(number):,} | {seconds_cell(one['first'])} | {pace:.0f} | {bytes_cell(one['extra_bytes'])} |"
        )
    return "\n".join([*lines, "", machine_line(report)])

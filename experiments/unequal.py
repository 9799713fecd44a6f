"""Classes of few images beside classes of many: half of the classes of a stream, drawn at random, are learned from few images.

    python experiments/unequal.py [--only STREAM[/METHOD]] [--out results/unequal.json] [--into docs/blend.md]
    python experiments/unequal.py --table   # only write the table anew from what is stored

Rows that are stored already are not made again. Sets are looked for under `data/`, as `experiments/results.py` does. Last
accuracy, the mean over the classes of few, of many and over all; and over all classes as often as each was learned from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from stored import arguments, measured_rows, write_block
from streams import DESCRIBED

from cairn.data.feature_store import FeatureStore
from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.experiment.inputs import prepared, tower_stands
from cairn.experiment.schema import RunConfig
from cairn.reports.formats import Column, Table, estimate
from cairn.towers.cached import kept
from cairn.training.context import Context
from cairn.training.seeds import Seeds

FEATURES = "data/clip-vit-b32-features"
STREAMS: dict[str, dict[str, Any]] = {
    "shapes": {"data": "shapes", "step": 5},
    "cifar100": {"data": "data/cifar100", "towers": "data/mini-clip", "step": 10, "order": "seed:1993"},
    "ucf101": {"data": f"{FEATURES}/ucf101.safetensors", "step": 10, "order": "seed:1993"},
    "caltech51": {"data": f"{FEATURES}/caltech51.safetensors", "step": 10, "order": "seed:1993"},
    "imagenet150": {"data": f"{FEATURES}/imagenet150.safetensors", "step": 10, "order": "seed:1993"},
}
FEW = {"shapes": 6, "cifar100": 12, "ucf101": 4, "caltech51": 2, "imagenet150": 1}
MANY = {"shapes": 50, "cifar100": 100, "ucf101": 16, "caltech51": 16, "imagenet150": 4}
METHODS = ("zero-shot", "simplecil", "lda", "ranpac", "engine", "blend", "blend, class_prior=counts")
SEEDS = (1, 2, 3)


def thinned(task: Task, numbers: np.ndarray, rng: np.random.Generator) -> Task:
    """With numbers[c] images of class c, drawn."""
    labels = np.asarray(task.train.labels)
    rows = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(labels == c))[: numbers[c]] for c in np.unique(labels)])
    )
    return replace(task, train=Subset(task.train, rows, labels[rows]))


def measured(stream: str, method: str, seed: int) -> dict[str, Any]:
    name, *changed = method.split(", ")
    settings = [*changed, *(DESCRIBED if (stream, name) == ("cifar100", "engine") else [])]
    call = {"method": name, "seed": seed, "settings": settings} | STREAMS[stream]
    entry, tasks, towers, config = prepared(RunConfig(**call))
    fingerprint = towers.fingerprint
    if towers.has_images and tower_stands(entry, config):
        tasks, towers = kept(tasks, towers, FeatureStore.configured())
    learner, rng = entry.build(towers, config, seed=seed), np.random.default_rng(seed)
    k = len(tasks.class_names)
    few = np.sort(rng.permutation(k)[: k // 2])
    numbers = np.full(k, MANY[stream])
    numbers[few] = FEW[stream]
    for task in tasks.tasks:
        learner.learn(thinned(task, numbers, rng), Context(Seeds(seed)))
    right, total = np.zeros(k), np.zeros(k)
    for test in tasks.tests:
        for pixels, y in Loader(test, towers.prepare, towers.pixels, batch=256).ordered():
            with torch.no_grad():
                hits = learner.scores(learner.embed(pixels)).argmax(1).cpu() == y
            right += np.bincount(y.numpy(), weights=hits.numpy(), minlength=k)
            total += np.bincount(y.numpy(), minlength=k)
    return {
        "stream": stream,
        "method": method,
        "seed": seed,
        "split": tasks.fingerprint,
        "towers": fingerprint,
        "few": few.tolist(),
        "images": [FEW[stream], MANY[stream]],
        "accuracy": (right / total).tolist(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    found = []
    for stream, method in product(STREAMS, METHODS):
        own = [row for row in rows if (row["stream"], row["method"]) == (stream, method)]
        if not own:
            continue
        parts: list[list[float]] = [[], [], [], []]
        for row in own:
            by_class = 100 * np.array(row["accuracy"])
            is_few = np.isin(np.arange(len(by_class)), row["few"])
            weights = np.where(is_few, *row["images"])
            values = (
                by_class.mean(),
                by_class[is_few].mean(),
                by_class[~is_few].mean(),
                weights @ by_class / weights.sum(),
            )
            for part, value in zip(parts, values, strict=True):
                part.append(float(value))
        numbers = " / ".join(map(str, own[0]["images"]))
        seeds = ", ".join(str(row["seed"]) for row in own)
        found.append([stream, numbers, method, *(estimate(part) for part in parts), seeds])
    words = [Column("stream"), Column("images of few / many"), Column("method")]
    figures = ("all classes %", "of few %", "of many %", "as often as learned %")
    return Table([*words, *(Column(title, 1) for title in figures), Column("seeds")], found).markdown()


def jobs() -> Iterator[tuple[str, str, int]]:
    for stream, method, seed in product(STREAMS, METHODS, SEEDS):
        if (stream, method) != ("ucf101", "zero-shot"):  # the file has no class texts
            yield stream, method, seed


def main() -> None:
    args = arguments(__doc__, "results/unequal.json", "docs/blend.md")
    rows = measured_rows(args, ("stream", "method", "seed"), jobs(), measured)
    write_block(args.into, "unequal", table(rows))


if __name__ == "__main__":
    main()

"""Images without labels, among them some of no class of the task: what they cost `blend`, which takes each for one.

    python experiments/foreign.py [--only HEAP[/THRESHOLD]] [--out results/foreign.json] [--into docs/blend.md]
    python experiments/foreign.py --table   # only write the table anew from what is stored

The stream is that of `shapes-eighth` in `experiments/streams.py`: 5 labelled images of each class and 35 without labels. To
these a heap of others is added to every task: photographs of CIFAR-100 under `data/`, drawn by the seed, or images of all
other classes of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from stored import arguments, measured_rows, write_block

from cairn import open_dataset
from cairn.data.few_labels import together
from cairn.data.images import Images, Unlabelled
from cairn.data.loading import Loader
from cairn.experiment.inputs import prepared
from cairn.experiment.schema import RunConfig
from cairn.reports.formats import Column, Table, estimate
from cairn.training.context import Context
from cairn.training.seeds import Seeds

HEAPS = {
    "none": "none",
    "tenth": "photographs, one for ten of the task",
    "equal": "photographs, as many as of the task",
    "others": "images of the 35 other classes, 35 each",
}
THRESHOLDS, SEEDS = (0.2, 0.8), (1, 2, 3)
PHOTOGRAPHS = "data/cifar100"


def foreign(heap: str, own: Images, others: list[Images], seed: int) -> Images | None:
    """What is added to the images of a task; `others` are those of the other tasks."""
    if heap == "none":
        return None
    if heap == "others":
        return together(*others)
    photographs, number = open_dataset(PHOTOGRAPHS).test, len(own) // 10 if heap == "tenth" else len(own)
    return Unlabelled(photographs, np.random.default_rng(seed).permutation(len(photographs))[:number])


def measured(heap: str, threshold: float, seed: int) -> dict[str, Any]:
    call = {"method": "blend", "data": "shapes", "step": 5, "limit_train": 40, "labelled": 0.125, "seed": seed}
    entry, stream, towers, config = prepared(RunConfig(**call, settings=[f"threshold={threshold}"]))
    learner, hidden = entry.build(towers, config, seed=seed), stream.unlabelled
    right: list[float] = []
    for i, task in enumerate(stream.tasks):
        heaped = foreign(heap, hidden[i], [*hidden[:i], *hidden[i + 1 :]], seed)
        learner.learn(replace(task, unlabelled=together(hidden[i], heaped)), Context(Seeds(seed)))
        hits = []
        for test in stream.tests[: i + 1]:
            for pixels, y in Loader(test, towers.prepare, towers.pixels, batch=256).ordered():
                with torch.no_grad():
                    hits.append(learner.scores(learner.embed(pixels)).argmax(1).cpu() == y)
        right.append(torch.cat(hits).double().mean().item())
    return {
        "heap": heap,
        "threshold": threshold,
        "seed": seed,
        "split": stream.fingerprint,
        "towers": towers.fingerprint,
        "average": float(np.mean(right)),
        "last": right[-1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    found = []
    for heap, threshold in product(HEAPS, THRESHOLDS):
        own = [row for row in rows if (row["heap"], row["threshold"]) == (heap, threshold)]
        if own:
            figures = (estimate([100 * row[key] for row in own]) for key in ("average", "last"))
            found.append([HEAPS[heap], str(threshold), *figures, ", ".join(str(row["seed"]) for row in own)])
    words = [Column("beside those of the task"), Column("threshold")]
    return Table([*words, Column("average %"), Column("last %"), Column("seeds")], found).markdown()


def jobs() -> Iterator[tuple[str, float, int]]:
    yield from product(HEAPS, THRESHOLDS, SEEDS)


def main() -> None:
    args = arguments(__doc__, "results/foreign.json", "docs/blend.md")
    rows = measured_rows(args, ("heap", "threshold", "seed"), jobs(), measured)
    write_block(args.into, "foreign", table(rows))


if __name__ == "__main__":
    main()

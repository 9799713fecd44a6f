"""Whether a threshold on the known score loses as many images of known classes as it says, after 1, 2 and 10 tasks.

    python experiments/known.py [--only STREAM[/ROW]] [--out results/known.json] [--into docs/calibration.md]
    python experiments/known.py --ageing  # how much references of earlier tasks should count, by training images kept apart
    python experiments/known.py --table   # only write the tables anew from what is stored

Rows that are stored already are not made again. Sets are looked for under `data/`, as `experiments/results.py` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stored import arguments, measured_rows, rows_of, write_block

from cairn.classifier.classifier import IncrementalClassifier
from cairn.classifier.novelty import Novelty
from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.schema import RunConfig
from cairn.storage.files import write_json
from cairn.storage.versions import versions
from cairn.training.encode import encode

THRESHOLD, AFTER = 0.05, (1, 2, 10)
STREAMS: dict[str, dict[str, Any]] = {
    "shapes": {"data": "shapes", "step": 4, "order": "natural"},
    "cifar100": {"data": "data/cifar100", "towers": "data/mini-clip", "step": 10, "order": "seed:1993"},
    "ucf101": {"data": "data/clip-vit-b32-features/ucf101.safetensors", "step": 10, "order": "seed:1993"},
}
ROWS = {"lda": {}, "spa": {}, "spa, local.score=plan": {"local.score": "plan"}, "dmc-ot": {}}
"""Methods and settings; patches want pictures, so the plan is left out on embeddings."""
SEEDS_OF = {"shapes": (1,), "cifar100": (1,), "ucf101": (1, 2, 3)}

AGEING_STREAMS: dict[str, dict[str, Any]] = {
    "ucf101": {"data": STREAMS["ucf101"]["data"], "step": 10, "order": "seed:1993"},
    "caltech51": {"data": "data/clip-vit-b32-features/caltech51.safetensors", "step": 5, "order": "seed:1993"},
    "shapes:dev": {"data": "shapes:dev", "step": 2, "order": "natural"},
}
AGEINGS, AGED_AFTER, SEEDS = (0, 1, 2, 4, 8), (5, 10), (1, 2, 3)


def aged(stream: str, seed: int) -> list[dict[str, Any]]:
    """Share of training images kept apart that fall below the threshold, by the exponent of a reference's weight."""
    how = AGEING_STREAMS[stream]
    dataset = open_dataset(how["data"])
    tasks = task_stream(dataset, step=how["step"], order=how["order"], validation=0.3)
    towers = towers_for(RunConfig(method="lda", data=how["data"]), dataset)
    learner, rows = IncrementalClassifier("lda", towers, templates=dataset.templates, seed=seed), []
    for task in tasks.tasks[: max(AGED_AFTER)]:
        images = [task.train[i] for i in range(len(task.train))]
        learner.partial_fit(images, [tasks.class_names[c] for c in task.train.labels], again=True)
        if task.index + 1 not in AGED_AFTER:
            continue
        method = learner.method_
        parts = [Loader(test, towers.prepare, towers.pixels) for test in tasks.tests[: task.index + 1]]
        x = torch.cat([encode(part, lambda pixels, _, method=method: method.embed(pixels))[0] for part in parts])
        scores = method.scores(x)
        lost = {
            str(p): float(np.mean(novelty.known(x, scores) < THRESHOLD))
            for p in AGEINGS
            for novelty in [Novelty(method, seed, learner.references_, learner.referenced_among_, ageing=p)]
        }
        rows.append({"stream": stream, "seed": seed, "tasks": task.index + 1, "images": len(x), "lost": lost,
                     "split": tasks.fingerprint, "towers": towers.fingerprint})  # fmt: skip
    return rows


def ageing_table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation over seeds, per cent."""
    lines = [
        f"| stream | tasks | images | {' | '.join(f'p = {p}' for p in AGEINGS)} |",
        "|---" * (3 + len(AGEINGS)) + "|",
    ]
    for stream in AGEING_STREAMS:
        for tasks in AGED_AFTER:
            own = [row for row in rows if (row["stream"], row["tasks"]) == (stream, tasks)]
            if own:
                cells = [[100 * row["lost"][str(p)] for row in own] for p in AGEINGS]
                shown = " | ".join(f"{np.mean(c):.1f} ± {np.std(c, ddof=1):.1f}" for c in cells)
                lines.append(f"| {stream} | {tasks} | {own[0]['images']} | {shown} |")
    return "\n".join(lines)


def measured(stream: str, row: str, seed: int) -> dict[str, Any]:
    how, method = STREAMS[stream], row.partition(",")[0]
    dataset = open_dataset(how["data"])
    tasks = task_stream(dataset, step=how["step"], order=how["order"])
    towers = towers_for(RunConfig(method=method, data=how["data"], towers=how.get("towers", "auto")), dataset)
    said = dataset.descriptions
    sentences = None if said is None else {n: list(d.sentences) for n, d in said.classes.items()}
    learner = IncrementalClassifier(
        method, towers, settings=ROWS[row], templates=dataset.templates, descriptions=sentences, seed=seed
    )
    lost: dict[str, float] = {}
    number: dict[str, int] = {}
    for task in tasks.tasks[: max(AFTER)]:
        images = [task.train[i] for i in range(len(task.train))]
        learner.partial_fit(images, [tasks.class_names[c] for c in task.train.labels], again=True)
        if task.index + 1 in AFTER:
            images = [test[i] for test in tasks.tests[: task.index + 1] for i in range(len(test))]
            known = learner.known_score(images)
            lost[str(task.index + 1)], number[str(task.index + 1)] = float(np.mean(known < THRESHOLD)), len(known)
    return {
        "stream": stream,
        "row": row,
        "seed": seed,
        "split": tasks.fingerprint,
        "towers": towers.fingerprint,
        "lost": lost,
        "images": number,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| stream | method | seed | after 1 task | after 2 | after 10 |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{100 * row['lost'][str(t)]:.1f} % of {row['images'][str(t)]}" for t in AFTER)
        lines.append(f"| {row['stream']} | {row['row']} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    flags = {"ageing": "measure the weight of earlier references"}
    args = arguments(__doc__, "results/known.json", "docs/calibration.md", **flags)
    ageing = args.out.with_name("known-ageing.json")
    if args.ageing:
        args.table = True
        found = [row for stream in AGEING_STREAMS for seed in SEEDS for row in aged(stream, seed)]
        write_json(ageing, {"rows": found, "versions": versions()})
    jobs = [(s, r, seed) for s in STREAMS for r in ROWS for seed in SEEDS_OF[s] if not (s == "ucf101" and "plan" in r)]
    write_block(args.into, "known", table(measured_rows(args, ("stream", "row", "seed"), jobs, measured)))
    if ageing.exists():
        write_block(args.into, "ageing", ageing_table(rows_of(ageing)))


if __name__ == "__main__":
    main()

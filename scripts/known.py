"""Whether a threshold on the known score loses as many images of known classes as it says, after 1, 2 and 10 tasks.

    python scripts/known.py [--only STREAM[/ROW]] [--out results/known.json] [--into docs/unknown.md]
    python scripts/known.py --table   # only write the table anew from what is stored

Rows that are stored already are not made again. Sets are looked for under `data/`, as `scripts/results.py` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from cairn.data.catalogue import open_dataset
from cairn.data.stream import task_stream
from cairn.files import write_json
from cairn.learner import IncrementalClassifier
from cairn.reports.tables import replaced_block
from cairn.run import RunConfig, towers_for
from cairn.versions import versions

THRESHOLD, AFTER = 0.05, (1, 2, 10)
STREAMS: dict[str, dict[str, Any]] = {
    "shapes": {"data": "shapes", "step": 4, "order": "natural"},
    "cifar100": {"data": "data/cifar100", "towers": "data/mini-clip", "step": 10, "order": "seed:1993"},
    "ucf101": {"data": "data/clip-vit-b32-features/ucf101.safetensors", "step": 10, "order": "seed:1993"},
}
ROWS = {"lda": {}, "spa": {}, "spa, local.score=plan": {"local.score": "plan"}, "dmc-ot": {}}
"""Methods and settings; patches want pictures, so the plan is left out on embeddings."""


def measured(stream: str, row: str, seed: int = 1) -> dict[str, Any]:
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
        "stream": stream, "row": row, "seed": seed, "split": tasks.fingerprint, "towers": towers.fingerprint,
        "lost": lost, "images": number,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| stream | method | after 1 task | after 2 | after 10 |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{100 * row['lost'][str(t)]:.1f} % of {row['images'][str(t)]}" for t in AFTER)
        lines.append(f"| {row['stream']} | {row['row']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/row")
    parser.add_argument("--out", type=Path, default=Path("results/known.json"))
    parser.add_argument("--into", type=Path, default=Path("docs/unknown.md"))
    parser.add_argument("--table", action="store_true", help="write the table from what is stored")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    jobs = [(s, r) for s in STREAMS for r in ROWS if not (s == "ucf101" and "plan" in r)]
    for stream, row in [] if args.table else jobs:
        if (stream, row) in {(found["stream"], found["row"]) for found in rows}:
            continue
        if args.only in (None, stream, f"{stream}/{row}"):
            rows.append(measured(stream, row))
            rows.sort(key=lambda found: jobs.index((found["stream"], found["row"])))
            write_json(args.out, {"rows": rows, "versions": versions()})
            print(
                stream,
                row,
                rows and next(r["lost"] for r in rows if (r["stream"], r["row"]) == (stream, row)),
                flush=True,
            )
    page = args.into.read_text(encoding="utf-8")
    args.into.write_text(replaced_block(page, "known", table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Unknown classes: how well the known score tells them from known ones, beside the largest softmax probability.

    python experiments/unknown.py [--out results/unknown.json] [--into docs/calibration.md]

Of each stream the first half of the tasks is learned; the test images of all tasks are scored. AUROC of known against
unknown images, and the share of images below thresholds of the known score, over three seeds.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from stored import arguments, measured_rows, write_block

from cairn.classifier.classifier import IncrementalClassifier
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.metrics import mean_and_deviation
from cairn.experiment.schema import RunConfig

STREAMS = {
    "shapes:dev": {"data": "shapes:dev", "step": 5, "order": "natural"},
    "shapes": {"data": "shapes", "step": 5, "order": "natural"},
    "ucf101": {"data": "data/clip-vit-b32-features/ucf101.safetensors", "step": 10, "order": "seed:1993"},
    "caltech51": {"data": "data/clip-vit-b32-features/caltech51.safetensors", "step": 10, "order": "seed:1993"},
}
METHODS, SEEDS, THRESHOLDS = ("dmc-ot", "spa"), (1, 2, 3), (0.01, 0.05, 0.1)


def auroc(known: np.ndarray, score: np.ndarray) -> float:
    """Probability that a known image scores above an unknown one, ties counted half."""
    a, b = np.sort(score[~known]), score[known]
    return float((np.searchsorted(a, b) + np.searchsorted(a, b, side="right")).mean() / (2 * len(a)))


def measured(name: str, method: str, seed: int) -> dict[str, Any]:
    how = STREAMS[name]
    dataset = open_dataset(how["data"])
    stream = task_stream(dataset, step=how["step"], order=how["order"])
    towers = towers_for(RunConfig(method=method, data=how["data"]), dataset)
    said = dataset.descriptions
    sentences = None if said is None else {n: list(d.sentences) for n, d in said.classes.items()}
    learner = IncrementalClassifier(method, towers, templates=dataset.templates, descriptions=sentences, seed=seed)
    half = len(stream.tasks) // 2
    for task in stream.tasks[:half]:
        images = [task.train[i] for i in range(len(task.train))]
        learner.partial_fit(images, [stream.class_names[c] for c in task.train.labels])
    images = [test[i] for test in stream.tests for i in range(len(test))]
    known = np.repeat(np.arange(len(stream.tests)) < half, [len(test) for test in stream.tests])
    score, softmax = learner.known_score(images), learner.predict_proba(images).max(1)
    return {
        "stream": name,
        "method": method,
        "seed": seed,
        "split": stream.fingerprint,
        "towers": towers.fingerprint,
        "known_classes": len(learner.classes_),
        "unknown_classes": len(stream.class_names) - len(learner.classes_),
        "auroc": auroc(known, score),
        "auroc_softmax": auroc(known, softmax),
        "known_below": {str(t): float((score[known] < t).mean()) for t in THRESHOLDS},
        "unknown_below": {str(t): float((score[~known] < t).mean()) for t in THRESHOLDS},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stream | method | AUROC, known score | AUROC, largest probability | known images below .01 / .05 / .1 "
        "| unknown images below |",
        "|---|---|---|---|---|---|",
    ]
    for stream in STREAMS:
        for method in METHODS:
            own = [row for row in rows if (row["stream"], row["method"]) == (stream, method)]
            if not own:
                continue

            def cell(values: list[float]) -> str:
                mean, deviation = mean_and_deviation(values)
                return f"{mean:.3f} ± {deviation:.3f}"

            def shares(key: str, own: list[dict[str, Any]] = own) -> str:
                return " / ".join(f"{np.mean([row[key][str(t)] for row in own]):.2f}" for t in THRESHOLDS)

            lines.append(
                f"| {stream} | {method} | {cell([r['auroc'] for r in own])} | {cell([r['auroc_softmax'] for r in own])} | "
                f"{shares('known_below')} | {shares('unknown_below')} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, "results/unknown.json", "docs/calibration.md")
    rows = measured_rows(args, ("stream", "method", "seed"), product(STREAMS, METHODS, SEEDS), measured)
    write_block(args.into, "unknown", table(rows))


if __name__ == "__main__":
    main()

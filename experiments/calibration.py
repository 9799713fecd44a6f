"""How true probabilities are: expected calibration error of every method, from runs on real photographs.

    python experiments/calibration.py [--only STREAM[/METHOD]] [--out results/calibration.json] [--into docs/calibration.md]
    python experiments/calibration.py --table   # only write the table anew from what is stored
    python experiments/calibration.py --forms [--out results/calibration-forms.json]   # how the temperature is fitted

Rows that are stored already are not made again. Sets are looked for under `data/`, as `experiments/results.py` does. `--forms`
compares ways to fit the temperature, on training images that are kept apart: no test image is read.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cairn.classifier.calibration import rehearsed
from cairn.data.catalogue import open_dataset
from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.experiment.metrics import calibration_error, mean_and_deviation
from cairn.experiment.run import run_stream, towers_for
from cairn.experiment.schema import RunConfig
from cairn.maths.calibration import best_temperature, log_probabilities, loss_curve
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import Method
from cairn.reports.tables import replaced_block
from cairn.storage.files import write_json
from cairn.storage.versions import versions
from cairn.towers.state import State
from cairn.training.checkpoint import Checkpoint
from cairn.training.encode import encode
from cairn.training.log import Log

STREAMS: dict[str, dict[str, Any]] = {
    "ucf101": {"data": "data/clip-vit-b32-features/ucf101.safetensors"},
    "caltech51": {"data": "data/clip-vit-b32-features/caltech51.safetensors"},
    "cifar100": {"data": "data/cifar100", "towers": "data/mini-clip"},
}
SEEDS = {"ucf101": (1, 2, 3), "caltech51": (1, 2, 3), "cifar100": (1,)}
SETTINGS = {
    ("cifar100", "aper"): ("schedule.epochs=5",),
    ("cifar100", "slca"): ("stage1.schedule.epochs=2",),
    ("cifar100", "dmc-ot"): ("stage2.text=residual",),
    ("cifar100", "spa"): ("descriptions=examples/cifar100-descriptions.json",),
    ("cifar100", "engine"): ("descriptions=examples/cifar100-descriptions.json",),
}
"""Where they differ from the defaults, as in the tables of accuracy."""

FORM_STREAMS = {
    "shapes:dev": {"data": "shapes:dev", "step": 4},
    "ucf101": {"data": STREAMS["ucf101"]["data"], "step": 10},
    "caltech51": {"data": STREAMS["caltech51"]["data"], "step": 10},
}
FORM_METHODS = ("lda", "simplecil", "acil")
FORMS = {f"p={p}, row={row}": (p, row) for p in (0, 1) for row in (0, 0.5)}
"""Losses of images scored among k of K classes weigh (k / K)^p, and `row` average rows are added that belong to the class
with the second largest score."""


def measured(stream: str, method: str, seed: int) -> dict[str, Any]:
    result = run_stream(
        RunConfig(
            method=method,
            step=10,
            order="seed:1993",
            seed=seed,
            settings=SETTINGS.get((stream, method), ()),
            **STREAMS[stream],
        )
    )
    return {
        "stream": stream,
        "method": method,
        "seed": seed,
        "split": result.split,
        "towers": result.towers.fingerprint,
        "settings": list(result.run.settings),
        "ece": result.ece,
        "nll": result.nll,
        "temperature": result.temperature,
        "seen_accuracy": result.seen_accuracy,
        "seconds": result.seconds,
    }


def forms_measured(stream: str, method: str) -> dict[str, Any]:
    """Expected calibration error on training images kept apart, mean over tasks, of every form of the fit."""
    how, entry = FORM_STREAMS[stream], METHODS[method]
    dataset = open_dataset(how["data"])
    tasks = task_stream(dataset, step=how["step"], order="seed:1993", validation=0.3)
    towers = towers_for(RunConfig(method=method, data=how["data"]), dataset)

    def built(state: State | None) -> Method:
        made = entry.build(towers, entry.default_config(towers), seed=1, log=Log())
        if state is not None:
            made.load_state_dict(state)
        return made

    learned, errors, lots, kept = built(None), {form: [] for form in FORMS}, [], []
    for task in tasks.tasks:
        state, checkpoint = learned.state_dict() if task.index else None, Checkpoint()
        learned.learn(task, checkpoint)
        found = rehearsed(learned, lambda state=state: built(state), task, 1, checkpoint)
        second = found.scores.topk(2, 1).indices[:, 1]
        lots.append((task.classes.stop, len(second), *(loss_curve(found.scores, y) for y in (found.labels, second))))
        apart = Loader(tasks.tests[task.index], towers.prepare, towers.pixels)
        kept.append(encode(apart, lambda pixels, _: learned.embed(pixels)))  # these encoders are frozen
        features, y = (torch.cat(column) for column in zip(*kept, strict=True))
        scores = learned.scores(features)
        right = (scores.argmax(1) == y).tolist()
        for form, (p, row) in FORMS.items():
            weights = [(k / task.classes.stop) ** p for k, *_ in lots]
            n, L, R = (sum(w * lot[i] for w, lot in zip(weights, lots, strict=True)) for i in (1, 2, 3))
            confidence = log_probabilities(scores, best_temperature(L + row * R / n)).exp().amax(1)
            errors[form].append(calibration_error(confidence.tolist(), right))
    return {
        "stream": stream,
        "method": method,
        "split": tasks.fingerprint,
        "towers": towers.fingerprint,
        "images": len(y),
        "ece": {form: sum(found) / len(found) for form, found in errors.items()},
    }


def forms_table(rows: list[dict[str, Any]]) -> str:
    head = [f"p = {p}, {'half a row' if row else 'no row'}" for p, row in FORMS.values()]
    lines = [f"| stream | method | {' | '.join(head)} |", f"|---|---|{'---|' * len(head)}"]
    for row in rows:
        cells = (f"{100 * row['ece'][form]:.2f}" for form in FORMS)
        lines.append(f"| {row['stream']} | {row['method']} | {' | '.join(cells)} |")
    means = (f"{100 * sum(row['ece'][form] for row in rows) / len(rows):.2f}" for form in FORMS)
    return "\n".join([*lines, f"| mean | | {' | '.join(means)} |"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stream | method | ECE, mean over tasks | largest | last | NLL, last | temperature, last | last accuracy % | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(values: list[float], digits: int) -> str:
        mean, deviation = mean_and_deviation(values)
        return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"

    for stream in STREAMS:
        for method in METHODS:
            own = [row for row in rows if (row["stream"], row["method"]) == (stream, method)]
            if not own:
                continue
            errors = [[100 * error for error in row["ece"]] for row in own]
            columns = (
                cell([sum(e) / len(e) for e in errors], 1),
                cell([max(e) for e in errors], 1),
                cell([e[-1] for e in errors], 1),
                cell([row["nll"][-1] for row in own], 3),
                cell([row["temperature"][-1] for row in own], 2),
                cell([100 * row["seen_accuracy"][-1] for row in own], 1),
                ", ".join(str(row["seed"]) for row in own),
            )
            lines.append(f"| {stream} | {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def compare_forms(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    done = {(row["stream"], row["method"]) for row in rows}
    for stream, method in product(FORM_STREAMS, FORM_METHODS):
        if not args.table and (stream, method) not in done and args.only in (None, stream, f"{stream}/{method}"):
            rows.append(forms_measured(stream, method))
            write_json(
                args.out, {"command": "python experiments/calibration.py --forms", "rows": rows, "versions": versions()}
            )
            print(stream, method, rows[-1]["ece"], flush=True)
    page = args.into.read_text(encoding="utf-8")
    args.into.write_text(replaced_block(page, "calibration-forms", forms_table(rows)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/method")
    parser.add_argument("--forms", action="store_true", help="compare ways to fit the temperature")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path, default=Path("docs/calibration.md"))
    parser.add_argument("--table", action="store_true", help="write the table from what is stored")
    args = parser.parse_args()
    args.out = args.out or Path("results") / ("calibration-forms.json" if args.forms else "calibration.json")
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    if args.forms:
        compare_forms(rows, args)
        return
    done = {(row["stream"], row["method"], row["seed"]) for row in rows}
    jobs = [(stream, method, seed) for stream in STREAMS for method in METHODS for seed in SEEDS[stream]]
    for stream, method, seed in [] if args.table else jobs:
        if (stream, method, seed) in done or args.only not in (None, stream, f"{stream}/{method}"):
            continue
        if method == "zero-shot" and stream == "ucf101":  # the file has no class texts
            continue
        rows.append(measured(stream, method, seed))
        write_json(args.out, {"rows": rows, "versions": versions()})
        print(stream, method, seed, [round(100 * error, 1) for error in rows[-1]["ece"]], flush=True)
    page = args.into.read_text(encoding="utf-8")
    args.into.write_text(replaced_block(page, "calibration", table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

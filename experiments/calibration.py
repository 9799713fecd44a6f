"""How true probabilities are: expected calibration error of every method, from runs on real photographs.

    python experiments/calibration.py [--only STREAM[/METHOD]] [--out results/calibration.json] [--into docs/calibration.md]
    python experiments/calibration.py --table   # only write the table anew from what is stored
    python experiments/calibration.py --forms   # how the temperature is fitted: results/calibration-forms.json

Rows that are stored already are not made again. Sets are looked for under `data/`, as `experiments/results.py` does. `--forms`
compares ways to fit the temperature, on training images that are kept apart: no test image is read.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from stored import arguments, measured_rows, write_block

from cairn.classifier.calibration import AGEING, POWER, rehearsed
from cairn.config import texts
from cairn.data.feature_store import FeatureStore
from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.metrics import mean_and_deviation
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.maths.calibration import best_temperature, least_loss, log_probabilities, loss_curve
from cairn.maths.calibration_error import calibration_error
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import Method
from cairn.towers.cached import kept
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.training.seeds import Seeds
from cairn.types import Scores, State

STREAMS: dict[str, dict[str, Any]] = {
    "ucf101": {"data": "data/clip-vit-b32-features/ucf101.safetensors"},
    "caltech51": {"data": "data/clip-vit-b32-features/caltech51.safetensors"},
    "cifar100": {"data": "data/cifar100", "towers": "data/mini-clip"},
    "shapes": {"data": "shapes", "step": 5, "order": "natural"},
    "imagenet150": {"data": "data/clip-vit-b32-features/imagenet150.safetensors"},
}
METHODS_OF = {"shapes": ("blend",), "imagenet150": ("blend",)}
"""Streams that only these methods are measured on."""

SEEDS = (1, 2, 3)
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
    "ucf101": {**STREAMS["ucf101"], "step": 10},
    "caltech51": {**STREAMS["caltech51"], "step": 10},
    "cifar100": {**STREAMS["cifar100"], "step": 10},
}
FORM_METHODS, FORM_SEEDS = ("lda", "simplecil", "acil"), (1, 2, 3)
QS, PS = (0.0, 0.25, 0.5, 0.75), (0, 1, 2, 4)
FORMS = {f"q={q}, p={p}": (q, p) for q in QS for p in PS}
"""q of `cairn.maths.calibration`; losses of images scored among k of K classes weigh (k / K)^p."""


def measured(stream: str, method: str, seed: int) -> dict[str, Any]:
    result = run_stream(
        RunConfig(
            method=method,
            seed=seed,
            settings=SETTINGS.get((stream, method), ()),
            **{"step": 10, "order": "seed:1993", **STREAMS[stream]},
        ),
        store=FeatureStore.configured(),
    )
    return {
        "stream": stream,
        "method": method,
        "seed": seed,
        "split": result.split,
        "towers": result.towers.fingerprint,
        "settings": texts(result.run.settings),
        "ece": result.ece,
        "ece_by_chance": result.ece_by_chance,
        "nll": result.nll,
        "temperature": result.temperature,
        "seen_accuracy": result.seen_accuracy,
        "seconds": result.seconds,
    }


def forms_measured(stream: str, method: str, seed: int) -> dict[str, Any]:
    """Expected calibration error on training images kept apart, mean over tasks: of every form of the fit, and of the best
    temperature between half and twice that of the fit, which only those images tell."""
    how, entry = dict(FORM_STREAMS[stream]), METHODS[method]
    step = how.pop("step")
    dataset = open_dataset(how["data"])
    tasks = task_stream(dataset, step=step, order="seed:1993", validation=0.3)
    towers = towers_for(RunConfig(method=method, **how), dataset)
    fingerprint = towers.fingerprint
    if towers.has_images:  # these encoders are frozen
        tasks, towers = kept(tasks, towers, FeatureStore.configured())

    def built(state: State | None) -> Method:
        made = entry.build(towers, entry.default_config(towers), seed=seed)
        if state is not None:
            made.load_state_dict(state)
        return made

    learned, apart, lots = built(None), [], {q: [] for q in QS}
    errors, least = {form: [] for form in FORMS}, {0.0: [], POWER: []}
    for task in tasks.tasks:
        state, checkpoint, K = learned.state_dict() if task.index else None, Checkpoint(), task.classes.stop
        learned.learn(task, ctx := Context(Seeds(seed), checkpoint=checkpoint))
        found = rehearsed(lambda state=state: built(state), task, ctx)
        loader = Loader(tasks.tests[task.index], towers.prepare, towers.pixels)
        apart.append(encode(loader, lambda pixels, _: learned.embed(pixels)))
        features, y = (torch.cat(column) for column in zip(*apart, strict=True))
        scores = learned.scores(features)
        right = (scores.argmax(1) == y).tolist()

        def error(temperature: float, q: float, scores: Scores = scores, right: list[bool] = right) -> float:
            confidence = log_probabilities(scores, temperature, q).exp().amax(1)
            return calibration_error(confidence.tolist(), right)

        for q in QS:
            lots[q].append((K, len(found.labels), loss_curve(found.scores, found.labels, q)))
        for form, (q, p) in FORMS.items():
            n, loss = sum(n for _, n, _ in lots[q]), sum((k / K) ** p * L for k, _, L in lots[q])
            temperature = best_temperature(loss, least_loss(n))
            errors[form].append(error(temperature, q))
            if p == AGEING and q in least:
                least[q].append(min(error(temperature * 2**step, q) for step in torch.linspace(-1, 1, 21).tolist()))
    return {
        "stream": stream,
        "method": method,
        "seed": seed,
        "split": tasks.fingerprint,
        "towers": fingerprint,
        "images": len(y),
        "ece": {form: sum(found) / len(found) for form, found in errors.items()},
        "least": {str(q): sum(found) / len(found) for q, found in least.items()},
    }


def forms_table(rows: list[dict[str, Any]]) -> str:
    """Of all rows the mean; then of every stream and method, with the p that `cairn` takes, the means over seeds."""

    def cell(values: list[float]) -> str:
        return f"{100 * sum(values) / len(values):.2f}"

    lines = ["| mean of all | " + " | ".join(f"p = {p}" for p in PS) + " |", "|---" * (1 + len(PS)) + "|"]
    for q in QS:
        cells = (cell([row["ece"][f"q={q}, p={p}"] for row in rows]) for p in PS)
        lines.append(f"| q = {q:g} | {' | '.join(cells)} |")
    head = [f"q = {q:g}" for q in QS] + ["best T, q = 0", f"best T, q = {POWER:g}"]
    lines += ["", f"| stream | method | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    for stream, method in product(FORM_STREAMS, FORM_METHODS):
        own = [row for row in rows if (row["stream"], row["method"]) == (stream, method)]
        if own:
            cells = [cell([row["ece"][f"q={q}, p={AGEING}"] for row in own]) for q in QS]
            cells += [cell([row["least"][str(q)] for row in own]) for q in (0.0, POWER)]
            lines.append(f"| {stream} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stream | method | ECE, mean over tasks | by chance | largest | last | by chance | NLL, last | temperature, last "
        "| last accuracy % | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
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
            chance = [[100 * error for error in row["ece_by_chance"]] for row in own if "ece_by_chance" in row]
            columns = (
                cell([sum(e) / len(e) for e in errors], 1),
                cell([sum(e) / len(e) for e in chance], 1) if chance else "-",
                cell([max(e) for e in errors], 1),
                cell([e[-1] for e in errors], 1),
                cell([e[-1] for e in chance], 1) if chance else "-",
                cell([row["nll"][-1] for row in own], 3),
                cell([row["temperature"][-1] for row in own], 2),
                cell([100 * row["seen_accuracy"][-1] for row in own], 1),
                ", ".join(str(row["seed"]) for row in own),
            )
            lines.append(f"| {stream} | {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    flags = {"forms": "compare ways to fit the temperature"}
    args = arguments(__doc__, "results/calibration.json", "docs/calibration.md", **flags)
    keys = ("stream", "method", "seed")
    if args.forms:
        args.out = args.out.with_name("calibration-forms.json")
        jobs = product(FORM_STREAMS, FORM_METHODS, FORM_SEEDS)
        about = {"command": "python experiments/calibration.py --forms"}
        write_block(
            args.into, "calibration-forms", forms_table(measured_rows(args, keys, jobs, forms_measured, **about))
        )
        return
    jobs = (
        (stream, method, seed)
        for stream in STREAMS
        for method in METHODS_OF.get(stream, METHODS)
        for seed in SEEDS
        if (stream, method) != ("ucf101", "zero-shot")  # the file has no class texts
    )
    write_block(args.into, "calibration", table(measured_rows(args, keys, jobs, measured)))


if __name__ == "__main__":
    main()

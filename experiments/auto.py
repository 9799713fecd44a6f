"""`method="auto"` against every single method: what it takes after the first task of each stream, and how far that is from the best.

    python experiments/auto.py [--only STREAM] [--out results/auto.json] [--into docs/choose-a-method.md]
    python experiments/auto.py --table    # only write the table anew from what is stored

The choice sees training images of the first task alone. What the method that was taken reaches, and what all others do, is stored
by `experiments/results.py`. Rows that are stored already are not made again; sets are looked for under `data/`, as there.
"""

from __future__ import annotations

from typing import Any

from stored import arguments, mean_cell, measured_rows, write_block
from streams import ROOT, STREAMS

from cairn.classifier.calibration import keep_left_out
from cairn.classifier.choice import FIRST, Choice, choice, comparable
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.folder import RESULT
from cairn.experiment.inputs import towers_for
from cairn.experiment.metrics import mean_and_deviation
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.storage.files import read_json
from cairn.training.context import Context
from cairn.training.seeds import Seeds

CHOSEN_ON = (
    "shapes",
    "cifar100",
    "cifar100-50",
    "ucf101",
    "caltech51",
    *(f"caltech51-{n}" for n in (1, 2, 4, 8)),
    "imagenet150",
)
SEEDS = (1, 2, 3)


def measured(stream: str, seed: int) -> dict[str, Any]:
    words = STREAMS[stream]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    limit = flags.get("--limit-train")
    config = RunConfig(
        method=FIRST,
        data=flags["--data"],
        towers=flags.get("--towers", "auto"),
        step=int(flags.get("--step", RunConfig.model_fields["step"].default)),
        order=flags.get("--order", "natural"),
        seed=seed,
        limit_train=None if limit is None else int(limit),
    )
    dataset = open_dataset(config.data)
    tasks = task_stream(dataset, step=config.step, order=config.order, limit_train=config.limit_train)
    towers, task, ctx = towers_for(config, dataset), tasks.tasks[0], Context(Seeds(seed))
    first = METHODS[FIRST].build(towers, METHODS[FIRST].default_config(towers), seed=seed)
    keep_left_out(task, ctx, every=True)
    first.learn(task, ctx)
    found = choice(first, task, ctx) if comparable(task) else Choice(FIRST)
    return {
        "stream": stream,
        "seed": seed,
        "split": tasks.fingerprint,
        "towers": towers.fingerprint,
        "method": found.method,
        "compared": [one._asdict() for one in found.compared],
    }


def reached(stream: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Average and last accuracy of every single method with its default settings, by seed. `joint` and what else keeps exemplars is
    no single method to take."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for folder in sorted((ROOT / "results" / stream).iterdir()):
        for path in sorted(folder.glob(f"seed-*/{RESULT}")):
            result = read_json(path)
            if folder.name == result["method"] and result["exemplar_free"]:
                found.setdefault(folder.name, {})[result["seed"]] = (100 * result["average"], 100 * result["last"])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stream | taken, by seed | average % | last % | best other by average | average % | last % | average, difference |",
        "|---|---|---|---|---|---|---|---|",
    ]

    for stream in CHOSEN_ON:
        own = {row["seed"]: row["method"] for row in rows if row["stream"] == stream}
        results = reached(stream)
        if not own or any(seed not in results.get(method, {}) for seed, method in own.items()):
            continue
        auto = [results[method][seed] for seed, method in own.items()]
        others = {
            name: list(found.values()) for name, found in results.items() if name not in own.values() and len(found) > 2
        }
        best = max(others, key=lambda name: mean_and_deviation([a for a, _ in others[name]])[0])
        average, rival = ([a for a, _ in found] for found in (auto, others[best]))
        difference = mean_and_deviation(average)[0] - mean_and_deviation(rival)[0]
        lines.append(
            f"| {stream} | {', '.join(own.values())} | {mean_cell(average)} | {mean_cell([b for _, b in auto])} | {best} | "
            f"{mean_cell(rival)} | "
            f"{mean_cell([b for _, b in others[best]])} | {difference:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, "results/auto.json", "docs/choose-a-method.md")
    jobs = [(stream, seed) for stream in CHOSEN_ON for seed in SEEDS]
    write_block(args.into, "auto", table(measured_rows(args, ("stream", "seed"), jobs, measured)))


if __name__ == "__main__":
    main()

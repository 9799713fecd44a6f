"""How true probabilities are: expected calibration error of every method, from runs on real photographs.

    python scripts/calibration.py [--only STREAM[/METHOD]] [--out results/calibration.json] [--into docs/calibration.md]
    python scripts/calibration.py --table   # only write the table anew from what is stored

Rows that are stored already are not made again. Sets are looked for under `data/`, as `scripts/results.py` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cairn.evaluation.metrics import mean_and_deviation
from cairn.files import write_json
from cairn.methods.catalogue import METHODS
from cairn.reports.tables import replaced_block
from cairn.run import RunConfig, run_stream
from cairn.versions import versions

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


def measured(stream: str, method: str, seed: int) -> dict[str, Any]:
    result = run_stream(
        RunConfig(
            method=method, step=10, order="seed:1993", seed=seed, settings=SETTINGS.get((stream, method), ()),
            **STREAMS[stream],
        )
    )  # fmt: skip
    return {
        "stream": stream, "method": method, "seed": seed, "split": result.split, "towers": result.towers.fingerprint,
        "settings": list(result.run.settings), "ece": result.ece, "nll": result.nll,
        "temperature": result.temperature, "seen_accuracy": result.seen_accuracy, "seconds": result.seconds,
    }  # fmt: skip


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
                cell([sum(e) / len(e) for e in errors], 1), cell([max(e) for e in errors], 1),
                cell([e[-1] for e in errors], 1), cell([row["nll"][-1] for row in own], 3),
                cell([row["temperature"][-1] for row in own], 2),
                cell([100 * row["seen_accuracy"][-1] for row in own], 1), ", ".join(str(row["seed"]) for row in own),
            )  # fmt: skip
            lines.append(f"| {stream} | {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/method")
    parser.add_argument("--out", type=Path, default=Path("results/calibration.json"))
    parser.add_argument("--into", type=Path, default=Path("docs/calibration.md"))
    parser.add_argument("--table", action="store_true", help="write the table from what is stored")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
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

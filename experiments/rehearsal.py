"""A rehearsal of `cairn reproduce` on data that is here: figures from our own stored results stand in for published ones.

    python experiments/rehearsal.py [--only STREAM] [--table]

Each stream is reproduced as it was measured, and then with one thing made wrong on purpose: activation, prompts, preprocessing,
weights, class order, split. What is told of each goes to `results/rehearsal.json` and into the table, pages to `runs/rehearsal`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored import Row, arguments, measured_rows, write_block
from streams import ROOT

from cairn.reports.formats import Column, Table
from cairn.reports.tables import results_below

METHODS = ("zero-shot", "simplecil", "lda", "blend")
"""Each needs one pass of the frozen tower."""

RIGHT = "nothing"


class Stream(NamedTuple):
    data: str
    towers: str
    base: int
    step: int
    order: str


STREAMS = {
    "cifar100": Stream("data/cifar100", "data/mini-clip", 0, 10, "seed:1993"),
    "shapes": Stream("shapes", "tiny", 0, 5, "natural"),
    "caltech51": Stream("data/clip-vit-b32-features/caltech51.safetensors", "features", 0, 10, "seed:1993"),
}

WRONG = {
    "cifar100": (RIGHT, "activation", "prompts", "preprocessing", "weights", "class order", "split"),
    "shapes": (RIGHT, "activation", "prompts", "class order"),
    "caltech51": (RIGHT, "class order", "split"),
}
"""What is made wrong: embeddings have no activation, prompts or preprocessing to be wrong."""


def figures(name: str, wrong: str, place: Path) -> Path:
    """A file of figures from the stored results of a stream; what a setting says of runs may be wrong."""
    stream = STREAMS[name]
    rows, sizes = [], None
    for method in METHODS:
        stored = results_below([ROOT / "results" / name / method])
        average, last = (100 * sum(one[key] for one in stored) / len(stored) for key in ("average", "last"))
        rows.append([name, stream.base, stream.step, method, round(average, 2), round(last, 2)])
        sizes = sum(stored[0]["test_sizes"]), len(stored[0]["class_order"])
    assert sizes is not None
    order = stream.order if wrong != "class order" else ("natural" if stream.order != "natural" else "seed:1993")
    lines = ["[settings.here]", 'title = "our stored results"', f"towers = {json.dumps([towers(name, wrong, place)])}"]
    lines += [f"order = {json.dumps(order)}"]
    if wrong == "prompts":
        lines.append('template = "{}"')
    lines += [
        "",
        "[[data]]",
        f"key = {json.dumps(name)}",
        f"test = {sizes[0]}",
        f"classes = {sizes[1]}",
        "",
        "[[source]]",
    ]
    lines += ['name = "cairn"', f'cite = "results/{name}"', 'setting = "here"', f"figures = {json.dumps(rows)}"]
    place.mkdir(parents=True, exist_ok=True)
    file = place / "figures.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def towers(name: str, wrong: str, place: Path) -> str:
    """The stream's towers, or a copy that says otherwise of itself."""
    right = STREAMS[name].towers
    if wrong not in ("activation", "preprocessing", "weights"):
        return right
    source = ROOT / right if right != "tiny" else ROOT / "cairn" / "towers" / "tiny"
    copy = place / "towers"
    if not copy.exists():
        shutil.copytree(source, copy)
        if wrong == "activation":
            config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
            for part in ("vision_config", "text_config"):
                config[part]["hidden_act"] = (
                    "gelu" if config[part].get("hidden_act", "quick_gelu") == "quick_gelu" else "quick_gelu"
                )
            (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if wrong == "preprocessing":
            file = copy / "preprocessor_config.json"
            read = json.loads(file.read_text(encoding="utf-8")) | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            file.write_text(json.dumps(read), encoding="utf-8")
        if wrong == "weights":
            _disturb(copy)
    return str(copy)


def data(name: str, wrong: str, place: Path) -> str:
    """The stream's data, or a copy with other test images: a tenth of them is missing."""
    right = STREAMS[name].data
    if wrong != "split":
        return right
    copy = place / Path(right).name
    if copy.suffix == ".safetensors":
        with safe_open(ROOT / right, "pt") as file:
            metadata, found = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kept = torch.arange(len(found["test_labels"])) % 10 != 0
        save_file(
            {key: value[kept] if key.startswith("test_") else value for key, value in found.items()}, copy, metadata
        )
        return str(copy)
    shutil.copytree(ROOT / right, copy)
    for number, file in enumerate(sorted((copy / "test").rglob("*.*"))):
        if number % 10 == 0:
            file.unlink()
    return str(copy)


def _disturb(folder: Path) -> None:
    """Weights of another training: the same with noise."""
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        draw = torch.Generator().manual_seed(0)
        for key, value in found.items():
            if value.is_floating_point() and value.ndim == 2:
                found[key] = value + 0.3 * value.float().std().to(value) * torch.randn(value.shape, generator=draw).to(
                    value
                )
        save_file(found, file, metadata={"format": "pt"})


def rehearsed(name: str, wrong: str) -> Row:
    place = ROOT / "runs" / "rehearsal" / name / wrong.replace(" ", "-")
    shutil.rmtree(place, ignore_errors=True)
    file = figures(name, wrong, place)
    words = [
        sys.executable,
        "-m",
        "cairn",
        "reproduce",
        data(name, wrong, place),
        "--towers",
        towers(name, wrong, place),
    ]
    words += ["--figures", str(file), "--out", str(place / "out"), "--seeds", "1,2,3", "--methods", ",".join(METHODS)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    report = json.loads((place / "out" / "reproduction.json").read_text(encoding="utf-8"))
    rows = {row["method"]: (row["averages"], row["lasts"]) for row in report["rows"]}
    return {
        "stream": name,
        "wrong": wrong,
        "stopped": done.returncode != 0,
        "told": report["findings"],
        "measured": rows,
    }


def table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        told = "; ".join(row["told"]) or "nothing"
        cells.append([row["stream"], row["wrong"], "yes" if row["stopped"] else "no", told])
    return Table([Column(title) for title in ("stream", "made wrong", "stopped", "what was told")], cells).markdown()


def main() -> None:
    args = arguments(__doc__, "results/rehearsal.json", "docs/reproduce.md")
    jobs = [(name, wrong) for name, wrongs in WRONG.items() for wrong in wrongs]
    rows = measured_rows(args, ("stream", "wrong"), jobs, rehearsed)
    write_block(args.into, "rehearsal", table(rows))


if __name__ == "__main__":
    main()

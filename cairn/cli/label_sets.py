"""What `cairn predict` and `cairn evaluate` print of pictures that may show several classes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from cairn.data.names import listed
from cairn.errors import ConfigError, counted, one_line, printable
from cairn.reports.console import Console
from cairn.reports.formats import csv_text

if TYPE_CHECKING:
    from cairn.classifier.label_set_evaluation import LabelSetEvaluation
    from cairn.classifier.predictions import Predictions

SHOWN = 12
"""Pictures on the page of an evaluation, those of which most is said wrongly."""


def require_meant(sets: bool, threshold: float | None, unknown_below: float = 0.0) -> None:
    """Raises ConfigError for an option that is for the other kind of learner."""
    if not sets and threshold is not None:
        raise ConfigError("--threshold: pictures of this learner show one class each; leave it out")
    if sets and unknown_below:
        raise ConfigError(
            "--unknown-below: pictures of this learner may show several classes, or none of them; give --threshold"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold}: must be a number from 0 to 1, such as 0.5")


def rows_of_sets(found: Predictions, files: list[Path], threshold: float | None) -> Iterator[dict[str, Any]]:
    for file, own, best in zip(files, found.sets(threshold), found.topk(1), strict=True):
        yield {
            "image": str(file),
            "labels": [{"name": name, "probability": p} for name, p in own],
            "likeliest": {"name": best[0][0], "probability": best[0][1]},
        }


def cells_of_sets(row: dict[str, Any]) -> list[list[str]]:
    """A line per label; of a picture without any one that is empty."""
    image = csv_text(one_line(row["image"]))
    cells = [[image, csv_text(one["name"]), f"{one['probability']:.6f}"] for one in row["labels"]]
    return cells or [[image, "", ""]]


def line_of_sets(row: dict[str, Any]) -> str:
    def shown(one: dict[str, Any]) -> str:
        return f"{one_line(one['name'])} {100 * one['probability']:.1f} %"

    none = f"no class (likeliest: {shown(row['likeliest'])})"
    return f"{one_line(row['image'])}: {', '.join(map(shown, row['labels'])) or none}"


def tell_sets(console: Console, found: LabelSetEvaluation, form: Literal["json", "csv", "text"]) -> None:
    if form == "json":
        typer.echo(printable(json.dumps(found.report(), indent=2, ensure_ascii=False)))
        return
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["class", "precision", "recall", "f1", "average_precision", "pictures", "threshold"])
        for one in found.by_class:
            figures = [f"{value:.6f}" for value in (one.precision, one.recall, one.f1)]
            average = "" if one.average_precision is None else f"{one.average_precision:.6f}"
            writer.writerow([csv_text(one_line(one.name)), *figures, average, one.support, f"{one.threshold:.6f}"])
        return
    console.table(
        None,
        ("class", "precision %", "recall %", "f1 %", "AP %", "pictures", "threshold"),
        [
            (
                one_line(one.name),
                *(f"{100 * value:.1f}" for value in (one.precision, one.recall, one.f1)),
                "-" if one.average_precision is None else f"{100 * one.average_precision:.1f}",
                str(one.support),
                f"{one.threshold:.2f}",
            )
            for one in found.by_class
        ],
    )
    for line in _lines(found):
        console.note(line)


def _lines(found: LabelSetEvaluation) -> Iterator[str]:
    groups = ""
    if (grouped := found.by_frequency) is not None:
        groups = " (" + ", ".join(f"{group} {100 * mean:.1f} %" for group, mean in grouped.means.items()) + ")"
    images = counted(len(found.targets), "picture")
    yield f"mAP {100 * found.mean_average_precision:.1f} %{groups} of {images}, every class counted the same"
    yield (
        f"F1 {100 * found.macro_f1:.1f} % over classes (macro), {100 * found.micro_f1:.1f} % over all decisions (micro); all classes "
        f"of a picture right and no other: {100 * found.exact:.1f} %"
    )
    yield (
        f"calibration error {100 * found.ece:.1f} points of all probabilities ({100 * found.ece_by_chance:.1f} by chance alone); "
        f"{found.said.sum(1).mean():.2f} classes said of a picture, {found.targets.sum(1).mean():.2f} shown"
    )
    if found.foreign:
        named = listed([f"'{one_line(name)}' ({number})" for name, number in found.foreign.items()], 5)
        yield f"labels that were not learned, passed over: {named}"


def write_page_of_sets(found: LabelSetEvaluation, path: Path, learner: str) -> None:
    from cairn.data.decoding import decoded
    from cairn.reports.evaluation import label_sets_page, thumbnail
    from cairn.storage.files import make_folder, write_chunks

    names = list(map(str, found.predictions.classes))
    wrong = (found.said != found.targets).sum(1)
    rows = [row for row in (-wrong).argsort(kind="stable").tolist() if wrong[row]][:SHOWN]
    pictures = [
        {
            "name": found.images[row],
            "picture": thumbnail(decoded(Path(str(found.images[row])))),
            "said": [
                {"name": name, "right": bool(found.targets[row, names.index(name)]), "probability": p}
                for name, p in found.predictions.sets(found.threshold)[row]
            ],
            "missing": [name for c, name in enumerate(names) if found.targets[row, c] and not found.said[row, c]],
        }
        for row in rows
    ]
    make_folder(path.parent)
    write_chunks(path, [label_sets_page(found.report(), pictures, learner).encode()])

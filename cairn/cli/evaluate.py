"""`cairn evaluate`: how a learner does on labelled pictures. Parse, call, print."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cairn.cli.classifier import AsJson, Device, Learner, Recursive, SkipBadImages, Weights
from cairn.cli.collector import importing
from cairn.cli.label_sets import require_meant, tell_sets, write_page_of_sets
from cairn.cli.run import checked_bad_image
from cairn.errors import ConfigError, counted, one_line, printable
from cairn.reports.console import Console
from cairn.reports.formats import csv_text

if TYPE_CHECKING:
    from cairn.classifier.evaluation import Evaluation
    from cairn.classifier.object_evaluation import ObjectEvaluation

SEGMENTED = 12
"""Pictures on the page with what is found in them, spread evenly."""

SHOWN = 5
"""Pairs that are printed, and shown on the page."""


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    learner: Learner,
    pictures: Annotated[
        Path,
        typer.Argument(
            help="a folder with a folder of pictures per class, a CSV file_name,label, or for several classes in a picture a CSV "
            "file_name,labels or COCO's JSON"
        ),
    ],
    recursive: Recursive = False,
    unknown_below: Annotated[
        float, typer.Option(help="the known score below which a picture counts as unknown")
    ] = 0.05,
    threshold: Annotated[
        float | None,
        typer.Option(help="of several classes in a picture: in place of the classes' own, a probability for all"),
    ] = None,
    topk: Annotated[int, typer.Option(help="a class among so many likeliest counts in the second accuracy")] = 5,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="the classes as CSV on standard output")] = False,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="a folder with a PNG for each picture, called as the picture is: what is not black is its object; for learners that "
            "tell where it is"
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="a page with the confusion matrix and pictures that are mixed up")
    ] = None,
    on_bad_image: SkipBadImages = "skip",
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Tell how well labelled pictures are classified. Per class and in all: precision, recall, calibration, unknown pictures,
    and which classes are mixed up."""
    with importing():
        from cairn.classifier.classifier import IncrementalClassifier
        from cairn.classifier.label_set_evaluation import LabelSetEvaluation
        from cairn.classifier.novelty import require_threshold
        from cairn.data.given_pictures import given_pictures

    if as_json and as_csv:
        raise ConfigError("--json and --csv: give only one of them")
    if topk < 1:
        raise ConfigError(f"--topk {topk}: must be at least 1")
    require_threshold(unknown_below, "--unknown-below")
    bad_images, console, errors = checked_bad_image(on_bad_image), Console(), Console(sys.stderr)
    given = given_pictures(pictures, "test", recursive)
    for notice in given.notices:
        errors.note(f"note: {notice}")
    with importing():
        held = IncrementalClassifier.load(learner, towers, device)
    require_meant(held.sets_ is not None, threshold)
    if masks is not None and given.sets is not None:
        raise ConfigError(
            "--masks: a mask says where one object is, and these pictures may show several classes; leave it out"
        )
    if given.sets is None:
        found = held.evaluate(given.files, given.names, unknown_below=unknown_below, on_bad_image=bad_images)
    else:
        found = held.evaluate(given.files, given.sets, threshold=threshold, on_bad_image=bad_images)
    for row, reason in found.predictions.unreadable.items():
        errors.note(f"cannot be read: {one_line(given.files[row])} ({reason})")
    if found.learned:
        errors.note(
            f"WARNING: learned by this learner: {found.learned} of {counted(len(found.predictions), 'picture')}; figures of these say "
            "nothing of new ones; evaluate pictures that were kept aside"
        )
    if isinstance(found, LabelSetEvaluation):
        if html is not None:
            write_page_of_sets(found, html, str(learner))
            errors.note(f"-> {html}")
        tell_sets(console, found, "json" if as_json else "csv" if as_csv else "text")
        return
    advice = held.advice(found.confused[:SHOWN])
    report, objects = found.report(topk, advice), None
    if masks is not None:
        with importing():
            from cairn.classifier.object_evaluation import ObjectEvaluation
        root = pictures if pictures.is_dir() else pictures.parent
        if outside := [file for file in given.files if not file.is_relative_to(root)]:
            raise ConfigError(
                f"--masks: picture '{one_line(outside[0])}' is not below '{one_line(root)}', so no mask is called as it; move it there"
            )
        places = [masks / file.relative_to(root).with_suffix(".png") for file in given.files]
        objects = ObjectEvaluation.of(held, found, given.files, places)
        report["objects"] = objects.report()
    if html is not None:
        _write_page(found, report, html, str(learner), objects)
        errors.note(f"-> {html}")
    if as_json:
        typer.echo(printable(json.dumps(report, indent=2, ensure_ascii=False)))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["class", "precision", "recall", "f1", "pictures"])
        for one in found.by_class:
            figures = [f"{value:.6f}" for value in (one.precision, one.recall, one.f1)]
            writer.writerow([csv_text(one_line(one.name)), *figures, one.support])
    else:
        _tell(console, found, report, topk, advice)


def _tell_objects(console: Console, told: dict[str, Any]) -> None:
    if told["mIoU"] is not None:
        images = counted(told["images"], "picture")
        console.note(
            f"where it is: mIoU {100 * told['mIoU']:.1f} %, background {100 * (told['background'] or 0):.1f} %, of {images}"
        )


def _tell(console: Console, found: Evaluation, report: dict[str, Any], topk: int, advice: list[str]) -> None:
    console.table(
        None,
        ("class", "precision %", "recall %", "f1 %", "pictures"),
        [
            (
                one_line(one.name),
                *(f"{100 * value:.1f}" for value in (one.precision, one.recall, one.f1)),
                str(one.support),
            )
            for one in found.by_class
        ],
    )
    images = counted(len(found.known), "picture")
    console.note(
        f"accuracy {100 * found.accuracy:.1f} % of {images}, mean over classes {100 * found.class_mean_accuracy:.1f} %, among the "
        f"{topk} likeliest {100 * report[f'top{topk}']:.1f} %"
    )
    console.note(
        f"calibration error {100 * found.ece:.1f} points ({100 * found.ece_by_chance:.1f} by chance alone on as many pictures), "
        f"negative log-likelihood {found.nll:.3f}"
    )
    lost = "-" if found.lost is None else f"{100 * found.lost:.1f} %"
    console.note(f"called unknown (known score below {found.unknown_below:g}): {lost} of known classes")
    if found.foreign:
        named = ", ".join(f"'{one_line(name)}' ({number})" for name, number in list(found.foreign.items())[:SHOWN])
        number = counted(sum(found.foreign.values()), "picture")
        console.note(
            f"of classes that were not learned: {number} of {counted(len(found.foreign), 'label')}, {named}; called unknown: "
            f"{100 * (found.found_unknown or 0):.1f} %"
        )
    if "objects" in report:
        _tell_objects(console, report["objects"])
    names = list(map(str, found.predictions.classes))
    for pair, said in zip(found.confused[:SHOWN], advice, strict=False):
        examples = ", ".join(one_line(found.images[row]) for row in found.examples(pair)[:2])
        console.note(
            f"mixed up: '{one_line(names[pair.a])}' and '{one_line(names[pair.b])}', {counted(int(pair.images), 'picture')} "
            f"({examples}); {said}"
        )


def _write_page(
    found: Evaluation, report: dict[str, Any], path: Path, learner: str, objects: ObjectEvaluation | None
) -> None:
    from cairn.data.decoding import decoded
    from cairn.reports.evaluation import evaluation_page, thumbnail
    from cairn.reports.masks import MaskedPicture
    from cairn.storage.files import make_folder, write_chunks

    shown = [row for pair in found.confused[:SHOWN] for row in found.examples(pair)]
    names = list(map(str, found.predictions.classes))
    pictures = {
        found.images[row]: (
            thumbnail(decoded(Path(found.images[row]))),
            names[found.labels[row]],
            names[found.predicted[row]],
        )
        for row in shown
    }
    segmented = []
    if objects is not None:
        for row in range(0, len(objects.files), max(1, len(objects.files) // SEGMENTED))[:SEGMENTED]:
            one = MaskedPicture(objects.images[row], objects.found[row], objects.classes, objects.truth[row])
            segmented.append({"name": str(objects.files[row]), **one.told()})
    make_folder(path.parent)
    write_chunks(path, [evaluation_page(report, pictures, learner, SHOWN, segmented).encode()])

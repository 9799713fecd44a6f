"""The commands for people with folders of pictures: learn, predict, inspect, forget, export. Parse, call, print."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cairn.cli.run import BadImages, checked_bad_image
from cairn.errors import ConfigError, DataError, Interrupted, counted, one_line, printable
from cairn.reports.console import Console
from cairn.reports.formats import csv_text

if TYPE_CHECKING:
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.classifier.predictions import Predictions
    from cairn.towers.protocol import Towers

METHOD, TOWERS = "blend", "openai/clip-vit-base-patch16"
Weights = Annotated[
    str | None, typer.Option("--towers", help="where the weights that it was learned on are now, if they moved")
]
Learner = Annotated[Path, typer.Argument(help="folder of the learner")]


def register(app: typer.Typer) -> None:
    for command in (learn, predict, inspect, forget, export):
        app.command()(command)


def learn(
    learner: Learner,
    pictures: Annotated[Path, typer.Argument(help="a folder with a folder of pictures per class")],
    method: Annotated[
        str | None, typer.Option(help=f"for a new learner: a method of `cairn list`  [default: {METHOD}]")
    ] = None,
    towers: Annotated[
        str | None,
        typer.Option(
            help="for a new learner: tiny, a hub id, a folder, or open_clip:<either>; for an old one: where they are now  "
            f"[default: {TOWERS}]"
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="for a new learner: a setting, key=value")] = None,
    template: Annotated[list[str] | None, typer.Option(help="for a new learner: a prompt, {} for the class")] = None,
    seed: Annotated[int | None, typer.Option(help="for a new learner  [default: 1]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
    again: Annotated[bool, typer.Option("--again", help="learn pictures that were learned already")] = False,
    on_bad_image: BadImages = "stop",
    checkpoint_seconds: Annotated[float, typer.Option(help="work that is lost at most if it is killed")] = 60.0,
) -> None:
    """Learn the classes of a folder of pictures. New names are new classes, of known ones more is learned. Makes the learner
    if there is none. Killed in the middle, the same call goes on."""
    from cairn.classifier.classifier import WORK, IncrementalClassifier
    from cairn.classifier.folder import NAME, require_savable
    from cairn.config import parsed
    from cairn.data.folders import class_folders
    from cairn.data.templates import DEFAULT, prompt_templates
    from cairn.experiment.folder import Lock
    from cairn.storage.archive import Archive
    from cairn.storage.files import make_folder
    from cairn.training.checkpoint import Checkpoint, stopped_by_signals
    from cairn.training.log import Log

    console, bad_images = Console(), checked_bad_image(on_bad_image)
    found = class_folders(pictures)
    items = [found.images.path(row) for row in range(len(found.images))]
    names = [found.classes[label] for label in found.images.labels]
    for notice in found.notices:
        console.note(f"note: {notice}")
    settings = parsed(set_ or ())
    templates = prompt_templates(template, "--template") if template else None
    made = not learner.exists()
    make_folder(learner)
    lock = Lock(
        learner
    ).take()  # before anything is read there: what another process learned meanwhile must not be lost
    try:
        if Archive(learner, NAME):
            held = IncrementalClassifier.load(learner, towers, device)
            _require_same(held, method, settings, templates, seed)
            notices, before, calls = held.notices_, len(held.classes_), len(held.history_)
        else:
            held = IncrementalClassifier(
                method or METHOD,
                towers or TOWERS,
                settings=dict(settings),
                templates=templates or DEFAULT,
                seed=1 if seed is None else seed,
                device=device,
            )
            require_savable(held.method)
            notices, before, calls = held.open_towers().notices, 0, 0
        if found.descriptions is not None:
            held.describe({name: list(said.sentences) for name, said in found.descriptions.classes.items()})
        for notice in notices:
            console.note(f"note: {notice}")
        work, checkpoint = Archive(learner, WORK), Checkpoint(checkpoint_seconds)
        with stopped_by_signals(checkpoint), console.live():
            log = Log(keep=console.event, show=console.progress)
            held.partial_fit(
                items, names, log=log, checkpoint=checkpoint, archive=work, again=again, on_bad_image=bad_images
            )
        if len(held.history_) == calls:
            console.note(
                f"{learner}: nothing new: {counted(len(items), 'picture')}, learned already (--again for once more)"
            )
            return
        held.save(learner)
        work.clear()
    finally:
        lock.release()
        if made:
            with suppress(OSError):  # nothing was learned, so nothing is left
                learner.rmdir()
    new = len(held.classes_) - before
    console.note(
        f"{learner}: {counted(held.history_[-1]['images'], 'picture')} learned, {counted(new, 'new class')}, "
        f"{len(held.classes_)} in all; {_bytes(held.method_.memory_bytes)} of statistics, no picture is stored"
    )


def _require_same(
    held: IncrementalClassifier,
    method: str | None,
    settings: Sequence[tuple[str, Any]],
    templates: tuple[str, ...] | None,
    seed: int | None,
) -> None:
    """Options for a new learner may be given again where it is there already; raises ConfigError for the first that differs."""
    from cairn.config import settings as every_setting
    from cairn.config import with_values

    config = held._settings()
    has = {path: value for path, value, _ in every_setting(config)}
    asked = {path: value for path, value, _ in every_setting(with_values(config, settings))}
    options = [
        ("--method", method, held.method),
        *((f"--set {path}", value, has.get(path)) for path, value in asked.items()),
        ("--template", templates, held.templates),
        ("--seed", seed, held.seed),
    ]
    for option, value, own in options:
        if value != own and (value is not None or option.startswith("--set")):
            raise ConfigError(
                f"{option}: {_shown(value)} is asked for, but the learner that is there was made with {_shown(own)}; leave it "
                "out, or make a learner in another folder"
            )


def _shown(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def predict(
    learner: Learner,
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    topk: Annotated[int, typer.Option(help="classes per image, the likeliest first")] = 1,
    unknown_below: Annotated[
        float, typer.Option(help="say 'unknown' where the known score is below this; 0: never")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output")] = False,
    on_bad_image: Annotated[
        str, typer.Option(help="images that cannot be read: skip them (and exit with 1), or stop before any answer")
    ] = "skip",
    explain: Annotated[Path | None, typer.Option(help="folder for a picture and JSON of reasons per image")] = None,
    towers: Weights = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "auto",
) -> None:
    """Tell the likeliest classes of images. Says also whether an image fits what is known."""
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.classifier.novelty import require_threshold

    if as_json and as_csv:
        raise ConfigError("--json and --csv: give only one of them")
    if topk < 1:
        raise ConfigError(f"--topk {topk}: must be at least 1")
    require_threshold(unknown_below, "--unknown-below")
    bad_images = checked_bad_image(on_bad_image)
    files, errors = _files(images), Console(sys.stderr)
    answered = explained = 0
    try:
        held = IncrementalClassifier.load(learner, towers, device)
        reasons = 0 if explain is None else max(topk, 3)
        found = held.predictions(files, known=True, reasons=reasons, on_bad_image=bad_images)
        bad = found.unreadable
        for row, reason in bad.items():
            errors.note(f"cannot be read: {one_line(files[row])} ({reason})")
        read = [file for row, file in enumerate(files) if row not in bad]
        rows = [
            {
                "image": str(file),
                "known": float(score),
                "unknown": bool(score < unknown_below),
                "classes": [{"name": name, "probability": p} for name, p in best],
            }
            for file, score, best in zip(read, found.known_scores(), found.topk(topk), strict=True)
        ]
        for _ in _printed(rows, "json" if as_json else "csv" if as_csv else "text", unknown_below):
            answered += 1
        for _ in () if explain is None else _explained(held.method_.towers, read, found, explain):
            explained += 1
    except KeyboardInterrupt:
        done = f"answered: {answered} of {counted(len(files), 'image')}"
        raise Interrupted(
            SIGINT, done if explain is None else f"{done}, explained in '{explain}': {explained}"
        ) from None
    if bad:
        errors.note(f"cannot be read: {len(bad)} of {counted(len(files), 'image')}; the others are answered")
        raise typer.Exit(1)


def _printed(
    rows: Sequence[dict[str, Any]], form: Literal["json", "csv", "text"], unknown_below: float
) -> Iterator[dict[str, Any]]:
    """Answers on standard output, handed out as they are there."""
    if form == "json":
        typer.echo(_json(rows))
        yield from rows
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        writer.writerow(["image", "known", "unknown", "rank", "class", "probability"])
    for row in rows:
        if form == "csv":
            known = [csv_text(one_line(row["image"])), f"{row['known']:.6f}", row["unknown"]]
            for rank, found in enumerate(row["classes"], 1):
                writer.writerow([*known, rank, csv_text(found["name"]), f"{found['probability']:.6f}"])
        else:
            typer.echo(_line(row, unknown_below))
        yield row


def _line(row: dict[str, Any], unknown_below: float) -> str:
    best = ", ".join(f"{one_line(found['name'])} {100 * found['probability']:.1f} %" for found in row["classes"])
    unsure = f"unknown (known score {row['known']:.3f}, below {unknown_below:g}); nearest: " if row["unknown"] else ""
    return f"{one_line(row['image'])}: {unsure}{best}"


def _json(value: Any) -> str:
    """JSON that is safe to print: letters as they are, what `one_line` escapes as JSON escapes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join(line if one_line(line) == line else _ascii_where_unseen(line) for line in text.split("\n"))


def _ascii_where_unseen(line: str) -> str:
    return "".join(sign if one_line(sign) == sign else json.dumps(sign)[1:-1] for sign in line)


def _files(images: list[Path]) -> list[Path]:
    """The files that are meant: those named, and the pictures below the folders named. What is passed over is noted."""
    from cairn.data.picture_files import passed_over, pictures_below

    found: list[Path] = []
    passed: dict[str, Any] = {}
    for path in images:
        if path.is_dir():
            inside, others = pictures_below(path)
            found += inside
            passed |= others
        else:
            found.append(path)
    for notice in passed_over(passed):
        Console(sys.stderr).note(f"note: {notice}")
    return found


def _explained(towers: Towers, files: list[Path], found: Predictions, folder: Path) -> Iterator[Path]:
    """A picture and a JSON per image, called after it. Files are handed out when theirs are there."""
    import numpy as np

    from cairn.data.folders import decoded
    from cairn.reports.patches import bar_figure, patch_figure
    from cairn.storage.files import make_folder, write_json

    make_folder(folder)
    taken: set[str] = set()
    for file, reasons in zip(files, found.told_reasons(), strict=True):
        name = file.stem if file.stem not in taken else f"{file.stem}-{len(taken)}"
        taken.add(name)
        seen = np.asarray(towers.prepare(decoded(file)).permute(1, 2, 0)) if towers.has_images else None
        if seen is not None and found.patch_grid is not None:
            patch_figure(seen, found.patch_grid, reasons, folder / f"{name}.png")
        elif seen is not None:
            bar_figure(seen, reasons, folder / f"{name}.png")
        grid = {} if found.patch_grid is None else {"grid": found.patch_grid}
        write_json(folder / f"{name}.json", {"image": str(file), **grid, "classes": reasons})
        yield file


def inspect(learner: Learner) -> None:
    """Show what a learner knows and what it keeps."""
    from cairn.classifier.card import card
    from cairn.classifier.folder import NAME
    from cairn.classifier.record import LearnerRecord
    from cairn.errors import ResultError
    from cairn.storage.archive import Archive
    from cairn.storage.schema import validated

    found = Archive(learner, NAME).read()
    if found is None:
        raise ResultError(f"'{learner}': no learner there; `cairn learn {learner} PICTURES` makes one")
    record = validated(LearnerRecord, found.record, f"'{learner}': record of the learner")
    for damaged in found.damaged:
        Console().note(f"WARNING: {damaged}; the one before it was taken")
    typer.echo(printable(card(record)))


def forget(
    learner: Learner,
    name: Annotated[str, typer.Argument(help="a class of `cairn inspect`")],
    towers: Weights = None,
) -> None:
    """Remove a class: its name, texts and statistics. What shared weights learned of it stays."""
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.experiment.folder import Lock

    if not learner.is_dir():
        raise DataError(f"'{learner}': no such folder")
    lock = Lock(learner).take()
    try:
        held = IncrementalClassifier.load(learner, towers)
        held.forget(name)
        held.save(learner)
    finally:
        lock.release()
    Console().note(f"{learner}: '{one_line(name)}' is forgotten; left: {counted(len(held.classes_), 'class')}")


def export(
    learner: Learner,
    onnx: Annotated[Path, typer.Option(help="the file to write")],
    towers: Weights = None,
) -> None:
    """Write image tower and class matrix as one ONNX file. It is checked against the learner before it is kept."""
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.classifier.onnx import export_onnx

    difference = export_onnx(IncrementalClassifier.load(learner, towers), onnx)
    Console().note(f"-> {onnx}: scores within {difference:.0e} of the learner's, relative to the largest")


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"

"""The commands for people with folders of pictures: learn, inspect, forget, export. Parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cairn.cli.collector import importing
from cairn.cli.run import BadImages, checked_bad_image
from cairn.errors import ConfigError, counted, one_line, printable
from cairn.reports.console import Console

if TYPE_CHECKING:
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.classifier.onnx import Form
    from cairn.classifier.record import LearnerRecord

METHOD, TOWERS = "auto", "openai/clip-vit-base-patch16"
Weights = Annotated[
    str | None, typer.Option("--towers", help="where the weights that it was learned on are now, if they moved")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]
Learner = Annotated[Path, typer.Argument(help="folder of the learner")]
AsJson = Annotated[bool, typer.Option("--json", help="the whole report as JSON on standard output")]
SkipBadImages = Annotated[str, typer.Option("--on-bad-image", help="images that cannot be read: skip them, or stop")]
Recursive = Annotated[
    bool, typer.Option("--recursive", help="pictures in folders inside a class's folder are taken too")
]


def register(app: typer.Typer) -> None:
    for command in (learn, inspect, forget, export):
        app.command()(command)


def learn(
    learner: Learner,
    pictures: Annotated[
        Path,
        typer.Argument(
            help="a folder with a folder of pictures per class, a CSV file_name,label, or for several classes in a picture a CSV "
            "file_name,labels or COCO's JSON"
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="for a new learner: a method of `cairn list`, or auto: blend, unless pictures left out tell of a better one  "
            f"[default: {METHOD}]"
        ),
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
    device: Device = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="for a new learner: float32, bfloat16, or auto, the faster of them here  [default: float32]"),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            help="for a new learner: JPEGs whole, or reduced: at a fraction, no less than twice the tower's side  "
            "[default: whole]"
        ),
    ] = None,
    recursive: Recursive = False,
    unlabelled: Annotated[
        Path | None,
        typer.Option(help="a folder of pictures of the same classes without labels, learned from as well"),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="learn pictures that were learned already")] = False,
    on_bad_image: BadImages = "stop",
    checkpoint_seconds: Annotated[float, typer.Option(help="work that is lost at most if it is killed")] = 60.0,
    keep: Annotated[
        int | None,
        typer.Option(
            help="states that stay from now on, this one and those that `cairn undo` goes back to  [default: 3]"
        ),
    ] = None,
) -> None:
    """Learn the classes of a folder of pictures. New names are new classes, of known ones more is learned. Makes the learner
    if there is none. Killed in the middle, the same call goes on."""
    with importing():
        from cairn.classifier.classifier import WORK, IncrementalClassifier
        from cairn.classifier.folder import NAME, require_savable
        from cairn.classifier.intake import clear_what_is_done
        from cairn.config import parsed
        from cairn.data.folders import loose_files
        from cairn.data.given_pictures import given_pictures
        from cairn.data.templates import DEFAULT, prompt_templates
        from cairn.experiment.folder import Lock
        from cairn.storage.archive import Archive
        from cairn.storage.files import make_folder
        from cairn.training.checkpoint import stopped_by_signals
        from cairn.training.context import Checkpoint, Log

    console, bad_images = Console(), checked_bad_image(on_bad_image)
    if keep is not None and keep < 1:
        raise ConfigError(f"--keep {keep}: must be at least 1, the state that is made")
    found = given_pictures(pictures, recursive=recursive)
    items, labels = found.files, found.names if found.sets is None else found.sets
    loose, passed = ([], ()) if unlabelled is None else loose_files(unlabelled)
    for notice in (*found.notices, *passed):
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
            with importing():
                held = IncrementalClassifier.load(learner, towers, device)
            _require_same(held, method, settings, templates, seed, precision, decode)
            notices, before, calls = held.notices_, len(held.classes_), len(held.history_)
        else:
            held = IncrementalClassifier(
                method or METHOD,
                towers or TOWERS,
                settings=dict(settings),
                templates=templates or DEFAULT,
                seed=1 if seed is None else seed,
                device=device,
                precision=precision or "float32",
                decode=cast("Any", decode or "whole"),  # checked with the towers
            )
            if held.method != METHOD:
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
                items,
                labels,
                unlabelled=loose,
                log=log,
                checkpoint=checkpoint,
                archive=work,
                again=again,
                on_bad_image=bad_images,
            )
        if len(held.history_) == calls:
            console.note(
                f"{learner}: nothing new: {counted(len(items), 'picture')}, learned already (--again for once more)"
            )
            clear_what_is_done(work, calls)
            return
        held.save(learner, keep)
        work.clear()
    finally:
        lock.release()
        if made:
            with suppress(OSError):  # nothing was learned, so nothing is left
                learner.rmdir()
    new, done = len(held.classes_) - before, held.history_[-1]
    beside = f" and {done['unlabelled']:,} without label beside" if done.get("unlabelled") else ""
    console.note(
        f"{learner}: {counted(done['images'], 'picture')} learned{beside}, {counted(new, 'new class')}, "
        f"{len(held.classes_)} in all; {_bytes(held.method_.memory_bytes)} of statistics, no picture is stored"
    )
    for line in _accuracy(held):
        console.note(line)


def _accuracy(held: IncrementalClassifier) -> list[str]:
    """How good the learner is, as far as pictures left out tell, and what to do about it."""
    from cairn.classifier.advice import accuracy_lines, pair_line
    from cairn.classifier.label_sets import told

    if held.sets_ is not None:
        return [told(held.sets_)]
    estimate, names = held.estimate_, list(map(str, held.classes_))
    lines = accuracy_lines(estimate, names, held.counts_.tolist())
    if worst := estimate.confused[:1]:
        lines.append(f"mixed up most: {pair_line(worst[0], names, estimate.images.tolist())}; {held.advice(worst)[0]}")
    return lines


def _require_same(
    held: IncrementalClassifier,
    method: str | None,
    settings: Sequence[tuple[str, Any]],
    templates: tuple[str, ...] | None,
    seed: int | None,
    precision: str | None,
    decode: str | None,
) -> None:
    """Options for a new learner may be given again where it is there already; raises ConfigError for the first that differs."""
    from cairn.config import settings as every_setting
    from cairn.config import with_values

    config = held._settings()
    has = {path: value for path, value, _ in every_setting(config)}
    asked = {path: value for path, value, _ in every_setting(with_values(config, settings))}
    options = [
        ("--method", None if method == METHOD else method, held.chosen_),
        *((f"--set {path}", value, has.get(path)) for path, value in asked.items()),
        ("--template", templates, held.templates),
        ("--seed", seed, held.seed),
        ("--precision", None if precision == "auto" else precision, held.precision),
        ("--decode", decode, held.decode),
    ]
    for option, value, own in options:
        if value != own and (value is not None or option.startswith("--set")):
            raise ConfigError(
                f"{option}: {_shown(value)} is asked for, but the learner that is there was made with {_shown(own)}; leave it "
                "out, or make a learner in another folder"
            )


def _shown(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def record_in(learner: Path) -> LearnerRecord:
    """The record of a learner; that a newer one is damaged is told."""
    from cairn.classifier.folder import read_record

    record, damaged = read_record(learner)
    for told in damaged:
        Console().note(f"WARNING: {told}; the one before it was taken")
    return record


def inspect(learner: Learner) -> None:
    """Show what a learner knows and what it keeps."""
    from cairn.classifier.card import card

    typer.echo(printable(card(record_in(learner))))


def forget(
    learner: Learner,
    name: Annotated[str, typer.Argument(help="a class of `cairn inspect`")],
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Remove a class: its name, texts and statistics. What shared weights learned of it stays."""
    with importing():
        from cairn.classifier.classifier import IncrementalClassifier
        from cairn.classifier.folder import no_learner
        from cairn.experiment.folder import Lock

    if not learner.is_dir():
        raise no_learner(learner)
    lock = Lock(learner).take()
    try:
        with importing():
            held = IncrementalClassifier.load(learner, towers, device)
        held.forget(name)
        held.save(learner)
    finally:
        lock.release()
    Console().note(f"{learner}: '{one_line(name)}' is forgotten; left: {counted(len(held.classes_), 'class')}")


def export(
    learner: Learner,
    onnx: Annotated[Path, typer.Option(help="the file to write")],
    form: Annotated[str, typer.Option(help="the image tower in float32, float16 or int8")] = "float32",
    from_images: Annotated[
        bool, typer.Option("--from-images", help="the file takes uint8 images of any size: preprocessing is in it")
    ] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="a folder of pictures on which the file is compared with the learner")
    ] = None,
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Write a learner as one ONNX file. It gives scores and probabilities of pictures, and is compared with the learner
    before it is kept."""
    with importing():
        from cairn.classifier.classifier import IncrementalClassifier
        from cairn.classifier.onnx import FORMS, export_onnx
        from cairn.data.picture_files import pictures_below

    if form not in FORMS:
        raise ConfigError(f"--form {form}: must be {', '.join(FORMS)}")
    images = None if pictures is None else pictures_below(pictures)[0]
    made = export_onnx(
        IncrementalClassifier.load(learner, towers, device),
        onnx,
        form=cast("Form", form),
        images=images,
        preprocessing=from_images,
    )
    Console().note(
        f"-> {onnx}: {_bytes(made.bytes)}; on {counted(made.images, 'picture' if images else 'random image')} the same class for "
        f"{100 * made.agreement:.1f} %, probabilities within {100 * made.probability:.2g} points, scores within "
        f"{made.difference:.0e} of the largest"
    )


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"

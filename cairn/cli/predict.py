"""`cairn predict`: answers for pictures, row by row as they are there. Parse, call, print."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from signal import SIGINT
from textwrap import indent
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cairn.cli.classifier import Device, Learner, Weights
from cairn.cli.collector import importing
from cairn.cli.label_sets import cells_of_sets, line_of_sets, require_meant, rows_of_sets
from cairn.cli.run import checked_bad_image
from cairn.errors import ConfigError, Interrupted, counted, one_line
from cairn.reports.console import Console
from cairn.reports.formats import csv_text

if TYPE_CHECKING:
    from cairn.classifier.predictions import Predictions
    from cairn.towers.protocol import Towers


def register(app: typer.Typer) -> None:
    app.command()(predict)


Form = Literal["json", "jsonl", "csv", "text"]


def predict(
    learner: Learner,
    images: Annotated[
        list[Path] | None, typer.Argument(help="image files, or folders of them", show_default=False)
    ] = None,
    topk: Annotated[int, typer.Option(help="classes per image, the likeliest first")] = 1,
    unknown_below: Annotated[
        float, typer.Option(help="say 'unknown' where the known score is below this; 0: never")
    ] = 0.0,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="of several classes in a picture: those of at least this probability  [default: each class its own, of the best F1]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output, one list")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON on standard output, a line per image")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output")] = False,
    on_bad_image: Annotated[
        str, typer.Option(help="images that cannot be read: skip them (and exit with 1), or stop before any answer")
    ] = "skip",
    explain: Annotated[Path | None, typer.Option(help="folder for a picture and JSON of reasons per image")] = None,
    sort_into: Annotated[
        Path | None,
        typer.Option(
            help="folder that gets a folder per class with links to the images, and unknown/ with --unknown-below"
        ),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="with --sort-into: copies in place of links")] = False,
    watch: Annotated[
        Path | None, typer.Option(help="a folder whose new images are answered as they come, until Ctrl-C")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="keep embeddings: images that were seen before need no pass of the tower")
    ] = False,
    batch: Annotated[int, typer.Option(help="images per pass of the tower")] = 64,
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Tell the likeliest classes of images. Rows are printed as they are there. Says also whether an image fits what is
    known."""
    with importing():
        from cairn.classifier.classifier import IncrementalClassifier
        from cairn.classifier.novelty import require_threshold
        from cairn.data.feature_store import FeatureStore
        from cairn.data.sorting import SortedFolder
        from cairn.data.watching import new_pictures

    forms: dict[Form, bool] = {"json": as_json, "jsonl": as_jsonl, "csv": as_csv}
    given: list[Form] = [form for form, chosen in forms.items() if chosen]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]}: give only one of them")
    if topk < 1:
        raise ConfigError(f"--topk {topk}: must be at least 1")
    if batch < 1:
        raise ConfigError(f"--batch {batch}: must be at least 1")
    if copy and sort_into is None:
        raise ConfigError("--copy: says how --sort-into fills its folder; give that, too")
    if watch is not None and as_json:
        raise ConfigError("--watch with --json: one list would never end; give --jsonl")
    if not images and watch is None:
        raise ConfigError("no images: name files or folders, or --watch a folder")
    require_threshold(unknown_below, "--unknown-below")
    bad_images = checked_bad_image(on_bad_image)
    files, errors = files_of(images or []), Console(sys.stderr)
    sorted_folder = None if sort_into is None else SortedFolder(sort_into, "copy" if copy else "link")
    names, unread = set[str](), list[str]()
    counts = {"answered": 0, "unreadable": 0, "explained": 0}
    try:
        store = FeatureStore.configured() if cache else None
        with importing():
            held = IncrementalClassifier.load(learner, towers, device, store)
        reasons, sets = 0 if explain is None else max(topk, 3), held.sets_ is not None
        require_meant(sets, threshold, unknown_below)
        printed = _Printed(given[0] if given else "text", unknown_below)

        def answer(files: list[Path], whole: int | None) -> None:
            began = monotonic()
            first = sum(counts[key] for key in ("answered", "unreadable"))
            for found in held.stream(files, known=not sets, reasons=reasons, on_bad_image=bad_images, batch=batch):
                unread.extend(
                    f"cannot be read: {one_line(files[row])} ({reason})" for row, reason in found.unreadable.items()
                )
                if counts["answered"] or len(found):  # else one error names them all
                    for line in unread:
                        errors.note(line)
                    unread.clear()
                counts["unreadable"] += len(found.unreadable)
                read = [files[row] for row in found.positions]
                rows = rows_of_sets(found, read, threshold) if sets else _rows(found, read, topk, unknown_below)
                for row, file in zip(rows, read, strict=True):
                    printed.row(row)
                    counts["answered"] += 1
                    if sorted_folder is not None:
                        for name in _names(row):
                            sorted_folder.put(file, name)
                for _ in () if explain is None else _explained(held.method_.towers, read, found, explain, names):
                    counts["explained"] += 1
                done = counts["answered"] + counts["unreadable"]
                if whole is not None and done < whole:
                    pace = (done - first) / max(1e-9, monotonic() - began)
                    errors.line(f"{done:,} of {whole:,} images, {pace:.0f}/s, {(whole - done) / pace:.0f} s left")

        with errors.live() if not sys.stdout.isatty() else nullcontext():
            answer(files, len(files))
        if watch is not None:
            errors.note(f"watching '{watch}'; Ctrl-C ends it")
            for more in new_pictures(watch, {*files}):
                answer(more, None)
        if files and not counts["answered"] and counts["unreadable"]:
            raise held.unreadable(files)
        printed.end()
    except KeyboardInterrupt:
        done = f"answered: {counts['answered']} of {counted(len(files), 'image')}"
        if watch is not None:
            done = f"answered: {counted(counts['answered'], 'image')}"
        raise Interrupted(
            SIGINT, done if explain is None else f"{done}, explained in '{explain}': {counts['explained']}"
        ) from None
    if sorted_folder is not None:
        errors.note(f"-> {sort_into}: {sorted_folder.summary()}")
    if bad := counts["unreadable"]:
        errors.note(f"cannot be read: {bad} of {counted(len(files), 'image')}; the others are answered")
        raise typer.Exit(1)


def _rows(found: Predictions, files: list[Path], topk: int, unknown_below: float) -> Iterator[dict[str, Any]]:
    for file, score, best in zip(files, found.known_scores(), found.topk(topk), strict=True):
        yield {
            "image": str(file),
            "known": float(score),
            "unknown": bool(score < unknown_below),
            "classes": [{"name": name, "probability": p} for name, p in best],
        }


def _names(row: dict[str, Any]) -> list[str | None]:
    """The folders that a picture is sorted into; None: that of the unknown."""
    if "labels" in row:
        return [one["name"] for one in row["labels"]] or [None]
    return [None if row["unknown"] else row["classes"][0]["name"]]


class _Printed:
    """Answers on standard output, each as it is there."""

    def __init__(self, form: Form, unknown_below: float):
        self._form, self._unknown_below, self._any = form, unknown_below, False
        self._writer = csv.writer(sys.stdout, lineterminator="\n")

    def row(self, row: dict[str, Any]) -> None:
        match self._form:
            case "json":
                typer.echo(("," if self._any else "[") + "\n" + indent(_json(row), "  "), nl=False)
            case "jsonl":
                typer.echo(_ascii_where_unseen(json.dumps(row, ensure_ascii=False)))
            case "csv" if "labels" in row:
                if not self._any:
                    self._writer.writerow(["image", "label", "probability"])
                self._writer.writerows(cells_of_sets(row))
            case "csv":
                if not self._any:
                    self._writer.writerow(["image", "known", "unknown", "rank", "class", "probability"])
                known = [csv_text(one_line(row["image"])), f"{row['known']:.6f}", row["unknown"]]
                for rank, found in enumerate(row["classes"], 1):
                    self._writer.writerow([*known, rank, csv_text(found["name"]), f"{found['probability']:.6f}"])
            case "text":
                typer.echo(line_of_sets(row) if "labels" in row else _line(row, self._unknown_below))
        self._any = True
        sys.stdout.flush()

    def end(self) -> None:
        if self._form == "json":
            typer.echo("\n]" if self._any else "[]")


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


def files_of(images: list[Path]) -> list[Path]:
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


def _explained(towers: Towers, files: list[Path], found: Predictions, folder: Path, taken: set[str]) -> Iterator[Path]:
    """A picture and a JSON per image, called after it, by names that are not taken yet. Files are handed out when theirs are
    there."""
    import numpy as np

    from cairn.data.decoding import decoded
    from cairn.reports.masks import SIDE, MaskedPicture, mask_figure
    from cairn.reports.patches import bar_figure, patch_figure
    from cairn.storage.files import make_folder, write_json
    from cairn.towers.preprocessing import decoded_side

    make_folder(folder)
    masks = None if found.segments is None else found.masks(SIDE)
    for row, (file, reasons) in enumerate(zip(files, found.told_reasons(), strict=True)):
        name, number = file.stem, 1
        while name in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name)
        seen = None
        if towers.has_images:
            seen = np.asarray(towers.prepare(decoded(file, decoded_side(towers))).permute(1, 2, 0))
        regions = {}
        if seen is not None and masks is not None:
            picture = MaskedPicture(seen, masks[row], list(map(str, found.classes)))
            mask_figure(picture, folder / f"{name}.png")
            regions = {"regions": [{"name": one.name, "share": one.found} for one in picture.regions]}
        elif seen is not None and found.patch_grid is not None:
            patch_figure(seen, found.patch_grid, reasons, folder / f"{name}.png")
        elif seen is not None:
            bar_figure(seen, reasons, folder / f"{name}.png")
        grid = {} if found.patch_grid is None else {"grid": found.patch_grid}
        write_json(folder / f"{name}.json", {"image": str(file), **grid, **regions, "classes": reasons})
        yield file

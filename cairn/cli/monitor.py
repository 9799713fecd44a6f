"""`cairn monitor`: whether pictures still look like those that were learned. Parse, call, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli.classifier import AsJson, Device, Learner, SkipBadImages, Weights
from cairn.cli.collector import importing
from cairn.cli.predict import files_of
from cairn.cli.run import checked_bad_image
from cairn.errors import counted, one_line, printable
from cairn.reports.console import Console

SHOWN = 10
"""Classes that are listed, those that moved most surely first."""


def register(app: typer.Typer) -> None:
    app.command()(monitor)


def monitor(
    learner: Learner,
    pictures: Annotated[list[Path], typer.Argument(help="image files, or folders of them; no labels are needed")],
    as_json: AsJson = False,
    on_bad_image: SkipBadImages = "skip",
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Tell whether pictures still look like those that were learned. How many fit badly, and which classes have moved, each by
    a test; nothing of the pictures is kept."""
    with importing():
        from cairn.classifier.classifier import IncrementalClassifier
        from cairn.classifier.drift import BELOW, LEVEL
        from cairn.training.context import Log

    files, bad_images = files_of(pictures), checked_bad_image(on_bad_image)
    with importing():
        held = IncrementalClassifier.load(learner, towers, device)
    errors, console = Console(sys.stderr), Console()
    found = held.drift(files, log=Log(keep=errors.event), on_bad_image=bad_images)
    if as_json:
        report = found.model_dump(mode="json") | {
            "share": found.share,
            "interval": found.interval,
            "shifted": [one.name for one in found.shifted],
            "drifted": found.drifted,
        }
        typer.echo(printable(json.dumps(report, indent=2, ensure_ascii=False)))
        return
    order = sorted(found.shifts, key=lambda one: one.p)
    if order:
        console.table(
            None,
            ("predicted as", "pictures", "shift", "by chance", "p"),
            [
                (one_line(one.name), str(one.images), f"{one.shift:.2f}", f"{one.by_chance:.2f}", f"{one.p:.2g}")
                for one in order[:SHOWN]
            ],
        )
    low, high = (100 * share for share in found.interval)
    console.note(
        f"{100 * found.share:.1f} % of {counted(found.images, 'picture')} have a known score below {BELOW:g} ({low:.1f} to "
        f"{high:.1f} %); {100 * BELOW:g} % do if nothing has changed, so many or more with p = {found.p_below:.2g}"
    )
    classes = f"that of the classes for all {len(found.shifts)} together"
    tests = f"tests at {100 * LEVEL:g} %, {classes if found.shifts else 'no class has five pictures to be tested by'}"
    why = [f"more pictures than that fit badly ({100 * found.share:.1f} %)"] if found.p_below < LEVEL else []
    if found.shifted:
        named = ", ".join(f"'{one_line(one.name)}'" for one in found.shifted[:SHOWN])
        why.append(f"{counted(len(found.shifted), 'class')} moved, {named}")
    if why:
        console.note(f"drifted: {'; '.join(why)} ({tests})")
    else:
        console.note(f"no drift found ({tests})")

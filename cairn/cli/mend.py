"""The commands that mend a learner: history, undo, rename, merge, unlearn, relabel. Parse, call, print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cairn.cli.classifier import Device, Learner, Weights, record_in
from cairn.cli.collector import importing
from cairn.cli.predict import files_of
from cairn.cli.run import BadImages, checked_bad_image
from cairn.data.names import BETWEEN
from cairn.errors import ConfigError, counted, one_line
from cairn.reports.console import Console

if TYPE_CHECKING:
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.classifier.record import HistoryEntry, LearnerRecord
    from cairn.experiment.folder import Lock

Name = Annotated[str, typer.Argument(help="a class of `cairn inspect`")]
Pictures = Annotated[list[Path], typer.Argument(help="image files, or folders of them, as they were learned")]


def register(app: typer.Typer) -> None:
    for command in (history, undo, rename, merge, unlearn, relabel):
        app.command()(command)


def history(learner: Learner) -> None:
    """Show what was done to a learner when. Tells also how far `cairn undo` can go back."""
    from cairn.classifier.folder import NAME
    from cairn.storage.archive import Archive

    record = record_in(learner)
    for number, entry in enumerate(record.history, 1):
        typer.echo(one_line(f"{number:4d}  {entry.date}  {entry.told}{_named(entry)}"))
    *earlier, newest = Archive(learner, NAME).bytes_of_each().values()
    steps = counted(len(earlier), "step") if earlier else "nothing"
    typer.echo(
        f"`cairn undo` can take back {steps}: {counted(len(earlier), 'earlier state')} of {counted(sum(earlier), 'byte')} beside "
        f"the newest of {counted(newest, 'byte')}; {record.keep} are kept at most (`cairn learn --keep`)"
    )


def _named(entry: HistoryEntry) -> str:
    """The classes that an entry of the history names, some of many."""
    from cairn.data.names import listed

    names = [f"'{name}'" for name in entry.names or [*entry.new, *entry.again]]
    match entry.kind:
        case "renamed" if names:
            return f": {names[0]} to {names[1]}"
        case "merged" if names:
            return f": {names[0]} and {names[1]} to {names[2]}"
    return f": {listed(names)}" if names else ""


def undo(learner: Learner) -> None:
    """Take back the last change. The state before it is there again, to the bit; again: the change before that."""
    from cairn.classifier.folder import undo as undone

    with _held(learner):
        record = undone(learner)
    Console().note(f"{learner}: {record.history[-1].told}; {_what_is_there(record)}")


def rename(
    learner: Learner,
    old: Name,
    new: Annotated[str, typer.Argument(help="its name from now on")],
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Give a class another name. Texts that were made of its name are made anew; what was trained with them stays."""
    with _changed(learner, towers, device) as held:
        held.rename(old, new)
    Console().note(f"{learner}: '{one_line(old)}' is called '{one_line(new.strip())}' now")


def merge(
    learner: Learner,
    first: Name,
    second: Name,
    into: Annotated[str | None, typer.Option(help="its name  [default: that of the first]")] = None,
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Make one class of two. As if the pictures of both had been learned under one name."""
    with _changed(learner, towers, device) as held:
        held.merge(first, second, into)
    Console().note(
        f"{learner}: '{one_line(first)}' and '{one_line(second)}' are '{one_line((into or first).strip())}' now; left: "
        f"{counted(len(held.classes_), 'class')}"
    )


def unlearn(
    learner: Learner,
    pictures: Pictures,
    name: Annotated[str | None, typer.Option("--as", help="only what was learned as this class")] = None,
    on_bad_image: BadImages = "stop",
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Take pictures out of what was learned. As if they had never been; they are known by a hash of their pixels."""
    files, bad_images = files_of(pictures), checked_bad_image(on_bad_image)
    with _changed(learner, towers, device) as held:
        before = sum(held.counts_)
        held.unlearn(files, name, on_bad_image=bad_images)
    out = counted(int(before - sum(held.counts_)), "picture" if held.sets_ is None else "label")
    Console().note(f"{learner}: {out} taken out; left: {_what_is_left(held)}")


def relabel(
    learner: Learner,
    pictures: Annotated[list[str], typer.Argument(help="image files, or folders of them, and behind them the class")],
    on_bad_image: BadImages = "stop",
    towers: Weights = None,
    device: Device = "auto",
) -> None:
    """Say of which class pictures are. They are taken out of the others and learned as that, both or neither.

    cairn relabel LEARNER PICTURES CLASS, of several classes in a picture CLASS;CLASS
    """
    *files, name = pictures
    if not files:
        raise ConfigError(f"'{name}': give pictures and behind them the name of their class")
    paths, bad_images = files_of([Path(file) for file in files]), checked_bad_image(on_bad_image)
    with _changed(learner, towers, device) as held:
        calls = len(held.history_)
        several = [own for own in name.split(BETWEEN) if own.strip()]
        held.relabel(paths, name if held.sets_ is None else several, on_bad_image=bad_images)
    done = "learned as" if len(held.history_) > calls else "known already as"
    Console().note(f"{learner}: {counted(len(paths), 'picture')} {done} '{one_line(name)}'; {_what_is_left(held)}")


@contextmanager
def _held(learner: Path) -> Iterator[Lock]:
    """The lock of the folder of a learner."""
    from cairn.classifier.folder import no_learner
    from cairn.experiment.folder import Lock

    if not learner.is_dir():
        raise no_learner(learner)
    lock = Lock(learner).take()
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def _changed(learner: Path, towers: str | None, device: str) -> Iterator[IncrementalClassifier]:
    """The learner of a folder, to be changed; saved if it was. What the change had to say is told."""
    with importing():
        from cairn.classifier.classifier import IncrementalClassifier

    with _held(learner):
        with importing():
            held = IncrementalClassifier.load(learner, towers, device)
        told, calls = len(held.notices_), len(held.history_)
        yield held
        for notice in held.notices_[told:]:
            Console().note(f"note: {notice}")
        if len(held.history_) > calls:
            held.save(learner)


def _what_is_left(held: IncrementalClassifier) -> str:
    learned = "image" if held.sets_ is None else "label"
    return f"{counted(len(held.classes_), 'class')} from {counted(int(sum(held.counts_)), learned)}"


def _what_is_there(record: LearnerRecord) -> str:
    return f"{counted(len(record.classes), 'class')} from {counted(sum(record.counts), 'image')}"

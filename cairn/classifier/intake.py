"""What a classifier is given to learn, made ready: readable, class by class, with numbers of classes, less what it has learned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np

from cairn.classifier.inputs import Labelled, Labels, labelled, readable, unlabelled
from cairn.classifier.learned import Learned
from cairn.data.images import Unlabelled
from cairn.data.in_memory import InMemoryImages, Item
from cairn.data.names import alike, class_name
from cairn.data.task import Task
from cairn.errors import ResultError, counted
from cairn.storage.archive import Archive
from cairn.training.context import Checkpoint, Log


class Intake(NamedTuple):
    """Images of one call, maybe none."""

    images: InMemoryImages
    """Labelled by the numbers that their classes have, or will have."""
    hashes: list[bytes]
    new: list[str]
    """Names of the classes that come with them."""

    @property
    def train(self) -> InMemoryImages:
        return self.images

    @property
    def train_hashes(self) -> list[bytes]:
        return self.hashes

    @property
    def label_sets(self) -> None:
        """Each image shows one class."""

    def reduced(self, side: int | None) -> Intake:
        """To be decoded with that side."""
        return self if side is None else self._replace(images=self.images.reduced(side))


def intake(
    images: Labelled,
    labels: Labels,
    learned: Learned,
    width: int | None,
    again: bool,
    on_bad_image: Literal["stop", "skip"],
    log: Log,
) -> Intake:
    """Without those that were `learned` as their class already, unless `again`; notices say what was left out, and which names
    are nearly the same. Raises UnreadableImages, and DataError for labels that are no text."""
    items, names = labelled(images, labels, width)
    kept = {name: class_name(name) for name in dict.fromkeys(names)}
    names = [kept[name] for name in names]
    known, classes = learned.numbers(), list(map(str, learned.classes))
    new = [name for name in dict.fromkeys(names) if name not in known]
    numbers = known | {name: len(classes) + i for i, name in enumerate(new)}
    given = InMemoryImages(items, np.array([numbers[name] for name in names], dtype=np.int64), width)
    given = readable(given, {name: numbers[name] for name in new}, on_bad_image, log)
    for notice in alike([*classes, *new], new):
        log("notice", text=notice)
    # Class by class, as a stream has them: the order of arrival within a task must not matter
    given = given.taken(np.argsort(given.labels, kind="stable"))
    hashes = given.content_hashes()
    found = learned.pictures.compare(hashes, given.labels)
    for text in found.notices(given, [*classes, *new], again):
        log("notice", text=text)
    if not again:
        given, hashes = given.taken(found.fresh), [hashes[row] for row in found.fresh]
    return Intake(given, hashes, new)


class Loose(NamedTuple):
    """Images of one call without labels."""

    images: InMemoryImages
    hashes: list[bytes]

    @property
    def hidden(self) -> Unlabelled | None:
        """As a task has them."""
        return Unlabelled(self.images) if self.hashes else None

    def reduced(self, side: int | None) -> Loose:
        """To be decoded with that side."""
        return self if side is None else self._replace(images=self.images.reduced(side))


def loose(
    images: Item | Iterable[Item],
    beside: Sequence[bytes],
    learned: Learned,
    width: int | None,
    on_bad_image: Literal["stop", "skip"],
    log: Log,
) -> Loose:
    """Each once, and without those that come with a label `beside` them (their hashes) or were `learned`: what these show is
    known. A notice counts what was left out. Raises UnreadableImages."""
    found = readable(unlabelled(images, width), {}, on_bad_image, log)
    hashes, known = found.content_hashes(), set(beside)
    rows = []
    for row, value in enumerate(hashes):
        if value not in known and not learned.pictures.learned_as(value):
            rows.append(row)
            known.add(value)
    if out := len(found) - len(rows):
        log(
            "notice",
            text=f"left out: {out} of {counted(len(found), 'image')} without labels, known with one or given twice",
        )
    return Loose(found.taken(rows), [hashes[row] for row in rows])


def task_fingerprint(learned: Learned, settings: Mapping[str, Any], task: Task, hashes: Sequence[bytes]) -> str:
    """Names the task, its images by the hashes of those with labels and of the others, and what it is learned on."""
    said = (len(learned.history), task.names, list(learned.classes), settings)
    digest = hashlib.sha256(repr(said).encode())
    n = len(task.train)
    for label, value in zip(task.train.labels, hashes[:n], strict=True):
        digest.update(label.tobytes() + value)
    for value in hashes[n:]:
        digest.update(value)
    return digest.hexdigest()


def take_up(checkpoint: Checkpoint, archive: Archive, fingerprint: str, calls: int) -> None:
    """Take up the work on this very task, after so many calls, that `archive` holds, if any, and keep what is due there."""
    held = archive.read() if archive else None
    work = held.parts if held is not None and held.record.get("task") == fingerprint else {}
    checkpoint.kept_by(lambda parts: archive.write({"task": fingerprint, "after": calls}, parts))
    checkpoint.begin(work)


def clear_what_is_done(archive: Archive, calls: int) -> None:
    """Remove work that came before the last of so many calls: it ended, and a kill came before its work was removed."""
    with suppress(ResultError):
        held = archive.read() if archive else None
        if held is not None and held.record.get("after", calls) < calls:
            archive.clear()

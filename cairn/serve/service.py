"""A learner that predicts while a copy of it learns."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from starlette.exceptions import HTTPException
from torch import Tensor

from cairn.classifier.classifier import IncrementalClassifier
from cairn.classifier.folder import NAME, undo
from cairn.classifier.predictions import Predictions
from cairn.classifier.record import HistoryEntry
from cairn.data.decoding import decoded_within, reason
from cairn.data.identity import content_hash
from cairn.data.in_memory import Reduced
from cairn.data.names import BETWEEN, class_name, require_text
from cairn.errors import ConfigError, DataError, Interrupted, ResultError, counted, one_line
from cairn.experiment.folder import Lock
from cairn.methods.protocol import DescribedClasses, KeepsSums
from cairn.reports.masks import SIDE, MaskedPicture, transparent_address
from cairn.storage.archive import Archive
from cairn.storage.schema import validated
from cairn.towers.preprocessing import decoded_side, preprocessing_of
from cairn.training.context import Checkpoint, Log

NAME_LETTERS, SENTENCES, SENTENCE_LETTERS = 100, 20, 300
DECODED = 4
"""A JPEG is decoded to no less than so many times the tower's side, unless the learner says otherwise of its own."""

EXPLAINED = 3
"""Classes, of the likeliest, whose patches are told."""

PAIRS, SHOWN = 5, 20
"""Of classes that are mixed up: pairs that are told, and classes between which the confusions are."""

Change = Callable[[IncrementalClassifier, "Work"], Any]


@dataclass
class Work:
    """A change that is going on."""

    what: str
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    share: float = 0.0
    """How much of the stage in progress is done."""

    def progress(self, state: dict[str, Any]) -> None:
        self.share = (state["step"] + 1) / state["steps"]


class Service:
    """The learner of a folder. Changes are made to a copy, saved, and only then seen; one at a time.

    Raises ConfigError for a learner of embeddings: it has no pictures to look at.
    """

    def __init__(
        self,
        folder: Path,
        learner: IncrementalClassifier | None = None,
        max_pixels: int = 2**24,
        towers: str | None = None,
    ):
        self.folder, self.learner = folder, learner or IncrementalClassifier.load(folder, towers)
        self.towers = self.learner.method_.towers
        if not self.towers.has_images:
            raise ConfigError(f"'{folder}': learned from embeddings, so it has no pictures to look at")
        self.max_pixels = max_pixels
        self.work: Work | None = None
        self.stopping: int | None = None
        self._told: tuple[IncrementalClassifier, dict[str, Any]] | None = None
        self._free = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "learning")
        self._slots = threading.Semaphore(os.cpu_count() or 1)  # a large picture, unpacked, is some hundred MB

    # asked

    def classes(self) -> list[dict[str, Any]]:
        learner = self.learner
        return [{"name": str(n), "images": int(c)} for n, c in zip(learner.classes_, learner.counts_, strict=True)]

    def predict(self, file: IO[bytes], best: int, threshold: float | None = None) -> dict[str, Any]:
        """Raises HTTPException 415 for what is no image, ConfigError for a threshold where pictures show one class."""
        with self._slots:
            learner, image = self.learner, self._seen(file)
            several = learner.sets_ is not None
            found = learner.predictions([image], known=not several, reasons=EXPLAINED)
            labels = found.sets(threshold)[0] if several or threshold is not None else None
            reasons = [
                {key: told[key] for key in ("name", "probability", "patches")}
                for told in found.told_reasons()[0]
                if "patches" in told
            ]
            return {
                "classes": [{"name": n, "probability": p} for n, p in found.topk(best)[0]],
                "labels": None if labels is None else [{"name": n, "probability": p} for n, p in labels],
                "known": None if several else float(found.known_scores()[0]),
                "grid": found.patch_grid,
                "view": (given := preprocessing_of(self.towers)) and given.mode,
                "reasons": reasons,
                "objects": None if found.segments is None else _objects(image, found),
            }

    def estimate(self) -> dict[str, Any]:
        """How good it is, as far as pictures left out of learning tell: in all, of each class, and what is mixed up. Of many
        classes the confusions are those of the ones that are mixed up most."""
        learner, told = self.learner, self._told
        if told is None or told[0] is not learner:
            with self._slots:
                self._told = told = learner, _estimate(learner)
        return told[1]

    def history(self) -> dict[str, Any]:
        """What was done when, the first first, and how many changes can be undone."""
        entries = [validated(HistoryEntry, entry, "history") for entry in self.learner.history_]
        return {
            "entries": [
                {"date": str(entry.date), "change": entry.told, "names": entry.names or [*entry.new, *entry.again]}
                for entry in entries
            ],
            "undoable": max(0, len(Archive(self.folder, NAME).bytes_of_each()) - 1),
        }

    @property
    def several(self) -> bool:
        """Whether pictures may show several classes."""
        return self.learner.sets_ is not None

    @property
    def relabels(self) -> bool:
        """Whether pictures that were learned can be taken out again, and so be learned as another class."""
        method = self.learner.method_
        return isinstance(method, KeepsSums) and method.trained is None

    @property
    def describes(self) -> bool:
        """Whether a new class needs sentences that say what it looks like."""
        method = self.learner.method_
        return isinstance(method, DescribedClasses) and method.needs_sentences

    # changed

    async def learn(self, name: str, files: Sequence[IO[bytes]], sentences: Sequence[str] = ()) -> None:
        """Raises HTTPException: 409 while another change is made and for pictures that were learned already, 415 and 422 for
        what cannot be learned."""
        names, said = self._names(name), _sentences(sentences)
        name = ", ".join(names)

        def change(copy: IncrementalClassifier, work: Work) -> None:
            images = [self._whole(file, f"picture {i}") for i, file in enumerate(files, 1)]
            for new in [own for own in names if self.describes and own not in copy.classes_]:
                if not said:
                    raise HTTPException(422, f"say in a sentence or more what '{new}' looks like")
                copy.describe({new: said})
            calls, labels = len(copy.history_), [names] * len(images) if copy.sets_ is not None else names * len(images)
            copy.partial_fit(images, labels, log=Log(show=work.progress), checkpoint=work.checkpoint)
            if len(copy.history_) == calls:
                raise HTTPException(409, f"'{name}' has learned these pictures already; nothing was changed")

        await self._changed(f"'{name}' is being learned", change)

    async def relabel(self, name: str, files: Sequence[IO[bytes]]) -> None:
        """Raises HTTPException as `learn`: 409 too where these pictures are of that class and no other already."""
        names = self._names(name)
        name = ", ".join(names)

        def change(copy: IncrementalClassifier, work: Work) -> None:
            calls = len(copy.history_)
            images = [self._whole(file, f"picture {i}") for i, file in enumerate(files, 1)]
            copy.relabel(images, names, log=Log(show=work.progress))
            if len(copy.history_) == calls:
                raise HTTPException(409, f"'{name}' has learned these pictures already; nothing was changed")

        await self._changed(f"pictures are being learned as '{name}'", change)

    async def undo(self) -> None:
        """Take back the last change. Raises HTTPException 409 where no earlier state is kept, and while another change is made."""

        def undone() -> IncrementalClassifier:
            try:
                undo(self.folder)
            except ResultError:
                raise HTTPException(409, "nothing can be undone: no earlier state is kept") from None
            return IncrementalClassifier.load(self.folder, self.towers)

        await self._replaced("the last change is being undone", lambda _: undone())

    async def forget(self, name: str) -> None:
        """Raises HTTPException: 404 for a class that is not known, 409 for the last one and while another change is made."""

        def change(copy: IncrementalClassifier, work: Work) -> None:
            if name not in copy.classes_:
                raise HTTPException(404, f"class '{one_line(name)}' is not known")
            if len(copy.classes_) == 1:
                raise HTTPException(409, f"'{one_line(name)}' is the only class; teach another one first")
            copy.forget(name)

        await self._changed(f"'{one_line(name)}' is being forgotten", change)

    def stop(self, signal: int) -> None:
        """Give up learning that is going on; a save is finished."""
        self.stopping = signal
        if (work := self.work) is not None:
            work.checkpoint.stop(signal)

    def close(self) -> None:
        self._worker.shutdown()

    async def _changed(self, what: str, change: Change) -> None:
        def changed(work: Work) -> IncrementalClassifier:
            # What is on disk, which another process may have taught meanwhile
            copy = IncrementalClassifier.load(self.folder, self.towers)
            change(copy, work)
            if self.stopping is not None:
                raise _stopped()
            copy.save(self.folder)
            return copy

        await self._replaced(what, changed)

    async def _replaced(self, what: str, make: Callable[[Work], IncrementalClassifier]) -> None:
        """The learner is what `make` gives, which has the folder to itself."""
        if self.stopping is not None:
            raise _stopped()
        if not self._free.acquire(blocking=False):
            now = self.work
            raise HTTPException(
                409, f"{now.what if now else 'something is being learned'}; try again when that is done"
            )
        self.work = work = Work(what)
        # Not waited for by whoever asked, if they hang up: it is finished all the same
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, self._replace, make, work))

    def _replace(self, make: Callable[[Work], IncrementalClassifier], work: Work) -> None:
        try:
            lock = Lock(self.folder).take()
            try:
                self.learner = make(work)
            finally:
                lock.release()
        except Interrupted:
            raise _stopped() from None
        finally:
            self.work = None
            self._free.release()

    # inside

    def _names(self, given: str) -> list[str]:
        """The classes that are meant: one, or where pictures may show several all between semicolons."""
        names = [name for name in given.split(BETWEEN) if name.strip()] or [""] if self.several else [given]
        return list(dict.fromkeys(map(_class_name, names)))

    def _whole(self, file: IO[bytes], what: str) -> Reduced:
        """The image as the tower sees it, and by what it is known wherever it was learned: the hash of all of its pixels. They
        are held for one picture at a time."""
        try:
            image = decoded_within(file, self.max_pixels)
            content = content_hash(image)
            if (side := decoded_side(self.towers)) is not None:  # as the learner decodes what it learns
                file.seek(0)
                image = decoded_within(file, self.max_pixels, side, every_kind=True)
        except Exception as error:  # a decoder fed with hostile bytes may raise anything
            raise _unreadable(what, error) from None
        return Reduced(self.towers.prepare(image).permute(1, 2, 0).numpy(), content)

    def _seen(self, file: IO[bytes], what: str = "the file") -> np.ndarray:
        """The image as the tower sees it, (h, w, 3): however large it was, what is kept of it is small."""
        try:
            own = decoded_side(self.towers)
            image = decoded_within(file, self.max_pixels, own or DECODED * self._blank.shape[-1], own is not None)
        except Exception as error:  # a decoder fed with hostile bytes may raise anything
            raise _unreadable(what, error) from None
        return self.towers.prepare(image).permute(1, 2, 0).numpy()

    @cached_property
    def _blank(self) -> Tensor:
        """A picture without anything in it, as the tower sees it."""
        return self.towers.prepare(np.zeros((8, 8, 3), np.uint8))


def _estimate(learner: IncrementalClassifier) -> dict[str, Any]:
    found, names = learner.estimate_, list(map(str, learner.classes_))
    pairs, M = found.confused[:PAIRS], found.matrix
    shown = list(range(len(names)))
    if len(names) > SHOWN:
        shown = sorted([*dict.fromkeys(c for pair in found.confused for c in pair[:2])][:SHOWN])
    return {
        "accuracy": found.accuracy,
        "interval": found.interval,
        "sources": [f"{counted(n, 'picture')} {source}" for source, n in found.sources.items()],
        "classes": [
            {"name": name, "accuracy": None if math.isnan(accuracy) else accuracy}
            for name, accuracy in zip(names, found.by_class.tolist(), strict=True)
        ],
        "confused": [
            {"first": names[pair.a], "second": names[pair.b], "pictures": pair.images, "advice": said}
            for pair, said in zip(pairs, learner.advice(pairs), strict=True)
        ],
        "shown": [names[c] for c in shown],
        "confusions": M[np.ix_(shown, shown)].tolist(),
        "others": [float(M[c].sum() - M[c, shown].sum()) for c in shown],
    }


def _objects(image: np.ndarray, found: Predictions) -> dict[str, Any]:
    picture = MaskedPicture(image, found.masks(SIDE)[0], list(map(str, found.classes)))
    regions = [{"name": one.name, "colour": one.colour, "share": one.found} for one in picture.regions]
    return {"mask": transparent_address(picture), "regions": regions}


def _unreadable(what: str, error: Exception) -> HTTPException:
    return HTTPException(415, f"{what} cannot be read as a picture ({reason(error)})")


def _stopped() -> HTTPException:
    return HTTPException(503, "the service is being stopped; nothing was changed")


def _class_name(name: str) -> str:
    try:
        name = class_name(name)
    except DataError as error:
        raise HTTPException(422, str(error)) from None
    if len(name) > NAME_LETTERS:
        raise HTTPException(422, f"a class name has at most {NAME_LETTERS} characters")
    if name in (".", ".."):  # no address could name it
        raise HTTPException(422, f"class '{name}': take another name")
    return name


def _sentences(given: Sequence[str]) -> list[str]:
    said = [line.strip() for text in given for line in text.splitlines() if line.strip()]
    if len(said) > SENTENCES or any(len(sentence) > SENTENCE_LETTERS for sentence in said):
        raise HTTPException(422, f"at most {SENTENCES} sentences of {SENTENCE_LETTERS} characters")
    _text(said)
    return said


def _text(texts: Sequence[str]) -> None:
    try:
        require_text(texts)
    except DataError as error:
        raise HTTPException(422, str(error)) from None

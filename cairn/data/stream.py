"""A data set as a sequence of tasks, in the field's "B-m Inc-n" protocol (m classes first, then n per task).

Outside, a class is its name; inside, its number in order of arrival.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cairn.data.few_labels import few_labels, together
from cairn.data.images import Dataset, reduced, reduced_subset, taken
from cairn.data.label_set_tasks import long_tailed, tasks_of_sets
from cairn.data.names import alike, normal_form
from cairn.data.online import blurred, chunks, shuffled
from cairn.data.task import Images, LabelSets, Subset, Task
from cairn.errors import ConfigError, DataError, ResultError, counted, suggestion
from cairn.storage.files import JSON_BYTES, read_bytes, read_json, read_yaml


class Part(NamedTuple):
    """What is learned at once: a task, or a chunk of one."""

    task: int
    """The number of the task."""
    content: Task
    last: bool
    """Whether the task is learned with it."""


@dataclass(frozen=True)
class TaskStream:
    """Tasks to learn and, apart from them, the test images of each task's classes.

    Where images may show several classes, `tests` are `LabelSets` with a column for every class of the stream: those of a task
    show one of its classes, and none of an earlier task.

    `class_names` is in order of arrival. `fingerprint` names the split: the same string, the same images in the same
    tasks (by class order, sizes and item descriptions; contents are not opened).
    """

    name: str
    tasks: tuple[Task, ...]
    tests: tuple[Images, ...]
    class_names: tuple[str, ...]
    base: int
    step: int
    fingerprint: str
    notices: tuple[str, ...] = ()
    chunk: int | None = None
    """Images that are learned at once, in an online stream."""

    @property
    def label_sets(self) -> bool:
        """Whether an image may show several classes."""
        return isinstance(self.tests[0], LabelSets)

    @property
    def collections(self) -> tuple[Images, ...]:
        """Every image there is: the training images of each task, the test images of each, then those without labels of each
        task that has any."""
        return *(task.train for task in self.tasks), *self.tests, *self.unlabelled

    @property
    def unlabelled(self) -> tuple[Images, ...]:
        """Images without labels, of each task that has any."""
        return tuple(task.unlabelled for task in self.tasks if task.unlabelled is not None)

    def parts(self) -> list[Part]:
        """What is learned at once, in order: the tasks, or their chunks, numbered over the whole stream. The first chunk of a task
        brings its classes, the others none."""
        if self.chunk is None:
            return [Part(task.index, task, True) for task in self.tasks]
        found: list[Part] = []
        for task in self.tasks:
            labels, stop = np.asarray(task.train.labels), task.classes.stop
            pieces = chunks(labels, task.classes, self.chunk)
            for number, rows in enumerate(pieces):
                piece = replace(task, index=len(found), train=Subset(task.train, rows, labels[rows]))
                if number:
                    piece = replace(piece, classes=range(stop, stop), names=())
                found.append(Part(task.index, piece, number == len(pieces) - 1))
        return found


def class_order(order: str | os.PathLike[str], classes: Sequence[str]) -> np.ndarray:
    """Natural indices in order of arrival.

    `natural`; `seed:N` for `numpy.random.RandomState(N).permutation(k)`, the field's convention;
    or a file with every class once: a JSON or YAML list, bare or under the key `class_order`, of names (texts) or of
    positions in the natural order (whole numbers, from 0), or a text file with one name per line.
    Raises ConfigError for anything else, naming what is missing or unknown.
    """
    return _arrival(order, classes)[0]


def _arrival(order: str | os.PathLike[str], classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """As `class_order`, with a notice of how a file is read where its entries could be names as well as positions."""
    order = os.fspath(order)
    if order == "natural":
        return np.arange(len(classes)), []
    if order.startswith("seed:"):
        digits = order.removeprefix("seed:")
        if not digits.isdecimal() or int(digits) >= 2**32:
            raise ConfigError(f"order '{order}': the seed must be a whole number from 0 to 4294967295")
        return np.random.RandomState(int(digits)).permutation(len(classes)), []
    path = Path(order)
    if not os.path.isfile(path):
        raise ConfigError(f"order '{order}': neither natural, seed:N nor a file")
    entries = _listed(path)
    names = [_name(entry, classes) for entry in entries]
    position, counts = {name: i for i, name in enumerate(classes)}, Counter(names)
    unknown = [name for name in names if name not in position]
    missing = [name for name in classes if name not in counts]
    repeated = sorted(name for name, count in counts.items() if count > 1)
    for problem, which in (("unknown", unknown), ("missing", missing), ("repeated", repeated)):
        if which:
            shown = ", ".join(map(repr, which[:3])) + (" ..." if len(which) > 3 else "")
            hint = _order_hint(which, classes) if problem == "unknown" else ""
            raise ConfigError(f"order file '{order}': {counted(len(which), f'{problem} class name')}: {shown}{hint}")
    notices = []
    if all(name.isdecimal() for name in classes):
        read_as = (
            "names: whole numbers without quotes, in JSON or YAML, would be positions"
            if isinstance(entries[0], str)
            else f"positions, from 0: the first is class '{names[0]}'; for names put them into quotes"
        )
        notices.append(
            f"order file '{order}': every class is called by a number, and the entries are taken as {read_as}"
        )
    return np.array([position[name] for name in names]), notices


def _order_hint(unknown: Sequence[str], classes: Sequence[str]) -> str:
    """What to do about entries that are no class."""
    if all(name.isdecimal() for name in unknown):
        return "; positions are whole numbers without quotes, in a JSON or YAML list"
    return f"; {suggestion(unknown[0], classes)}"


def _listed(path: Path) -> list[str] | list[int]:
    try:
        if path.suffix == ".json":
            names = read_json(path, links=True)
        else:
            text = read_bytes(path, JSON_BYTES, links=True).decode("utf-8-sig")
            lines = (line.strip() for line in text.splitlines())
            names = read_yaml(text) if path.suffix in (".yaml", ".yml") else [line for line in lines if line]
    except (ResultError, ValueError) as error:
        raise ConfigError(f"order file '{path}': cannot be read: {error}") from None
    if isinstance(names, dict):
        names = names.get("class_order")
    if not isinstance(names, list) or {type(name) for name in names} not in ({str}, {int}):
        raise ConfigError(
            f"order file '{path}': must hold one list of class names, or of positions in the natural order"
        )
    return names


def _name(entry: str | int, classes: Sequence[str]) -> str:
    """The class at a position, or called by a text; a position without a class is left to be refused as a name."""
    if isinstance(entry, str):
        return normal_form(entry)
    return classes[entry] if 0 <= entry < len(classes) else f"number {entry}"


def task_sizes(classes: int, base: int, step: int) -> list[int]:
    """Classes per task: `base` first (0: like the others), then `step` each; the last task may be smaller."""
    if step < 1 or base < 0:
        raise ConfigError(f"step {step} and base {base}: step must be at least 1, base at least 0")
    if step > classes:
        raise ConfigError(f"step {step} is larger than the number of classes, {classes}: take at most {classes}")
    if base > classes:
        raise ConfigError(f"base {base} is larger than the number of classes, {classes}: take at most {classes}")
    sizes = [base] if base else []
    while (rest := classes - sum(sizes)) > 0:
        sizes.append(min(step, rest))
    return sizes


def held_out(train: Images, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out): `share` of each class's training images, at least one of each on either side."""
    rng = np.random.default_rng(seed)
    kept, out = [], []
    for label in np.unique(train.labels):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        if len(members) < 2:
            raise DataError(f"validation split: class number {label} has one training image; it needs two")
        cut = min(max(1, round(share * len(members))), len(members) - 1)
        out.append(members[:cut])
        kept.append(members[cut:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(out))


def long_tail(most: int, classes: int, imbalance: float) -> np.ndarray:
    """Training images of each class, int64 (k,), falling exponentially from `most` to `most` / rho, rho the imbalance.

    n_c = max(1, round(most rho^(-p_c / (k - 1)))), p_c the place of class c in a shuffled order (seed 0), so that every task
    has frequent and rare classes. Source: Cui et al. 2019, Class-Balanced Loss (the form); Liu et al. 2022, Long-Tailed
    Class Incremental Learning (shuffled).
    """
    places = np.random.default_rng(0).permutation(classes)
    shares = np.power(float(imbalance), -places / max(1, classes - 1))
    return np.maximum(1, np.round(most * shares)).astype(np.int64)


def task_stream(
    dataset: Dataset,
    *,
    base: int = 0,
    step: int = 10,
    order: str | os.PathLike[str] = "natural",
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: float = 0.0,
    imbalance: float = 1.0,
    blurry: float = 0.0,
    chunk: int | None = None,
    labelled: float = 1.0,
    unlabelled: Images | None = None,
) -> TaskStream:
    """Cut a data set into tasks.

    `limit_*` keep the first so many images of each class. `validation` in (0, 1) sets the test split aside and tests
    on that share of each class's training images instead (seed 0): settings are chosen there, never on the test split.
    `imbalance` above 1 makes the training images long-tailed (`long_tail`): the first so many of each class are kept, the
    most frequent class having that many times as many as the rarest. Test images stay as they are. Images that show several
    classes are `Composed` anew for it, and others refused.
    `blurry` is the share of each class's training images that comes with later tasks (`blurred`). With `chunk` the stream is
    online: training images come in random order, and so many are learned at once (`TaskStream.parts`).
    `labelled` is the share of each class's training images that keep their label (`few_labels`); the others come with the task as
    `Task.unlabelled`. `unlabelled` are images that come so with every task.
    """
    if not 0.0 <= validation < 1.0:
        raise ConfigError(f"validation {validation}: must be at least 0 and below 1")
    if not 1.0 <= imbalance < float("inf"):
        raise ConfigError(f"imbalance {imbalance}: must be a number from 1, such as 100")
    if not 0.0 <= blurry < 1.0:
        raise ConfigError(f"blurry {blurry}: must be at least 0 and below 1")
    if not 0.0 < labelled <= 1.0:
        raise ConfigError(f"labelled {labelled}: must be above 0 and at most 1, such as 0.125")
    for flag, limit in (("limit-train", limit_train), ("limit-test", limit_test), ("chunk", chunk)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{flag} {limit}: must be at least 1")
    _check(dataset)
    sizes = task_sizes(len(dataset.classes), base, step)
    arrival, order_notices = _arrival(order, dataset.classes)
    names = tuple(dataset.classes[i] for i in arrival)
    if isinstance(dataset.train, LabelSets):
        if imbalance > 1:
            dataset = long_tailed(dataset, imbalance)
        if blurry or chunk:
            what = f"chunk {chunk}" if chunk else f"blurry {blurry:g}"
            raise ConfigError(f"{what}: data '{dataset.name}' has several classes in an image; leave it out")
        if labelled < 1 or unlabelled is not None:
            raise ConfigError(
                f"images without labels: data '{dataset.name}' has several classes in an image; leave --labelled and --unlabelled out"
            )
        trains, tests = tasks_of_sets(dataset, _ids(sizes), arrival, limit_train, limit_test, validation)
    else:
        if chunk and (labelled < 1 or unlabelled is not None):
            raise ConfigError(
                f"chunk {chunk}: images of an online stream are labelled; leave --labelled and --unlabelled out"
            )
        trains, tests = _single(dataset, sizes, arrival, limit_train, limit_test, validation, imbalance, blurry, chunk)
    hidden: list[Images | None] = [unlabelled] * len(sizes)
    if labelled < 1:
        trains, rest = few_labels(trains, labelled)
        hidden = [together(own, unlabelled) for own in rest]

    tasks, start = [], 0
    for index, (size, images, rest) in enumerate(zip(sizes, trains, hidden, strict=True)):
        ids, sets = range(start, start + size), images if isinstance(images, LabelSets) else None
        own = images if sets is None else sets.copies()
        called = names[start : start + size]
        tasks.append(Task(index, ids, called, dataset.templates, own, dataset.descriptions, sets, rest))
        start += size
    notices = [*dataset.notices, *order_notices, *alike(names)]
    if len(sizes) > 1 and sizes[-1] < step:
        notices.append(f"the last task has {sizes[-1]} of {step} classes: {len(names)} classes do not divide evenly")
    stream = TaskStream(dataset.name, tuple(tasks), tuple(tests), names, base, step, "", tuple(notices), chunk)
    return replace(stream, fingerprint=_fingerprint(stream))


def _single(
    dataset: Dataset,
    sizes: Sequence[int],
    arrival: np.ndarray,
    limit_train: int | None,
    limit_test: int | None,
    validation: float,
    imbalance: float,
    blurry: float,
    chunk: int | None,
) -> tuple[list[Images], list[Images]]:
    """Training and test images of each task, an image showing one class."""
    train, test = dataset.train, dataset.test
    if validation:
        kept, out = held_out(train, validation, seed=0)
        train, test = Subset(train, kept, train.labels[kept]), Subset(train, out, train.labels[out])

    k = len(arrival)
    counts = np.minimum(np.bincount(train.labels, minlength=k), min(limit_train or len(train), len(train)))
    if imbalance > 1:
        counts = np.minimum(counts, long_tail(int(counts.max()), k, imbalance))

    ranges = _ids(sizes)
    trains = [_of(train, arrival, ids, counts) for ids in ranges]
    if blurry:
        trains = blurred(trains, blurry)
    if chunk:
        trains = shuffled(trains, ranges)
    return [*trains], [_of(test, arrival, ids, np.full(k, min(limit_test or len(test), len(test)))) for ids in ranges]


def without(stream: TaskStream, left_out: Sequence[Collection[int]]) -> TaskStream:
    """The stream less some images: of each of its `collections`, those at the given positions.

    Raises DataError for a class that loses all its training or all its test images.
    """
    kept = [
        np.delete(np.arange(len(images)), list(rows)) for images, rows in zip(stream.collections, left_out, strict=True)
    ]
    B = len(stream.tasks)
    tasks = tuple(_learning(task, rows) for task, rows in zip(stream.tasks, kept[:B], strict=True))
    tests = tuple(taken(test, rows) for test, rows in zip(stream.tests, kept[B : 2 * B], strict=True))
    hidden = iter([taken(images, rows) for images, rows in zip(stream.unlabelled, kept[2 * B :], strict=True)])
    tasks = tuple(
        task if task.unlabelled is None else replace(task, unlabelled=together(next(hidden))) for task in tasks
    )
    less = replace(stream, tasks=tasks, tests=tests)
    for side, before, after in (
        ("training", [task.train for task in stream.tasks], [task.train for task in tasks]),
        ("test", stream.tests, tests),
    ):
        for label in sorted(_shown(before) - _shown(after)):
            raise DataError(
                f"data '{stream.name}': class '{stream.class_names[label]}' loses all its {side} images; repair or add "
                "some, or remove the class"
            )
    return replace(less, fingerprint=_fingerprint(less))


def reduced_stream(stream: TaskStream, side: int | None) -> TaskStream:
    """The stream with JPEGs decoded at no less than `side` pixels along either side (see `cairn.data.images.reduced`); as it is if
    None."""
    if side is None:
        return stream
    tasks = tuple(_reduced(task, side) for task in stream.tasks)
    return replace(stream, tasks=tasks, tests=tuple(reduced(test, side) for test in stream.tests))


def _reduced(task: Task, side: int) -> Task:
    loose = None if task.unlabelled is None else reduced(task.unlabelled, side)
    if task.label_sets is None:
        return replace(task, train=reduced(task.train, side), unlabelled=loose)
    sets = reduced_subset(task.label_sets, side)
    return replace(task, train=sets.copies(), label_sets=sets, unlabelled=loose)


def _learning(task: Task, rows: np.ndarray) -> Task:
    """The task with those of its training images alone."""
    if task.label_sets is None:
        return replace(task, train=taken(task.train, rows))
    _, image = np.nonzero(task.label_sets.targets.T)  # of each of the copies
    sets = task.label_sets.taken(np.unique(image[rows]))
    return replace(task, train=sets.copies(), label_sets=sets)


def _shown(collections: Sequence[Images]) -> set[int]:
    """The classes that there are images of."""
    found: set[int] = set()
    for images in collections:
        present = np.flatnonzero(images.targets.any(0)) if isinstance(images, LabelSets) else images.labels
        found.update(np.unique(present).tolist())
    return found


def without_class(task: Task, c: int) -> Task:
    """The task without class number c; later classes one number lower. Its images may be none."""
    kept = np.flatnonzero(task.train.labels != c)
    labels = task.train.labels[kept]
    names = tuple(name for number, name in zip(task.classes, task.names, strict=True) if number != c)
    start = task.classes.start - (c < task.classes.start)
    images, sets = Subset(task.train, kept, labels - (labels > c)), task.label_sets
    if sets is not None:
        targets = np.delete(sets.targets, c, 1) if c < sets.targets.shape[1] else sets.targets
        sets = LabelSets.of(sets.source, targets, sets.indices)
        sets = sets.taken(np.flatnonzero(targets.any(1)))
    return replace(task, classes=range(start, start + len(names)), names=names, train=images, label_sets=sets)


def _of(images: Images, arrival: np.ndarray, ids: range, limits: np.ndarray) -> Subset:
    """The first images of classes `ids`, class by class in order of arrival, labelled by arrival number; of class c, in its
    natural number, limits[c] at most."""
    members = [np.flatnonzero(images.labels == arrival[i])[: limits[arrival[i]]] for i in ids]
    labels = np.repeat(np.arange(ids.start, ids.stop), [len(m) for m in members])
    return Subset(images, np.concatenate(members), labels.astype(np.int64))


def _ids(sizes: Sequence[int]) -> list[range]:
    """The classes of each task."""
    stops = np.cumsum(sizes).tolist()
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def _check(dataset: Dataset) -> None:
    if not dataset.classes:
        raise DataError(f"data '{dataset.name}': no class found")
    if len(set(dataset.classes)) < len(dataset.classes):
        twice = next(name for name in dataset.classes if dataset.classes.count(name) > 1)
        raise DataError(f"data '{dataset.name}': class '{twice}' appears twice; names must differ")
    if isinstance(dataset.train, LabelSets) != isinstance(dataset.test, LabelSets):
        raise DataError(f"data '{dataset.name}': images of one split may show several classes, those of the other one")
    for split, images in (("train", dataset.train), ("test", dataset.test)):
        sets = isinstance(images, LabelSets)
        counts = images.targets.sum(0) if sets else np.bincount(images.labels, minlength=len(dataset.classes))
        if len(counts) > len(dataset.classes):
            raise DataError(
                f"data '{dataset.name}': {split} has label {len(counts) - 1}, but {len(dataset.classes)} classes"
            )
        empty = [dataset.classes[i] for i in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(
                f"data '{dataset.name}': class '{empty[0]}' has no {split} image; add some or remove the class"
            )


def _fingerprint(stream: TaskStream) -> str:
    digest = hashlib.sha256(json.dumps([stream.class_names, [len(task.classes) for task in stream.tasks]]).encode())
    for images in stream.collections:
        digest.update(b"\0")
        for i in range(len(images)):
            digest.update(f"{images.labels[i]}:{images.describe(i)}\n".encode("utf-8", "surrogateescape"))
        if isinstance(images, LabelSets):
            digest.update(np.packbits(images.targets).tobytes())
    if stream.chunk is not None:
        digest.update(f"\0chunks of {stream.chunk}".encode())
    return digest.hexdigest()[:16]

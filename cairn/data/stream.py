"""A data set as a sequence of tasks, in the field's "B-m Inc-n" protocol (m classes first, then n per task).

Outside, a class is its name; inside, its number in order of arrival. A `Task` carries no test image, by design.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from cairn.data.images import Dataset, Images, Subset
from cairn.errors import ConfigError, DataError


@dataclass(frozen=True)
class Task:
    """What a method is given of task `index`: its classes (arrival numbers), their names, prompts and images."""

    index: int
    classes: range
    names: tuple[str, ...]
    templates: tuple[str, ...]
    train: Images
    descriptions: Descriptions | None = None
    """What the data set says of its classes, if it does; of all of them: a file is one thing."""


@dataclass(frozen=True)
class TaskStream:
    """Tasks to learn and, apart from them, the test images of each task's classes.

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


def class_order(order: str, classes: Sequence[str]) -> np.ndarray:
    """Natural indices in order of arrival.

    `natural`; `seed:N` for `numpy.random.RandomState(N).permutation(k)`, the field's convention;
    or a file with every class name once: JSON or YAML list, or one name per line.
    Raises ConfigError for anything else, naming what is missing or unknown.
    """
    if order == "natural":
        return np.arange(len(classes))
    if order.startswith("seed:"):
        digits = order.removeprefix("seed:")
        if not digits.isdigit() or int(digits) >= 2**32:
            raise ConfigError(f"order '{order}': the seed must be a whole number from 0 to 4294967295")
        return np.random.RandomState(int(digits)).permutation(len(classes))
    path = Path(order)
    if not path.is_file():
        raise ConfigError(f"order '{order}': neither natural, seed:N nor a file")
    names = _listed(path)
    position = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in position]
    missing = [name for name in classes if name not in set(names)]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    for problem, which in (("unknown", unknown), ("missing", missing), ("repeated", repeated)):
        if which:
            shown = ", ".join(map(repr, which[:3])) + (" ..." if len(which) > 3 else "")
            raise ConfigError(f"order file '{order}': {len(which)} {problem} class name(s): {shown}")
    return np.array([position[name] for name in names])


def _listed(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            names = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            names = yaml.safe_load(text)
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"order file '{path}': cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"order file '{path}': must hold one list of class names")
    return names


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


def task_stream(
    dataset: Dataset,
    *,
    base: int = 0,
    step: int = 10,
    order: str = "natural",
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: float = 0.0,
) -> TaskStream:
    """Cut a data set into tasks.

    `limit_*` keep the first so many images of each class. `validation` in (0, 1) sets the test split aside and tests
    on that share of each class's training images instead (seed 0): settings are chosen there, never on the test split.
    """
    if not 0.0 <= validation < 1.0:
        raise ConfigError(f"validation {validation}: must be at least 0 and below 1")
    for flag, limit in (("limit-train", limit_train), ("limit-test", limit_test)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{flag} {limit}: must be at least 1")
    _check(dataset)
    sizes = task_sizes(len(dataset.classes), base, step)
    arrival = class_order(order, dataset.classes)
    names = tuple(dataset.classes[i] for i in arrival)

    train, test = dataset.train, dataset.test
    if validation:
        kept, out = held_out(train, validation, seed=0)
        train, test = Subset(train, kept, train.labels[kept]), Subset(train, out, train.labels[out])

    tasks, tests, start = [], [], 0
    for index, size in enumerate(sizes):
        ids = range(start, start + size)
        images = _of(train, arrival, ids, limit_train)
        tasks.append(Task(index, ids, names[start : start + size], dataset.templates, images, dataset.descriptions))
        tests.append(_of(test, arrival, ids, limit_test))
        start += size
    notices = []
    if len(sizes) > 1 and sizes[-1] < step:
        notices.append(f"the last task has {sizes[-1]} of {step} classes: {len(names)} classes do not divide evenly")
    return TaskStream(
        dataset.name,
        tuple(tasks),
        tuple(tests),
        names,
        base,
        step,
        _fingerprint(names, sizes, tasks, tests),
        tuple(notices),
    )


def _of(images: Images, arrival: np.ndarray, ids: range, limit: int | None) -> Subset:
    """The images of classes `ids`, class by class in order of arrival, labelled by arrival number."""
    members = [np.flatnonzero(images.labels == arrival[i])[:limit] for i in ids]
    labels = np.repeat(np.arange(ids.start, ids.stop), [len(m) for m in members])
    return Subset(images, np.concatenate(members), labels.astype(np.int64))


def _check(dataset: Dataset) -> None:
    if not dataset.classes:
        raise DataError(f"data '{dataset.name}': no class found")
    if len(set(dataset.classes)) < len(dataset.classes):
        twice = next(name for name in dataset.classes if dataset.classes.count(name) > 1)
        raise DataError(f"data '{dataset.name}': class '{twice}' appears twice; names must differ")
    for split, images in (("train", dataset.train), ("test", dataset.test)):
        counts = np.bincount(images.labels, minlength=len(dataset.classes))
        if len(counts) > len(dataset.classes):
            raise DataError(
                f"data '{dataset.name}': {split} has label {len(counts) - 1}, but {len(dataset.classes)} classes"
            )
        empty = [dataset.classes[i] for i in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(
                f"data '{dataset.name}': class '{empty[0]}' has no {split} image; add some or remove the class"
            )


def _fingerprint(names, sizes, tasks: Sequence[Task], tests: Sequence[Images]) -> str:
    digest = hashlib.sha256(json.dumps([names, sizes]).encode())
    for images in [*(task.train for task in tasks), *tests]:
        digest.update(b"\0")
        for i in range(len(images)):
            digest.update(f"{images.labels[i]}:{images.describe(i)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]

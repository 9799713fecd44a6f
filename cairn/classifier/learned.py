"""What a classifier has learned, beside its method's state: one value, replaced whole after each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
from torch import Tensor

from cairn.classifier.calibration import Calibration
from cairn.classifier.drift import Drift
from cairn.classifier.estimate import AccuracyEstimate
from cairn.classifier.label_sets import LearnedSets
from cairn.classifier.record import LearnerRecord
from cairn.data.identity import LearnedPictures
from cairn.data.names import normal_form
from cairn.data.task import Task
from cairn.errors import DataError, suggestion

PICTURES, DECISIONS = "pictures", "decisions"
"""Parts of a learner's folder: hashes of pictures; of label sets, what probabilities and thresholds come from."""


@dataclass(frozen=True, eq=False)
class Learned:
    """Classes in order of arrival, images learned of each, and what else predictions need. Without arguments: nothing yet."""

    classes: np.ndarray = field(default_factory=lambda: np.array([], dtype=object))
    counts: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))
    history: Sequence[dict[str, Any]] = ()
    references: Sequence[float] = ()
    """What the known score is read against, and of each how many classes were known when it was taken."""
    referenced_among: Sequence[int] = ()
    calibration: Calibration = field(default_factory=Calibration)
    pictures: LearnedPictures = field(default_factory=LearnedPictures)
    estimate: AccuracyEstimate = field(default_factory=AccuracyEstimate)
    sets: LearnedSets | None = None
    """Where images may show several classes: what makes probabilities and sets of scores."""

    def numbers(self) -> dict[str, int]:
        """The classes' numbers by name, and by its normal form: a learner made before names were normalised may hold others."""
        exact = {str(name): i for i, name in enumerate(self.classes)}
        return {normal_form(name): i for name, i in exact.items()} | exact

    def number(self, name: str) -> int:
        """Raises DataError for a class that is not known."""
        numbers = self.numbers()
        found = numbers.get(name, numbers.get(normal_form(str(name))))
        if found is None:
            raise DataError(f"class '{name}' is not known; {suggestion(str(name), map(str, self.classes))}")
        return found

    def with_task(
        self,
        task: Task,
        hashes: Sequence[bytes],
        calibration: Calibration,
        references: Sequence[float],
        estimate: AccuracyEstimate,
        drift: Drift | None = None,
        sets: LearnedSets | None = None,
    ) -> Learned:
        """After `task`, whose images have these hashes and those of known classes this drift; where images may show several
        classes a hash for each label, and `sets`."""
        k, labels = len(self.classes), task.train.labels
        classes = np.array([*self.classes, *task.names], dtype=object)
        counts = np.bincount(labels, minlength=len(classes))
        counts[:k] += self.counts
        again = [str(classes[c]) for c in np.unique(labels[labels < k])]
        entry = {
            "date": str(date.today()),
            "new": list(task.names),
            "again": again,
            "images": len(labels),
            "hashed": True,
        }
        if task.unlabelled is not None:
            entry["unlabelled"] = len(task.unlabelled)
        if drift is not None:
            entry["drift"] = drift.model_dump(mode="json")
        if task.label_sets is not None:
            entry |= {"images": len(task.label_sets), "labels": len(labels)}
        return Learned(
            classes,
            counts,
            [*self.history, entry],
            [*self.references, *references],
            [*self.referenced_among, *[len(classes)] * len(references)],
            calibration,
            self.pictures.with_more(hashes, labels),
            estimate,
            sets,
        )

    def without_class(self, c: int) -> Learned:
        """Nothing tells of the class any more; that one was forgotten stays in the history."""
        forgotten = {"date": str(date.today()), "new": [], "again": [], "images": 0, "forgotten": 1}
        less = self._dropped(c)
        return replace(less, history=[*less.history, forgotten])

    def _dropped(self, c: int) -> Learned:
        return replace(
            self,
            classes=np.delete(self.classes, c),
            counts=np.delete(self.counts, c),
            history=_without_name(self.history, str(self.classes[c])),
            pictures=self.pictures.without_class(c),
            estimate=self.estimate.without_class(c),
            sets=None if self.sets is None else self.sets.without_class(c),
        )

    def without_pictures(self, copies: Mapping[tuple[bytes, int], int], taken: np.ndarray) -> Learned:
        """Less these pictures, by hash and class number, each as often as it was learned; a class without any is gone. `taken`
        counts what the learner without them takes them for."""
        counts = self.counts.copy()
        for (_, c), times in copies.items():
            counts[c] -= times
        less = replace(
            self,
            counts=counts,
            pictures=self.pictures.without_pictures(copies),
            estimate=self.estimate.without_images(taken),
        )
        for c in self.emptied(copies):
            less = less._dropped(c)
        out = {"date": str(date.today()), "images": 0, "change": "unlearned", "taken_out": sum(copies.values())}
        return replace(less, history=[*less.history, out])

    def emptied(self, copies: Mapping[tuple[bytes, int], int]) -> list[int]:
        """Numbers of the classes that have no image without these, the last first."""
        out = np.zeros_like(self.counts)
        for (_, c), times in copies.items():
            out[c] += times
        return np.flatnonzero(out >= self.counts)[::-1].tolist()

    def merged(self, c: int, other: int, name: str) -> Learned:
        """As if the images of class `other` had been learned as class c < other, under this name."""
        names = [str(self.classes[c]), str(self.classes[other])]
        classes, counts = np.delete(self.classes, other), self.counts.copy()
        classes[c] = name
        counts[c] += counts[other]
        history = _with_name(_joined(self.history, *names), names[0], name)
        entry = {"date": str(date.today()), "images": 0, "change": "merged", "names": [*names, name]}
        return replace(
            self,
            classes=classes,
            counts=np.delete(counts, other),
            history=[*history, entry],
            pictures=self.pictures.merged(c, other),
            estimate=self.estimate.merged(c, other),
        )

    def relabelled(self, since: int) -> Learned:
        """With what was done after the first `since` entries of the history told as one change."""
        done = self.history[since:]
        entry = {key: value for one in done for key, value in one.items()}
        one = entry | {"change": "relabelled", "taken_out": sum(each.get("taken_out", 0) for each in done)}
        return replace(self, history=[*self.history[:since], one])

    def renamed(self, c: int, name: str) -> Learned:
        """As if class number `c` had come under this name; that it did not is in the history."""
        old, classes = str(self.classes[c]), self.classes.copy()
        classes[c] = name
        entry = {"date": str(date.today()), "images": 0, "change": "renamed", "names": [old, name]}
        return replace(self, classes=classes, history=[*_with_name(self.history, old, name), entry])

    @property
    def tasks(self) -> int:
        """How often images were learned: the number of the task that comes next. What is mended in between does not count, so
        that after it learning goes on as if there had been nothing to mend."""
        return sum(entry["images"] > 0 for entry in self.history)

    @property
    def unhashed(self) -> int:
        """Images that are not known one by one."""
        return sum(entry["images"] for entry in self.history if not entry.get("hashed"))

    @classmethod
    def of_tasks(cls, tasks: Sequence[Task], calibration: Calibration, sets: LearnedSets | None = None) -> Learned:
        """As if the tasks of a run had been given one after another, their images not known one by one. `sets` is what the run
        found where images may show several classes."""
        classes = np.array([name for task in tasks for name in task.names], dtype=object)
        today = str(date.today())
        return cls(
            classes,
            np.bincount(np.concatenate([task.train.labels for task in tasks]), minlength=len(classes)),
            [
                {"date": today, "new": list(task.names), "again": [], "images": len(task.train), "hashed": False}
                | ({} if task.label_sets is None else {"images": len(task.label_sets), "labels": len(task.train)})
                for task in tasks
            ],
            calibration=calibration,
            estimate=AccuracyEstimate().for_classes(len(classes)),
            sets=sets,
        )

    @classmethod
    def of_record(cls, record: LearnerRecord, parts: Mapping[str, Mapping[str, Tensor]]) -> Learned:
        """As it was saved; learners of earlier versions have no hashes of pictures. Raises ValueError for hashes or decisions that are
        none."""
        pictures, rule = parts.get(PICTURES), record.label_sets
        return cls(
            np.array(record.classes, dtype=object),
            np.array(record.counts, dtype=np.int64),
            [entry.model_dump(mode="json", exclude_unset=True) for entry in record.history],
            record.references,
            record.referenced_among or [len(record.classes)] * len(record.references),
            record.calibration,
            LearnedPictures() if pictures is None else LearnedPictures.from_state(pictures, len(record.classes)),
            record.estimate.for_classes(len(record.classes)),
            None if rule is None else LearnedSets.from_state(rule, parts.get(DECISIONS)),
        )

    def to_parts(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors, by the name of the part that they are kept in."""
        decisions = {} if self.sets is None else {DECISIONS: self.sets.state_dict()}
        return {PICTURES: self.pictures.state_dict()} | decisions

    def to_record(self) -> dict[str, Any]:
        """Its part of a LearnerRecord, as JSON holds it."""
        return {
            "classes": list(self.classes),
            "counts": self.counts.tolist(),
            "history": list(self.history),
            "references": list(self.references),
            "referenced_among": list(self.referenced_among),
            "calibration": self.calibration.model_dump(mode="json"),
            "estimate": self.estimate.model_dump(mode="json"),
            "picture_hashes": len(self.pictures),
            **({} if self.sets is None else {"label_sets": self.sets.to_record()}),
        }


def _with_name(history: Sequence[dict[str, Any]], old: str, name: str) -> list[dict[str, Any]]:
    """With what was learned of class `old` told of class `name`."""
    return [
        entry
        | {key: [name if other == old else other for other in entry[key]] for key in ("new", "again") if key in entry}
        | _shifts(entry, lambda one: one | {"name": name} if one["name"] == old else one)
        for entry in history
    ]


def _shifts(entry: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
    """What an entry tells of drift, with the shift of each class changed, or left out where that gives None."""
    if not (drift := entry.get("drift")):
        return {}
    changed = [change(one) for one in drift.get("shifts", [])]
    return {"drift": drift | {"shifts": [one for one in changed if one is not None]}}


def _joined(history: Sequence[dict[str, Any]], name: str, other: str) -> list[dict[str, Any]]:
    """With what was learned of class `other` told of `name`, which came before it or with it."""
    found: list[dict[str, Any]] = []
    known = False
    for entry in _with_name(history, other, name):
        new, again = ([*dict.fromkeys(entry.get(key, []))] for key in ("new", "again"))
        if known and name in new:
            new, again = [own for own in new if own != name], [*dict.fromkeys([*again, name])]
        known = known or name in new
        found.append(entry | {key: names for key, names in (("new", new), ("again", again)) if names or key in entry})
    return found


def _without_name(history: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Without the name, and without those that the class had before it."""
    gone, found = {name}, []
    for entry in reversed(history):
        names = entry.get("names", [])
        if gone.intersection(names):
            gone.update(names)
            entry = entry | {"names": []}
        kept = {key: [other for other in entry[key] if other != name] for key in ("new", "again") if key in entry}
        found.append(entry | kept | _shifts(entry, lambda one: None if one["name"] == name else one))
    return found[::-1]

"""What the folder of a learner says of it, beside its tensors: the schema of the record in the manifest."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cairn.classifier.calibration import Calibration
from cairn.classifier.drift import Drift
from cairn.classifier.estimate import AccuracyEstimate
from cairn.classifier.label_sets import LabelSetRule
from cairn.data.names import text_problem
from cairn.data.templates import template_problem
from cairn.errors import counted
from cairn.storage.schema import Count, Record


def _class_name(name: str) -> str:
    if problem := text_problem(name):
        raise ValueError(problem)
    return name


def _template(template: str) -> str:
    if problem := template_problem(template):
        raise ValueError(problem)
    return template


def _sentence(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


ClassName = Annotated[str, AfterValidator(_class_name)]
Template = Annotated[str, AfterValidator(_template)]
Sentence = Annotated[str, AfterValidator(_sentence)]


Change = Literal["learned", "forgotten", "renamed", "merged", "unlearned", "relabelled", "undone"]

UNDONE: dict[Change, str] = {
    "learned": "learning",
    "forgotten": "forgetting a class",
    "renamed": "renaming a class",
    "merged": "merging two classes",
    "unlearned": "taking images out",
    "relabelled": "relabelling images",
    "undone": "undoing",
}

KEEP = 3
"""States of a learner that stay in its folder: the newest, and those before it that can be gone back to."""


class TowersRecord(Record):
    """The towers that it was learned on, and how they are opened."""

    name: str = Field(min_length=1)
    fingerprint: str = Field(min_length=1)
    precision: Literal["float32", "bfloat16"]
    preprocess: Literal["crop", "squash"] | None = None
    decode: Literal["whole", "reduced"] = "whole"
    revision: str | None = None


class HistoryEntry(Record):
    """What was done at once."""

    date: datetime.date
    new: list[ClassName] = Field(default=[], description="classes learned for the first time")
    again: list[ClassName] = Field(default=[], description="classes of which more was learned")
    images: Count
    hashed: bool = Field(default=False, description="whether its images are known one by one, by their hashes")
    unlabelled: Count = Field(default=0, description="images without labels that came beside them")
    labels: Count = Field(default=0, description="where images may show several classes: labels of all of them")
    given: str | None = Field(
        default=None, description="in place of that in earlier versions: a hash of files and their classes"
    )
    forgotten: Count = 0
    change: Change | None = Field(
        default=None, description="what was done; null: learned, or forgotten if that is not 0"
    )
    names: list[ClassName] = Field(
        default=[], description="of classes that were renamed or merged, the names before and behind them the one after"
    )
    taken_out: Count = Field(default=0, description="images that were taken out of the statistics again")
    undone: Change | None = Field(default=None, description="what was taken back, where that was done")
    drift: Drift | None = Field(
        default=None, description="how images of known classes differed from those learned before them"
    )

    @property
    def kind(self) -> Change:
        return self.change or ("forgotten" if self.forgotten else "learned")

    @property
    def _drifted(self) -> str:
        """What images of known classes told of drift, without the names of classes."""
        if self.drift is None:
            return ""
        return f" (of known classes {self.drift.told})"

    @property
    def told(self) -> str:
        """In words, without the names of classes."""
        again = f", more of {counted(len(self.again), 'known one')}" if self.again else ""
        labels = f" with {counted(self.labels, 'label')}" if self.labels else ""
        beside = f", {counted(self.unlabelled, 'image')} without label beside" if self.unlabelled else ""
        known = labels if self.hashed else f"{labels}, not known one by one"
        learned = f"{counted(len(self.new), 'new class')}{again}, {counted(self.images, 'image')}{known}{beside}{self._drifted}"
        match self.kind:
            case "learned":
                return learned
            case "forgotten":
                return "a class was forgotten"
            case "renamed":
                return "a class was renamed"
            case "merged":
                return "two classes became one"
            case "unlearned":
                return f"{counted(self.taken_out, 'image')} taken out again"
            case "relabelled":
                return f"{counted(self.taken_out, 'image')} taken out again, then {learned}"
            case "undone":
                return f"undone: {UNDONE[self.undone or 'learned']}"


class LearnerRecord(Record):
    """The record of a learner."""

    method: str
    config: dict[str, Any] = Field(description="every setting of the method; its own schema checks them")
    seed: Count
    templates: list[Template] = Field(min_length=1)
    descriptions: dict[ClassName, Annotated[list[Sentence], Field(min_length=1)]] | None
    towers: TowersRecord
    classes: list[ClassName] = Field(description="in order of arrival")
    counts: list[Annotated[int, Field(ge=1)]] = Field(description="images that each class was learned from")
    history: list[HistoryEntry]
    references: list[float] = Field(default=[], description="see `cairn.classifier.novelty`")
    referenced_among: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="of each reference, classes that were known when it was taken; empty: all weigh alike"
    )
    calibration: Calibration = Field(default=Calibration(), description="what the temperature is fitted from")
    estimate: AccuracyEstimate = Field(
        default=AccuracyEstimate(), description="counts of left-out images, of which its accuracy is estimated"
    )
    label_sets: LabelSetRule | None = Field(
        default=None, description="where images may show several classes: how sets of them are made of scores"
    )
    picture_hashes: Count = Field(
        default=0, description="images that are known one by one, per class; see `cairn.data.identity`"
    )
    keep: Annotated[int, Field(ge=1)] = Field(
        default=KEEP, description="states that stay in the folder: this one, and those that `cairn undo` goes back to"
    )
    memory_bytes: Count
    bytes: Count
    versions: dict[str, str]

    @model_validator(mode="after")
    def _fits_together(self) -> LearnerRecord:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name is there twice")
        if len(self.counts) != len(self.classes):
            raise ValueError(f"counts: {len(self.counts)} of them for {len(self.classes)} classes")
        if self.referenced_among and len(self.referenced_among) != len(self.references):
            raise ValueError(f"referenced_among: {len(self.referenced_among)} for {len(self.references)} references")
        if len(self.estimate.doubt) not in (0, len(self.classes)):
            raise ValueError(f"estimate: of {len(self.estimate.doubt)} classes, where there are {len(self.classes)}")
        learned = [name for entry in self.history for name in entry.new]
        if sorted(learned) != sorted(self.classes):
            raise ValueError("history: the classes that were learned are not those in 'classes'")
        if not {name for entry in self.history for name in entry.again} <= set(self.classes):
            raise ValueError("history: a class that was learned again is not in 'classes'")
        if self.label_sets is not None and len(self.label_sets.offsets) != len(self.classes):
            raise ValueError(
                f"label_sets: of {len(self.label_sets.offsets)} classes, where there are {len(self.classes)}"
            )
        if sum(self.counts) > sum(entry.labels or entry.images for entry in self.history):
            raise ValueError("counts: more images than the history tells of")
        return self

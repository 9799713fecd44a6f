"""Visual descriptions of classes: short sentences that say what an image of the class shows.

The file is the contract between whoever wrote the sentences (a vision language model, a person) and the methods that use
them: JSON, sentences keyed by class name, never by position.

    {"schema_version": 1, "classes": {"red fox": {"sentences": ["a bushy tail with a white tip", ...],
     "model": "...", "prompt": "...", "images": ["..."], "date": "2026-01-31"}}}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cairn.data.names import class_name
from cairn.errors import DataError, ResultError, counted
from cairn.storage.files import read_json
from cairn.storage.schema import validated

SCHEMA_VERSION = 1
FILE_NAME = "descriptions.json"
"""Looked for at the top of a folder of images."""


class ClassDescription(BaseModel):
    """The sentences of one class and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sentences: tuple[str, ...] = Field(min_length=1, description="what an image of the class shows, one thing each")
    model: str = Field(default="", description="who wrote them")
    prompt: str = Field(default="", description="what was asked")
    images: tuple[str, ...] = Field(default=(), description="the guide images that were shown")
    date: str = Field(default="", description="when, ISO")

    @field_validator("sentences")
    @classmethod
    def _some_words(cls, sentences: tuple[str, ...]) -> tuple[str, ...]:
        if not all(sentence.strip() for sentence in sentences):
            raise ValueError("a sentence is empty")
        return sentences


class Descriptions(BaseModel):
    """Sentences of classes by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    classes: dict[str, ClassDescription] = Field(default_factory=dict)

    @field_validator("classes")
    @classmethod
    def _names_as_kept(cls, classes: dict[str, ClassDescription]) -> dict[str, ClassDescription]:
        return {class_name(name): said for name, said in classes.items()}

    def of(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """The sentences of these classes, in this order. Raises DataError listing the classes that have none."""
        names = list(names)
        missing = [name for name in names if name not in self.classes]
        if missing:
            shown = ", ".join(map(repr, missing[:5])) + (" ..." if len(missing) > 5 else "")
            raise DataError(
                f"descriptions: none for {len(missing)} of {counted(len(names), 'class')}: {shown}; run `cairn describe`, or set "
                "descriptions=template"
            )
        return tuple(self.classes[name].sentences for name in names)

    def only(self, names: Iterable[str]) -> Descriptions:
        """Those of these classes that have any."""
        return Descriptions(classes={name: self.classes[name] for name in names if name in self.classes})


def read_descriptions(path: str | os.PathLike[str]) -> Descriptions:
    """Raises DataError for a file that is missing, no JSON, of another schema or with an empty sentence."""
    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"descriptions '{path}': no such file; write one with `cairn describe`")
    try:
        stored = read_json(path, links=True)
        version = stored.get("schema_version", SCHEMA_VERSION) if isinstance(stored, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise DataError(f"descriptions '{path}': schema version {version}, this cairn reads {SCHEMA_VERSION}")
        return validated(Descriptions, stored, f"'{path}'", remedy="the schema is in docs/data.md")
    except ResultError as error:
        raise DataError(f"descriptions {error}; write them with `cairn describe`") from None


def written_by(author: str, sentences: Mapping[str, Sequence[str] | str]) -> Descriptions:
    """Descriptions without guide images, by `author`; a single text is one sentence. Raises DataError for a class whose
    sentences are none, empty or no texts."""
    classes = {}
    for name, own in sentences.items():
        own = (own,) if isinstance(own, str) else tuple(own)
        try:
            classes[name] = ClassDescription(sentences=own, model=author)
        except ValidationError:
            raise DataError(f"descriptions of '{name}': {own!r}; give one sentence or more, each a text") from None
    return Descriptions(classes=classes)

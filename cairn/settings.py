"""What settings of a method are: a frozen pydantic model. How they are given and printed is in `cairn.config`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Given(BaseModel):
    """Base of what people ask for, on the command line, in a file or in Python: frozen, and an unknown key is an error.

    Python counts true as 1, and so does pydantic; here a truth value is no number. A path is taken for its text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {
            key: _as_meant(value, fields[key].annotation) if key in fields else value for key, value in values.items()
        }


def _as_meant(value: Any, annotation: Any) -> Any:
    """A path as its text, and a truth value where a number is expected as the word for it, which is refused as any other word is.
    A list where a tuple is expected as one: JSON knows no tuples, and a strict reading takes nothing else for them."""
    kinds = {*_kinds(annotation)}
    if isinstance(value, list | tuple):
        several = [_plain(one, kinds) for one in value]
        return tuple(several) if tuple in kinds else several
    return _plain(value, kinds)


def _plain(value: Any, kinds: set[type]) -> Any:
    if isinstance(value, bool):
        numbers = any(issubclass(kind, int | float) for kind in kinds - {bool})
        return json.dumps(value) if numbers and bool not in kinds else value
    return os.fspath(value) if isinstance(value, os.PathLike) and str in kinds else value


def _kinds(annotation: Any) -> Iterator[type]:
    """The classes that an annotation is made of: list, int and str of `list[int] | str`."""
    if isinstance(kind := get_origin(annotation) or annotation, type):
        yield kind
    for part in get_args(annotation):
        yield from _kinds(part)


class Settings(Given):
    """Settings of a method, or some of them: frozen, and an unknown one is an error."""

    @property
    def alters_images(self) -> bool:
        """Whether with these settings other images than the given ones pass the tower."""
        return False

    @classmethod
    def embedding(cls) -> Self:
        """The defaults on precomputed embeddings."""
        return cls()


class NoSettings(Settings):
    """Of a method that has none."""


def kind_by_name(value: Any) -> Any:
    """A choice may be given by its kind alone: 'lora' for {'kind': 'lora'}."""
    return {"kind": value} if isinstance(value, str) else value

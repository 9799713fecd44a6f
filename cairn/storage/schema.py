"""Schemas of what is written to disk and read back.

A schema is strict: no value is converted, no number is NaN or infinite, and an unknown key is an error, not passed over.
What a later version adds is a field with a neutral default, so that older files still load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cairn.errors import ResultError, one_line
from cairn.storage.versions import versions

REMEDY = "damaged or edited by hand; restore it from a copy"

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1 + 1e-6, allow_inf_nan=False)]
Difference = Annotated[float, Field(ge=-1.001, le=1.001, allow_inf_nan=False)]
"""Of two shares."""

SHOWN = 60
"""Letters of a refused value in a message."""


PLAIN = {
    "int_parsing": "must be a whole number", "int_from_float": "must be a whole number",
    "float_parsing": "must be a number", "bool_parsing": "must be true or false",
}  # fmt: skip
"""What pydantic says at more length, by its types of errors."""


class Record(BaseModel):
    """Base of every schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=BaseModel)


def validated(
    schema: type[Schema], stored: Any, where: str, made_by: str | None = None, remedy: str = REMEDY
) -> Schema:
    """`stored`, a value as JSON holds it, by a schema and without conversions; `where` begins the message.

    `made_by` is the version that wrote it; by default that of its own `versions`. Raises ResultError naming the first value
    that is wrong.
    """
    try:
        return schema.model_validate_json(json.dumps(stored), strict=True)
    except ValidationError as error:
        remedy = newer_version(made_by or _version_in(stored)) or remedy
        raise ResultError(f"{where}: {first_problem(error)}; {remedy}") from None


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings: the key, what is wrong with it, and the value."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{one_line(place)}'"
    reason, value = reason_of(problem), problem["input"]
    shown = "" if isinstance(value, Mapping) or problem["type"] == "missing" else f", not {_short(value)}"
    return f"{one_line(place)}: {reason}{shown}" if place else f"{reason}{shown}"


def reason_of(problem: Mapping[str, Any]) -> str:
    """What pydantic says of a value, as the end of a line."""
    if (plain := PLAIN.get(problem["type"])) is not None:
        return plain
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return reason[:1].lower() + reason[1:]


def newer_version(made_by: str | None) -> str | None:
    """The remedy for a file that a later version of cairn wrote; None if none did."""
    here = versions()["cairn"]
    if made_by is None or _release(made_by) <= _release(here):
        return None
    return f"made by a newer version, cairn {one_line(made_by)[:SHOWN]} (this is {here}); install that one"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(digits[:9]) for digits in re.findall(r"\d+", version.partition("+")[0])[:3])


def _version_in(stored: Any) -> str | None:
    found = stored.get("versions") if isinstance(stored, Mapping) else None
    version = found.get("cairn") if isinstance(found, Mapping) else None
    return version if isinstance(version, str) else None


def _short(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

"""Run files: a call of `cairn run` as TOML. Read, and written by `cairn import`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from cairn.config import values_by_path
from cairn.errors import ConfigError, UnknownName, one_line
from cairn.experiment.schema import RunConfig
from cairn.storage.files import read_bytes
from cairn.storage.schema import reason_of

BYTES, LINE = 2**16, 2**11
"""Longest run file, and line of one, that is read: the parser's memory grows with the square of a key's dots."""


Schema = TypeVar("Schema", bound=BaseModel)

NULL = "null"
"""How a setting is null in TOML, which has no word for it."""

KINDS = {"list_type": "must be a list of values", "dict_type": "must be a table", "model_type": "must be a table"}
"""What TOML calls the kinds of values that have parts, by pydantic's types of errors."""


def toml_value(value: Any) -> Any:
    """A setting's value as a run holds it."""
    return None if value == NULL else value


class RunFile(RunConfig):
    """Any of RunConfig's fields, the seeds of several runs, and where they go. What is not in `model_fields_set` is left to
    the command line and its defaults."""

    method: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  may be left to the command line
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    out: Path | None = None
    # Of the reading, not of the file
    notices: tuple[str, ...] = Field(default=(), description="what whoever runs it should know")
    problem: str | None = Field(default=None, description="why it names no method")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError("must differ")
        return seeds

    @property
    def options(self) -> dict[str, Any]:
        """Values by the names of the command's options: without the settings, to which the command line adds, and the
        seeds, for which it may give a single one."""
        return {key: getattr(self, key) for key in self.model_fields_set & set(KEYS) - {"settings", "seeds"}}


KEYS = tuple(key for key in RunFile.model_fields if key not in ("notices", "problem"))


def checked(schema: type[Schema], values: dict[str, Any], where: str, table: str = "") -> Schema:
    """Values of a file, or of its `table`, by their schema. `where` begins the message.

    Raises UnknownName for a key that is none, ConfigError for a value that does not fit.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        *above, key = (part for part in (table, *map(str, problem["loc"])) if part)
        if problem["type"] == "extra_forbidden":
            raise UnknownName(f"key of [{'.'.join(above)}] in {where}:", key, _keys_of(schema)) from None
        given = list(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
        shown = "" if isinstance(given, dict) else f" = {given!r}"
        reason = KINDS.get(problem["type"]) or reason_of(problem)
        raise ConfigError(f"{where}: {'.'.join([*above, key])}{shown}: {reason}") from None


def _keys_of(schema: type[BaseModel]) -> list[str]:
    """Those of its tables, too."""
    kinds = [kind for field in schema.model_fields.values() for kind in (field.annotation, *get_args(field.annotation))]
    tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [*schema.model_fields, *(key for table in tables for key in _keys_of(table))]


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """Raises ResultError for a file that cannot be read, ConfigError for one that is no TOML."""
    content = read_bytes(path, BYTES, links=True)
    try:
        text = content.decode("utf-8-sig")
        if (longest := max(map(len, text.split("\n")))) > LINE:
            raise ValueError(f"a line of {longest} letters where at most {LINE} are expected")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{kind} '{path}': not TOML: {error}") from None


def read_run_file(path: Path) -> RunFile:
    """Raises ResultError for a file that cannot be read, ConfigError for one that is no TOML or whose values do not fit,
    UnknownName for a key that is none."""
    stored = read_toml(path, "run file")
    if isinstance(stored.get("settings"), dict):
        try:
            values = values_by_path(stored["settings"])
        except RecursionError as error:
            raise ConfigError(f"run file '{path}': not TOML: {error}") from None
        stored["settings"] = {key: toml_value(value) for key, value in values.items()}
    for key in stored:
        if key not in KEYS:
            raise UnknownName(f"key of run file '{path}':", key, KEYS)
    file = checked(RunFile, stored, f"run file '{path}'")
    # `cairn import` writes both, the first of several seeds once more
    if file.seeds is not None and "seed" in stored and file.seed != file.seeds[0]:
        raise ConfigError(
            f"run file '{path}': seed {file.seed}, and seeds that begin with {file.seeds[0]}; leave seed or seeds out"
        )
    return file


def run_file_text(file: RunFile, title: str) -> str:
    """The run file as TOML, headed by `title` and what whoever runs it should know."""
    lines = [f"# {one_line(text)}" for text in (title, *file.notices)]
    lines += [f"{key} = {_toml(getattr(file, key))}" for key in KEYS if key in file.model_fields_set - {"settings"}]
    if file.settings:
        lines += ["", "[settings]"]
        lines += [f"{path} = {_toml(NULL if value is None else value)}" for path, value in file.settings.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON's form of a string, number, truth value or list is TOML's, but for one character."""
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")

"""Sweep files: a run file that all runs share; `[grid]` and `[search]` say what they differ in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from cairn.config import settings as every_setting
from cairn.errors import ConfigError, UnknownName
from cairn.experiment.config_file import KEYS, RunFile, checked, read_toml, toml_value
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import method_named

OPTIONS = tuple(key for key in RunConfig.model_fields if key not in ("seed", "settings"))
"""Options that may vary besides settings and seeds."""

SEARCHED = ("method", "towers", "precision", "preprocess", "template")
"""Options that a search may choose. Any other would change what is measured."""


class Choice(NamedTuple):
    """One value of an axis: values by option, and by setting."""

    options: dict[str, Any]
    settings: dict[str, Any]

    @property
    def shown(self) -> dict[str, str]:
        return {key: text_of(value) for key, value in (self.options | self.settings).items()}


class Range(BaseModel):
    """What a search may choose of one key: a range, or single values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[bool | int | float | str, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _either(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None:
                raise ValueError("must have low and high, or choices")
            if self.log:
                raise ValueError("log goes with low and high, not with choices")
        elif self.low is None or self.high is None:
            raise ValueError("must have low and high, or choices")
        elif self.low >= self.high:
            raise ValueError("low must be less than high")
        elif self.log and self.low <= 0:
            raise ValueError("low must be more than 0 with log")
        return self


class Search(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(ge=1, description="in all, those of earlier calls too")
    sampler: Literal["tpe", "random"] = "tpe"
    metric: Literal["average", "last"] = "average"
    seed: int = Field(default=1, ge=0, le=2**32 - 1, description="of the sampler")
    space: dict[str, Range] = Field(min_length=1, description="by option or setting")


class Resources(BaseModel):
    """What a run is given, and how often it is retried."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    cpus: int = Field(default=1, ge=1, description="cores, and threads")
    gpus: float | None = Field(
        default=None, ge=0, description="a share of one, or several; None: one where there are any"
    )
    memory: ByteSize | None = Field(default=None, ge=1, description="bytes that Ray sets aside, such as 4 GB")
    parallel: int | None = Field(default=None, ge=1, description="runs at once; None: as many as there is room for")
    attempts: int = Field(default=3, ge=1, description="how often a run is begun if its worker is lost")
    checkpoint_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    cache: bool = Field(default=False, description="as `cairn run --cache`")

    @field_validator("gpus")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a share of one, or a whole number")
        return value


class SweepFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: Path
    base: RunFile
    settings: dict[str, Any] = Field(description="of all runs")
    grid: tuple[tuple[Choice, ...], ...] = Field(default=(), description="axes: the runs are their product")
    seeds: tuple[int, ...]
    search: Search | None = None
    resources: Resources = Resources()

    @property
    def methods(self) -> list[str]:
        """Every method that a run may have. Raises ConfigError if there is none."""
        found = [choice.options["method"] for axis in self.grid for choice in axis if "method" in choice.options]
        if self.search is not None and "method" in self.search.space:
            found = list(map(str, self.search.space["method"].choices or ()))
        if not found and self.base.method:
            found = [self.base.method]
        if not found:
            raise ConfigError(f"sweep file '{self.path}': no method; give method = \"dmc\", or several in [grid]")
        return found


def text_of(value: Any) -> str:
    """A value as it is written after --set."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_sweep_file(path: Path) -> SweepFile:
    """Raises ResultError for a file that cannot be read, ConfigError for one that is no TOML or whose values do not fit,
    UnknownName for a key that is none."""
    stored = read_toml(path, "sweep file")
    resources = {key: stored.pop(key) for key in Resources.model_fields if key in stored}
    for key in stored:
        if key not in (*KEYS, "grid", "search"):
            raise UnknownName(f"key of sweep file '{path}':", key, (*KEYS, *Resources.model_fields, "grid", "search"))
    tables = {key: stored.pop(key) for key in ("grid", "search", "settings") if key in stored}
    for key, value in tables.items():
        if not isinstance(value, dict):
            raise _wrong(path, f"{key}: must be a table, [{key}]")
    where = f"sweep file '{path}'"
    base = checked(RunFile, stored, where)
    axes, seeds = _axes(path, tables.get("grid", {}))
    given = base.model_fields_set & {"seed", "seeds"}
    if seeds is not None and given:
        raise _wrong(path, "seeds are given twice; leave them out of [grid]")
    if len(given) == 2:
        raise _wrong(path, "seed and seeds are given; leave one out")
    file = SweepFile(
        path=path,
        base=base,
        settings=_settings(tables.get("settings", {})),
        grid=axes,
        seeds=seeds or base.seeds or (base.seed,),
        search=_search(path, axes, tables["search"]) if "search" in tables else None,
        resources=checked(Resources, resources, where),
    )
    _require_known_settings(file)
    return file


def _wrong(path: Path, problem: str) -> ConfigError:
    return ConfigError(f"sweep file '{path}': {problem}")


def _leaves(table: dict[str, Any], prefix: str = "", stop: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted path and value; `drift` for `drift.kind`. A table that holds one of the keys `stop` is a value itself."""
    for key, value in table.items():
        if isinstance(value, dict) and not any(word in value and not isinstance(value[word], dict) for word in stop):
            yield from _leaves(value, f"{prefix}{key}.", stop)
        else:
            yield f"{prefix}{key}".removesuffix(".kind"), value


def _settings(table: dict[str, Any]) -> dict[str, Any]:
    return {key: toml_value(value) for key, value in _leaves(table)}


def _axes(path: Path, table: dict[str, Any]) -> tuple[tuple[tuple[Choice, ...], ...], tuple[int, ...] | None]:
    """The axes of [grid] in its order, and the seeds if it has any."""
    axes: list[tuple[Choice, ...]] = []
    seeds = None
    for key, values in _leaves(table):
        if not isinstance(values, list) or not values:
            raise _wrong(path, f"grid.{key} = {values!r}: must be a list of values")
        if key in ("seed", "seeds"):
            seeds = checked(RunFile, {"seeds": values}, f"sweep file '{path}'").seeds
        elif key == "settings":
            if not all(isinstance(value, dict) for value in values):
                raise _wrong(path, "grid.settings: must be a list of tables, each a set of settings")
            axes.append(tuple(Choice({}, _settings(value)) for value in values))
        elif key in OPTIONS:
            axes.append(tuple(Choice({key: value}, {}) for value in values))
        else:
            axes.append(tuple(Choice({}, {key.removeprefix("settings."): toml_value(value)}) for value in values))
    names = [name for axis in axes for name in {name for choice in axis for name in choice.shown}]
    if twice := [name for name in names if names.count(name) > 1]:
        raise _wrong(path, f"grid varies '{twice[0]}' twice; leave one out")
    return tuple(axes), seeds


def _search(path: Path, axes: tuple[tuple[Choice, ...], ...], table: dict[str, Any]) -> Search:
    """It leaves alone what the grid varies, and what decides on what its trials are measured."""
    space = dict(_leaves(table.get("space", {}), stop=tuple(Range.model_fields)))
    varied = {name for axis in axes for choice in axis for name in choice.shown}
    for key, value in space.items():
        if not isinstance(value, dict):
            raise _wrong(path, f"search.space.{key}: must be {{low, high}} or {{choices}}")
        if key in varied:
            raise _wrong(path, f"'{key}' is both in [grid] and in [search]; leave one out")
        if key in (*OPTIONS, "seed", "seeds") and key not in SEARCHED:
            raise _wrong(path, f"search.space.{key}: trials would not be comparable; vary it in [grid]")
        if key in SEARCHED and "choices" not in value:
            raise _wrong(path, f"search.space.{key}: must have choices")
    where = f"sweep file '{path}'"
    space = {key: checked(Range, value, where, f"search.space.{key}") for key, value in space.items()}
    return checked(Search, {**table, "space": space}, where, "search")


def _require_known_settings(file: SweepFile) -> None:
    """A key that is neither an option nor, by its first word, a setting of any method that takes part is a mistake."""
    entries = [method_named(name) for name in file.methods]
    known = {name for entry in entries for name in entry.config.model_fields}
    searched = () if file.search is None else file.search.space.keys() - set(SEARCHED)
    for place, keys, options in (
        ("settings", file.settings, ()),
        (
            "grid",
            [key for axis in file.grid for choice in axis for key in choice.settings],
            (*OPTIONS, "seeds", "settings"),
        ),
        ("search.space", searched, SEARCHED),
    ):
        for key in keys:
            if key.partition(".")[0] not in known:
                paths = [path for entry in entries for path, _, _ in every_setting(entry.config())]
                raise UnknownName(f"key of [{place}] in '{file.path}':", key, dict.fromkeys([*options, *paths]))

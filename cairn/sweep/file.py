"""Sweep files: a run file's keys as what all runs share, `[grid]` and `[search]` as what they differ in."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cairn.config import settings as every_setting
from cairn.errors import ConfigError, UnknownName
from cairn.experiment.config_file import BYTES, KEYS, LINE, RunFile, checked
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import method_named
from cairn.storage.files import read_bytes
from cairn.storage.schema import reason_of

OPTIONS = tuple(key for key in RunConfig.model_fields if key not in ("seed", "settings"))
"""Options that may vary besides settings and seeds."""

SEARCHED = ("method", "towers", "precision", "preprocess", "template")
"""Options that a search may choose. Any other would change what is measured."""

LEAF = ("low", "high", "log", "choices")
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Choice(NamedTuple):
    """What one value of an axis stands for: values by option, texts (as after --set) by setting."""

    options: dict[str, Any]
    settings: dict[str, str]

    @property
    def shown(self) -> dict[str, str]:
        return {key: text_of(value) for key, value in self.options.items()} | self.settings


Grid = tuple[tuple[Choice, ...], ...]
"""Axes: the runs are their product."""


class Range(BaseModel):
    """What a search may choose of one key: a range, or single values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _either(self) -> Range:
        if (self.choices is None) == (self.low is None) or (self.low is None) != (self.high is None):
            raise ValueError("must have low and high, or choices")
        if self.choices is not None and self.log:
            raise ValueError("log goes with low and high, not with choices")
        if self.low is not None and not self.low < self.high:
            raise ValueError("low must be less than high")
        if self.log and self.low <= 0:
            raise ValueError("low must be more than 0 with log")
        return self


class Search(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(ge=1, description="in all, those of earlier calls too")
    sampler: Literal["tpe", "random"] = "tpe"
    metric: Literal["average", "last"] = "average"
    seed: int = Field(1, ge=0, le=2**32 - 1, description="of the sampler")
    space: dict[str, Range] = Field(min_length=1, description="by option or setting")


class Resources(BaseModel):
    """What a run is given, and how long it is held on to."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    cpus: int = Field(1, ge=1, description="cores, and threads")
    gpus: float | None = Field(None, ge=0, description="a share of one, or several; None: one where there are any")
    memory: int | None = Field(None, ge=1, description="bytes that Ray sets aside")
    parallel: int | None = Field(None, ge=1, description="runs at once; None: as many as there is room for")
    attempts: int = Field(3, ge=1, description="how often a run is begun if its worker is lost")
    checkpoint_seconds: float = Field(60.0, ge=0, allow_inf_nan=False)
    cache: bool = Field(False, description="as `cairn run --cache`")

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found is None or found[2] not in UNITS:
            raise ValueError("must be a size, such as 4 GB")
        return round(float(found[1]) * UNITS[found[2]])

    @field_validator("gpus")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a share of one, or a whole number")
        return value


class SweepFile(BaseModel):
    """What a sweep is made of."""

    model_config = ConfigDict(frozen=True)

    path: Path
    base: RunFile
    base_settings: dict[str, str]
    grid: Grid = ()
    seeds: tuple[int, ...]
    search: Search | None = None
    resources: Resources = Resources()


def text_of(value: Any) -> str:
    """A value as it is written after --set."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def setting_path(path: str) -> str:
    """A choice is set by its name: `drift` for `drift.kind`."""
    return path.removesuffix(".kind")


def read_sweep_file(path: Path) -> SweepFile:
    """Raises ResultError for a file that cannot be read, ConfigError for one that is no TOML or whose values do not fit,
    UnknownName for a key that is none."""
    stored = _toml(path)
    own = {key: stored.pop(key) for key in ("grid", "search") if key in stored}
    resources = {key: stored.pop(key) for key in Resources.model_fields if key in stored}
    known = (*KEYS, *Resources.model_fields, "grid", "search")
    for key in stored:
        if key not in KEYS:
            raise UnknownName(f"key of sweep file '{path}':", key, known)
    for key, value in {**own, "settings": stored.get("settings", {})}.items():
        if not isinstance(value, dict):
            raise ConfigError(f"sweep file '{path}': {key}: must be a table, [{key}]")
    shared = {setting_path(key): text_of(value) for key, value in _leaves(stored.pop("settings", {}))}
    base = checked(path, stored)
    axes, seeds = _axes(path, own.get("grid", {}))
    if seeds is not None and base.model_fields_set & {"seed", "seeds"}:
        raise ConfigError(f"sweep file '{path}': seeds are given twice; leave them out of [grid]")
    if {"seed", "seeds"} <= base.model_fields_set:
        raise ConfigError(f"sweep file '{path}': seed and seeds are given; leave one out")
    search = None
    if "search" in own:
        table = own["search"]
        space = {setting_path(key): value for key, value in _leaves(table.get("space", {}), stop=LEAF)}
        for key, value in space.items():
            if not isinstance(value, dict):
                raise ConfigError(f"sweep file '{path}': search.space.{key}: must be {{low, high}} or {{choices}}")
            _known(path, f"search.space.{key}", value, LEAF)
        _known(path, "search", table, Search.model_fields)
        search = _valid(path, Search, {**table, "space": space}, "search")
        _different(path, axes, search)
    file = SweepFile(
        path=path, base=base, base_settings=shared, grid=axes, search=search,
        seeds=seeds or base.seeds or (base.seed,), resources=_valid(path, Resources, resources),
    )  # fmt: skip
    _keys_exist(file)
    return file


def methods_of(file: SweepFile) -> list[str]:
    """Every method that a run may have. Raises ConfigError if there is none."""
    found = [file.base.method] if file.base.method else []
    found = [choice.options["method"] for axis in file.grid for choice in axis if "method" in choice.options] or found
    if file.search is not None and "method" in file.search.space:
        found = list(file.search.space["method"].choices or ())
    if not found:
        raise ConfigError(f"sweep file '{file.path}': no method; give method = \"dmc\", or several in [grid]")
    return found


def _toml(path: Path) -> dict[str, Any]:
    content = read_bytes(path, BYTES, links=True)
    try:
        text = content.decode("utf-8-sig")
        if (longest := max(map(len, text.split("\n")))) > LINE:
            raise ValueError(f"a line of {longest} letters where at most {LINE} are expected")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"sweep file '{path}': not TOML: {error}") from None


def _leaves(table: dict[str, Any], prefix: str = "", stop: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted path and value. A table that holds one of the keys `stop` is a value itself."""
    for key, value in table.items():
        if isinstance(value, dict) and not any(word in value and not isinstance(value[word], dict) for word in stop):
            yield from _leaves(value, f"{prefix}{key}.", stop)
        else:
            yield f"{prefix}{key}", value


def _axes(path: Path, table: dict[str, Any]) -> tuple[Grid, tuple[int, ...] | None]:
    """The axes of [grid] in its order, and the seeds if it has any."""
    axes: list[tuple[Choice, ...]] = []
    seeds = None
    for key, values in _leaves(table):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"sweep file '{path}': grid.{key} = {values!r}: must be a list of values")
        if key in ("seed", "seeds"):
            seeds = checked(path, {"seeds": values}).seeds
        elif key == "settings":
            if not all(isinstance(value, dict) for value in values):
                raise ConfigError(
                    f"sweep file '{path}': grid.settings: must be a list of tables, each a set of settings"
                )
            sets = [{setting_path(inner): text_of(v) for inner, v in _leaves(value)} for value in values]
            axes.append(tuple(Choice({}, one) for one in sets))
        elif key in OPTIONS:
            axes.append(tuple(Choice({key: value}, {}) for value in values))
        else:
            setting = setting_path(key.removeprefix("settings."))
            axes.append(tuple(Choice({}, {setting: text_of(value)}) for value in values))
    names = [name for axis in axes for name in dict.fromkeys(name for choice in axis for name in choice.shown)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"sweep file '{path}': grid varies '{twice[0]}' twice; leave one out")
    return tuple(axes), seeds


def _different(path: Path, grid: Grid, search: Search) -> None:
    """A search leaves alone what the grid varies, and what decides on what its trials are measured."""
    varied = {name for axis in grid for choice in axis for name in choice.shown}
    for key in search.space:
        if key in varied:
            raise ConfigError(f"sweep file '{path}': '{key}' is both in [grid] and in [search]; leave one out")
        if key in (*OPTIONS, "seed", "seeds") and key not in SEARCHED:
            raise ConfigError(
                f"sweep file '{path}': search.space.{key}: trials would not be comparable; vary it in [grid]"
            )
        if key in SEARCHED and search.space[key].choices is None:
            raise ConfigError(f"sweep file '{path}': search.space.{key}: must have choices")


def _keys_exist(file: SweepFile) -> None:
    """A key that is neither an option nor, by its first word, a setting of any method that takes part is a mistake."""
    entries = [method_named(name) for name in methods_of(file)]
    known = {name for entry in entries for name in entry.config.model_fields}
    paths = [path for entry in entries for path, _, _ in every_setting(entry.config())]
    places = {
        "settings": file.base_settings, "grid": [key for axis in file.grid for choice in axis for key in choice.settings],
        "search.space": [] if file.search is None else [key for key in file.search.space if key not in SEARCHED],
    }  # fmt: skip
    for place, keys in places.items():
        for key in keys:
            if key.partition(".")[0] not in known:
                options = {"settings": (), "grid": (*OPTIONS, "seeds", "settings"), "search.space": SEARCHED}[place]
                raise UnknownName(f"key of [{place}] in '{file.path}':", key, dict.fromkeys([*options, *paths]))


def _known(path: Path, place: str, table: dict[str, Any], keys: Sequence[str]) -> None:
    for key in table:
        if key not in keys:
            raise UnknownName(f"key of [{place}] in '{path}':", key, keys)


def _valid(path: Path, form: type[BaseModel], values: dict[str, Any], place: str = "") -> Any:
    try:
        return form.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(part for part in (place, *map(str, problem["loc"])) if part)
        shown = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
        raise ConfigError(f"sweep file '{path}': {where}{shown}: {reason_of(problem)}") from None

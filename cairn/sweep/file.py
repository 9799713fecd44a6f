"""Sweep files: a run file that all runs share; `[grid]` and `[search]` say what they differ in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, ConfigDict, Field, field_validator, model_validator

from cairn.config import settings as every_setting
from cairn.errors import ConfigError, UnknownName
from cairn.experiment.config_file import KEYS, RunFile, checked, read_toml, toml_value
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import method_named
from cairn.settings import Given

OPTIONS = tuple(key for key in RunConfig.model_fields if key not in ("seed", "settings"))
"""Options that may vary besides settings and seeds."""

SEARCHED = ("method", "towers", "precision", "preprocess", "template")
"""Options that a search may choose. Any other would change what is measured."""

SETTING = "settings."
"""Before the path of a setting, where it stands among options."""

Choice = dict[str, Any]
"""Values by option, or by `settings.` and the path of a setting."""


def _leaves(table: dict[str, Any], prefix: str = "", stop: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted path and value; `drift` for `drift.kind`. A table that holds one of the keys `stop` is a value itself."""
    for key, value in table.items():
        if isinstance(value, dict) and not any(word in value and not isinstance(value[word], dict) for word in stop):
            yield from _leaves(value, f"{prefix}{key}.", stop)
        else:
            yield f"{prefix}{key}".removesuffix(".kind"), value


def _flat(table: Any) -> Any:
    return dict(_leaves(table)) if isinstance(table, dict) else table


def _flat_space(table: Any) -> Any:
    return dict(_leaves(table, stop=tuple(Range.model_fields))) if isinstance(table, dict) else table


class Range(Given):
    """What a search may choose of one key: a range, or single values."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[bool | int | float | str, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _either(self) -> Range:
        ends = [end for end in (self.low, self.high) if end is not None]
        if len(ends) != (2 if self.choices is None else 0):
            raise ValueError("must have low and high, or choices")
        if ends and ends[0] >= ends[1]:
            raise ValueError("low must be less than high")
        if self.log and (not ends or ends[0] <= 0):
            raise ValueError("log goes with low and high, and low must be more than 0")
        return self


class Search(Given):
    trials: int = Field(ge=1, description="in all, those of earlier calls too")
    sampler: Literal["tpe", "random"] = "tpe"
    metric: Literal["average", "last"] = "average"
    seed: int = Field(default=1, ge=0, le=2**32 - 1, description="of the sampler")
    space: Annotated[dict[str, Range], BeforeValidator(_flat_space)] = Field(
        min_length=1, description="by option or setting"
    )


class Resources(Given):
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


class SweepFile(RunFile, Resources):
    settings: Annotated[dict[str, Any], BeforeValidator(_flat)] = Field(default={}, description="of all runs")
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_flat)] = Field(
        default={}, description="values by option, setting, or `settings`; the runs are their product"
    )
    search: Search | None = None
    path: Path = Field(default=Path("sweep.toml"), description="of the file, not in it")

    @property
    def where(self) -> str:
        return f"sweep file '{self.path}'"

    @property
    def shared(self) -> Choice:
        """What all runs have, where the grid does not say otherwise."""
        return {key: value for key, value in self.options.items() if key in OPTIONS} | _settings(self.settings)

    @property
    def axes(self) -> list[list[Choice]]:
        return [
            [_settings(value) if path == "settings" else option_or_setting(path, value) for value in values]
            for path, values in self.grid.items()
        ]

    @property
    def methods(self) -> list[str]:
        """Every method that a run may have. Raises ConfigError if there is none."""
        searched = self.search.space.get("method") if self.search is not None else None
        found = (searched and searched.choices) or self.grid.get("method") or [self.method]
        if found == [None]:
            raise ConfigError(f'{self.where}: no method; give method = "dmc", or several in [grid]')
        return list(map(str, found))


def shown(choice: Choice) -> dict[str, str]:
    """Each value as it is written after --set."""
    texts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in choice.items()}
    return {key.removeprefix(SETTING): text for key, text in texts.items()}


def option_or_setting(path: str, value: Any) -> Choice:
    return {path: value} if path in OPTIONS else {SETTING + path.removeprefix(SETTING): toml_value(value)}


def _settings(values: dict[str, Any]) -> Choice:
    return {SETTING + path: toml_value(value) for path, value in _leaves(values)}


def read_sweep_file(path: Path) -> SweepFile:
    """Raises ResultError for a file that cannot be read, ConfigError for one that is no TOML or whose values do not fit,
    UnknownName for a key that is none."""
    known = (*KEYS, *Resources.model_fields, "grid", "search")
    stored, where = read_toml(path, "sweep file"), f"sweep file '{path}'"
    for key in stored:
        if key not in known:
            raise UnknownName(f"key of {where}:", key, known)
    grid = stored.get("grid")
    seeds = [grid.pop(key) for key in ("seed", "seeds") if key in grid] if isinstance(grid, dict) else []
    if len(seeds) + len(stored.keys() & {"seed", "seeds"}) > 1:
        raise ConfigError(f"{where}: seeds are given twice; leave one out")
    if seeds:
        stored["seeds"] = seeds[0]
    file = checked(SweepFile, stored, where).model_copy(update={"path": path})
    _require_different(file)
    _require_known(file)
    return file


def _require_different(file: SweepFile) -> None:
    """Raises ConfigError for what varies twice, and for a search over what decides on what its trials are measured."""
    if not all(isinstance(value, dict) for value in file.grid.get("settings", [])):
        raise ConfigError(f"{file.where}: grid.settings: must be a list of tables, each a set of settings")
    names = [name for axis in file.axes for name in {name for choice in axis for name in shown(choice)}]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{file.where}: grid varies '{twice[0]}' twice; leave one out")
    for key, one in (file.search.space if file.search is not None else {}).items():
        if key in names:
            raise ConfigError(f"{file.where}: '{key}' is both in [grid] and in [search]; leave one out")
        if key in SEARCHED and one.choices is None:
            raise ConfigError(f"{file.where}: search.space.{key}: must have choices")
        if key in (*OPTIONS, "seed", "seeds") and key not in SEARCHED:
            raise ConfigError(f"{file.where}: search.space.{key}: trials would not be comparable; vary it in [grid]")


def _require_known(file: SweepFile) -> None:
    """A key that is neither an option nor, by its first word, a setting of any method that takes part is a mistake."""
    entries = [method_named(name) for name in file.methods]
    known = {name for entry in entries for name in entry.config.model_fields}
    varied = [name for axis in file.axes for choice in axis for name in choice]
    searched = [] if file.search is None else [name for key in file.search.space for name in option_or_setting(key, 0)]
    places = {
        "settings": (file.shared, ()),
        "grid": (varied, (*OPTIONS, "seeds")),
        "search.space": (searched, SEARCHED),
    }
    for place, (names, options) in places.items():
        for name in names:
            path = name.removeprefix(SETTING)
            if path != name and path.partition(".")[0] not in known:
                paths = [path for entry in entries for path, _, _ in every_setting(entry.config())]
                raise UnknownName(f"key of [{place}] in '{file.path}':", path, dict.fromkeys([*options, *paths]))

"""Published figures: what was measured, in which setting, and where that stands. `published.toml` holds those of the field."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from cairn.errors import ConfigError, UnknownName
from cairn.experiment.config_file import read_toml
from cairn.experiment.schema import SettingValues
from cairn.storage.schema import Record, first_problem

UNKNOWN = "?"
"""Stands for an accuracy that was not published."""

Percent = Annotated[float, Field(ge=0, le=100)] | Literal["?"]


class Setting(Record):
    """What runs have in common that are held against one another."""

    title: str
    towers: list[str] = Field(min_length=1, description="the weights, by any of their names")
    order: str
    preprocess: Literal["crop", "squash"] | None = None
    template: str | None = Field(default=None, description="unset: those of the data set")
    activation: Literal["gelu", "quick_gelu"] | None = None
    limit_train: int | None = None
    limit_test: int | None = None


class Copy(Record):
    """How large the copy of a data set is that figures were measured on."""

    key: str
    classes: int
    train: int | None = None
    test: int | None = None
    note: str = ""


class Approach(Record):
    """How a method is run to be held against its figures."""

    settings: SettingValues = Field(default={})
    differs: str = Field(default="", description="what is known to differ from how the figure was made")
    needs: str | None = Field(default=None, description="a setting without which the figure cannot be expected")


class Source(Record):
    name: str
    cite: str = Field(description="paper and table")
    seen: str = Field(default="", description="how far it was read")
    setting: str
    differs: str = ""
    figures: list[tuple[str, int, int, str, Percent, Percent]] = Field(
        description="data set, first task, step, method, average, last; in percent"
    )


class Published(Record):
    """A file of figures."""

    settings: dict[str, Setting]
    data: list[Copy] = Field(default=[])
    methods: dict[str, Approach] = Field(default={})
    source: list[Source]

    def copy_of(self, key: str) -> Copy | None:
        return next((copy for copy in self.data if copy.key == key), None)

    def approach(self, method: str) -> Approach:
        return self.methods.get(method, Approach())

    def setting_of(self, towers: str, where: str) -> str:
        """Name of the setting that has these towers. Raises ConfigError if none or several have them."""
        found = [name for name, setting in self.settings.items() if towers in setting.towers]
        if len(found) == 1:
            return found[0]
        known = "; ".join(f"{name}: {', '.join(setting.towers)}" for name, setting in self.settings.items())
        raise ConfigError(f"towers '{towers}': no setting of {where} names them ({known}); say which with --setting")

    def figures(self, setting: str, data: str) -> list[Figure]:
        """Every figure of a data set in a setting, in the order of the file."""
        return [
            Figure(base, step, method, _share(average), _share(last), source)
            for source in self.source
            if source.setting == setting
            for key, base, step, method, average, last in source.figures
            if key == data
        ]


class Figure(NamedTuple):
    """A published result, accuracies in [0, 1]."""

    base: int
    step: int
    method: str
    average: float | None
    last: float | None
    source: Source


def _share(percent: float | str) -> float | None:
    return None if isinstance(percent, str) else percent / 100


def published(path: Path | None = None) -> Published:
    """The figures of `path`, those of the field if there is none.

    Raises ResultError for a file that cannot be read, ConfigError for one that is no TOML or does not fit.
    """
    if path is None:
        text = resources.files("cairn.reproduce").joinpath("published.toml").read_text(encoding="utf-8")
        return _checked(tomllib.loads(text), "published.toml")
    return _checked(read_toml(path, "figures"), f"figures '{path}'")


def _checked(stored: dict[str, Any], where: str) -> Published:
    try:
        # TOML's whole numbers stand for percents, and its arrays for rows
        found = Published.model_validate(stored, strict=False)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error)}") from None
    for source in found.source:
        if source.setting not in found.settings:
            raise UnknownName(f"setting of source '{source.name}' in {where}:", source.setting, found.settings)
    return found

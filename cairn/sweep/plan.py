"""The runs of a sweep: named after what varies, checked before the first of them begins, and found where they are already."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from cairn.config import with_settings
from cairn.errors import CairnError, ConfigError, ResultError
from cairn.experiment.config_file import checked
from cairn.experiment.folder import CALL, RESULT, read_call, read_result, seen_otherwise
from cairn.experiment.inputs import Prepared, prepared
from cairn.experiment.schema import RunConfig, RunResult, comparable_call, usual_step
from cairn.methods.catalogue import method_named
from cairn.sweep.file import SETTING, Choice, Range, SweepFile, shown

NAME = 120
"""Longest name of a folder."""

CORNERS = 256
"""Combinations of a search's values that are tried before it begins."""


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone, and what sets them apart from the others."""

    name: str
    varies: dict[str, str]
    config: RunConfig
    seeds: tuple[int, ...]
    choice: Choice

    def runs(self) -> list[tuple[str, RunConfig]]:
        """Folder, below the sweep's, and config of each."""
        return [(f"{self.name}/seed-{seed}", self.config.model_copy(update={"seed": seed})) for seed in self.seeds]


def points_of(file: SweepFile) -> list[Point]:
    """The product of the grid's axes; without a grid a single point. Raises ConfigError for a value that does not fit."""
    found: dict[str, Point] = {}
    for choices in itertools.product(*file.axes):
        point = point_with(file, {key: value for choice in choices for key, value in choice.items()})
        found.setdefault(point.name, point)
    return list(found.values())


def point_with(file: SweepFile, choice: Choice, name: str = "") -> Point:
    values, seeds = file.shared | choice, file.seeds or (file.seed,)
    values.setdefault("method", file.methods[0])
    values.setdefault("step", usual_step(str(values.get("data", "shapes"))))
    # What has parts comes before its parts: a choice is made before what was chosen is changed
    settings = sorted((key for key in values if key.startswith(SETTING)), key=lambda key: key.count("."))
    ordered = {key.removeprefix(SETTING): values.pop(key) for key in settings}
    call = {**values, "settings": ordered, "seed": seeds[0]}
    config, varies = checked(RunConfig, call, file.where), shown(choice)
    if not name:
        chosen_later = file.search is not None and "method" in file.search.space
        name = folder_name("search" if chosen_later else config.method, varies)
    return Point(name, varies, config, seeds, choice)


def folder_name(first: str, varies: Mapping[str, str]) -> str:
    """`first`, usually the method, then what varies. Characters that are not safe in a path are replaced, and then a hash
    keeps the name unique."""
    parts = [first, *(f"{key}={text}" for key, text in varies.items() if key != "method")]
    exact = ",".join(parts)
    plain = re.sub("[^A-Za-z0-9._+=,-]", "-", exact)
    if plain == exact and len(exact) <= NAME and not any("," in part for part in parts[1:]):
        return exact
    return f"{plain[:NAME]}~{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


def corners(space: Mapping[str, Range]) -> Iterator[dict[str, Any]]:
    """The lower and the upper ends of ranges, with all combinations of choices: the first CORNERS of them."""
    choices = [key for key, one in space.items() if one.choices is not None]
    for values in itertools.islice(itertools.product(*(space[key].choices or () for key in choices)), CORNERS):
        for end in ("low", "high"):
            yield {key: getattr(one, end) for key, one in space.items()} | dict(zip(choices, values, strict=True))


class Checks:
    """Checks runs before they begin. Data and towers are opened once for all runs that share them."""

    def __init__(self) -> None:
        self._opened: dict[str, Prepared] = {}
        self._settings: dict[str, BaseModel] = {}

    def settings(self, config: RunConfig, name: str) -> BaseModel:
        """Every setting of the run's method. Raises ConfigError, naming the run, for whatever it would refuse."""
        run = config.model_copy(update={"seed": 0}).model_dump_json()
        if run not in self._settings:
            try:
                self._settings[run] = self._checked(config)
            except CairnError as error:
                raise ConfigError(f"run '{name}': {error}") from None
        return self._settings[run]

    def _checked(self, config: RunConfig) -> BaseModel:
        entry = method_named(config.method)
        try:  # whether it is there shows where the run is
            torch.device("cpu" if config.device == "auto" else config.device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device '{config.device}': {reason}; try auto or cpu") from None
        towers = self._data(config).towers
        settings = with_settings(entry.default_config(towers), config.settings)
        entry.build(towers, settings, seed=config.seed)
        return settings

    def require_same_data(self, result: RunResult, name: str) -> None:
        """Raises ResultError for a stored run of other images or towers than its call finds today."""
        today = self._data(result.run)
        if what := seen_otherwise(result, today.stream.fingerprint, today.towers.fingerprint):
            raise ResultError(
                f"run '{name}' saw other {what} than its call finds today, so its figures do not compare with those to come: give "
                "another --out"
            )

    def _data(self, config: RunConfig) -> Prepared:
        # On the CPU: the machine that plans need not have an accelerator
        data = config.model_copy(update={"method": "zero-shot", "settings": {}, "seed": 0, "device": "cpu"})
        key = data.model_dump_json()
        if key not in self._opened:
            self._opened[key] = prepared(data)
        return self._opened[key]

    def forget_data(self) -> None:
        self._opened.clear()


def identities(config: RunConfig, settings: Mapping[str, Any]) -> tuple[str, str]:
    """A run as it was called, and with every setting that it then has: equal for equal runs, however they were written."""
    call = comparable_call(config.model_dump(mode="json"))
    return json.dumps(call, sort_keys=True), json.dumps(call | {"settings": settings}, sort_keys=True)


def stored_runs(folder: Path) -> tuple[dict[str, str], dict[str, RunResult]]:
    """Names of the runs that are below a folder by their identities, and results by name. An older sweep that varied less has
    named its folders otherwise. Raises ResultError for one that cannot be read."""
    names: dict[str, str] = {}
    results: dict[str, RunResult] = {}
    for path in sorted(folder.rglob(RESULT)):
        name = path.parent.relative_to(folder).as_posix()
        results[name] = result = read_result(path)
        for key in identities(result.run, result.config):
            names.setdefault(key, name)
    for path in sorted(folder.rglob(CALL)):
        call = read_call(path.parent)
        if call.seeds is None:
            names.setdefault(identities(call.run, {})[0], path.parent.relative_to(folder).as_posix())
    return names, results

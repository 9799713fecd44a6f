"""The runs of a sweep: named after what varies, and checked before the first of them begins."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from cairn.config import with_settings
from cairn.errors import CairnError, ConfigError, ResultError
from cairn.experiment.config_file import checked
from cairn.experiment.folder import CALL, RESULT, read_call, read_result
from cairn.experiment.inputs import Prepared, prepared
from cairn.experiment.schema import RunConfig, RunResult, comparable_call, usual_step
from cairn.methods.catalogue import method_named
from cairn.sweep.file import Choice, Range, SweepFile

NAME = 120
"""Longest name of a folder."""

CORNERS = 256
"""Combinations of a search's choices that are tried before it begins."""


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone, and what sets them apart from the others."""

    name: str
    varies: dict[str, str]
    config: RunConfig
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...] = ()

    def runs(self) -> list[tuple[str, RunConfig]]:
        """Folder, below the sweep's, and config of each."""
        return [(f"{self.name}/seed-{seed}", self.config.model_copy(update={"seed": seed})) for seed in self.seeds]


def points_of(file: SweepFile) -> list[Point]:
    """The product of the grid's axes; without a grid a single point. Raises ConfigError for a value that does not fit."""
    found: dict[str, Point] = {}
    for choices in itertools.product(*file.grid):
        point = point_with(file, choices)
        found.setdefault(point.name, point)
    return list(found.values())


def point_with(file: SweepFile, choices: Sequence[Choice], name: str = "") -> Point:
    options = {key: value for key, value in file.base.options.items() if key not in ("out", "seed")}
    settings, varies = dict(file.settings), {}
    for choice in choices:
        options |= choice.options
        settings |= choice.settings
        varies |= choice.shown
    options.setdefault("method", file.methods[0])
    options.setdefault("step", usual_step(str(options.get("data", "shapes"))))
    # What has parts comes before its parts: a choice is made before what was chosen is changed
    ordered = sorted(settings.items(), key=lambda item: item[0].count("."))
    options["settings"] = dict(ordered)
    config = checked(RunConfig, {**options, "seed": file.seeds[0]}, f"sweep file '{file.path}'")
    if not name:
        chosen_later = file.search is not None and "method" in file.search.space
        name = folder_name("search" if chosen_later else config.method, varies)
    return Point(name, varies, config, file.seeds, tuple(choices))


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
    """Values for every key: all combinations of choices (the first CORNERS of them) with the lower and the upper ends."""
    choices = {key: one.choices for key, one in space.items() if one.choices is not None}
    ranges = {key: one for key, one in space.items() if one.choices is None}
    for picked in itertools.islice(itertools.product(*choices.values()), CORNERS):
        for ends in ({key: one.low for key, one in ranges.items()}, {key: one.high for key, one in ranges.items()}):
            values = dict(zip(choices, picked, strict=True)) | ends
            yield {key: values[key] for key in space}
            if not ranges:
                break


class Checks:
    """Checks runs before they begin. Data and towers are opened once for all runs that share them."""

    def __init__(self) -> None:
        self._opened: dict[str, Prepared] = {}
        self._settings: dict[tuple[str, str, str], BaseModel] = {}

    def settings(self, config: RunConfig, name: str) -> BaseModel:
        """Every setting of the run's method. Raises ConfigError, naming the run, for whatever it would refuse."""
        shared = config.model_copy(update={"method": "zero-shot", "settings": {}, "seed": 0}).model_dump_json()
        key = (shared, config.method, json.dumps(config.settings))
        if key not in self._settings:
            try:
                entry = method_named(config.method)
                _require_device(config.device)
                if shared not in self._opened:
                    # On the CPU: the machine that plans need not have an accelerator
                    self._opened[shared] = prepared(config.model_copy(update={"device": "cpu"}))
                towers = self._opened[shared].towers
                settings = with_settings(entry.default_config(towers), config.settings)
                entry.build(towers, settings, seed=config.seed)
            except CairnError as error:
                raise ConfigError(f"run '{name}': {error}") from None
            self._settings[key] = settings
        return self._settings[key]

    def identity(self, config: RunConfig, name: str) -> str:
        """Equal for runs whose every setting is equal, however they were written."""
        return _identity(config, self.settings(config, name).model_dump(mode="json"))

    def forget_data(self) -> None:
        self._opened.clear()


def _require_device(name: str) -> None:
    """Raises ConfigError for a device that torch does not know; whether it is there shows where the run is."""
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}': {str(error).splitlines()[0]}; try auto or cpu") from None


def _identity(config: RunConfig, settings: Mapping[str, Any]) -> str:
    call = comparable_call(config.model_dump(mode="json", exclude={"settings"}))
    return json.dumps([call, settings], sort_keys=True)


def _call(config: RunConfig) -> str:
    return json.dumps(comparable_call(config.model_dump(mode="json")), sort_keys=True)


class Stored:
    """Runs that are below a folder already, finished or not. Raises ResultError for one that cannot be read."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: dict[str, str] = {}
        self._configs: dict[str, RunConfig] = {}
        self.results: dict[str, RunResult] = {}
        for path in sorted(folder.rglob(RESULT)):
            result = read_result(path)
            name = self._keep(path, result.run, _identity(result.run, result.config))
            self.results[name] = result
        for path in sorted(folder.rglob(CALL)):
            call = read_call(path.parent)
            if call.seeds is None:
                self._keep(path, call.run)

    def _keep(self, path: Path, config: RunConfig, *keys: str) -> str:
        name = path.parent.relative_to(self._folder).as_posix()
        self._configs.setdefault(name, config)
        for key in (_call(config), *keys):
            self._names.setdefault(key, name)
        return name

    def name(self, name: str, config: RunConfig, identity: str) -> str:
        """The folder of the run as it is there, maybe another one: a sweep that varies more names its folders otherwise.

        Raises ResultError if its folder holds another run.
        """
        found = self._names.get(_call(config)) or self._names.get(identity)
        if found is None and name in self._configs:
            ours, theirs = (comparable_call(one.model_dump()) for one in (config, self._configs[name]))
            key = next((key for key in ours if ours[key] != theirs[key]), "settings")
            raise ResultError(
                f"'{self._folder / name}' holds another run ({key} {theirs[key]}, not {ours[key]}): what all runs share has "
                "changed; give another --out"
            )
        return found or name

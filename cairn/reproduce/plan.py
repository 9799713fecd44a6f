"""What a reproduction runs, in which order, and about how long that takes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cairn.config import settings as every_setting
from cairn.config import with_settings
from cairn.data.catalogue import CATALOGUE
from cairn.data.images import Dataset, Images
from cairn.data.stream import task_sizes
from cairn.errors import ConfigError, UnknownName
from cairn.experiment.inputs import tower_stands
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.reproduce.figures import Figure, Published, Setting
from cairn.towers.protocol import Towers

FIRST = ("zero-shot", "simplecil", "ranpac")
"""Methods that need one pass of a frozen tower: what they show wrong is wrong in towers, data or setting."""

OURS = ("blend",)
"""Run beside them, though nobody else has published it."""

SAMPLE = 32
"""Images whose pass is timed."""

WITH_GRADIENTS = 3
"""Passes forward that a pass forward and backward takes."""


class Run(NamedTuple):
    """One run of a reproduction, in a folder of its own below that of its method."""

    method: str
    seed: int
    config: RunConfig

    @property
    def place(self) -> Path:
        return Path(self.method) / f"seed-{self.seed}"


@dataclass(frozen=True)
class Reproduction:
    """A data set, a setting and a protocol, and all figures that were published for them."""

    data: str
    key: str
    towers: str
    setting_name: str
    setting: Setting
    base: int
    step: int
    seeds: tuple[int, ...]
    figures: tuple[Figure, ...]
    published: Published
    methods: tuple[str, ...]
    settings: dict[str, object]
    """Further settings of methods, by METHOD.path."""
    device: str = "auto"
    precision: str = "float32"

    def runs(self) -> list[Run]:
        """Methods that need a pass of the frozen tower first, then the others as they are listed."""
        order = sorted(
            self.methods, key=lambda name: (FIRST + OURS).index(name) if name in FIRST + OURS else len(FIRST + OURS)
        )
        return [Run(method, seed, self._config(method, seed)) for method in order for seed in self.seeds]

    def _config(self, method: str, seed: int) -> RunConfig:
        own = {
            path.partition(".")[2]: value for path, value in self.settings.items() if path.partition(".")[0] == method
        }
        return RunConfig(
            method=method,
            data=self.data,
            towers=self.towers,
            base=self.base,
            step=self.step,
            order=self.setting.order,
            seed=seed,
            settings={**self.published.approach(method).settings, **own},  # pyright: ignore[reportArgumentType]
            limit_train=self.setting.limit_train,
            limit_test=self.setting.limit_test,
            preprocess=self.setting.preprocess,
            template=self.setting.template,
            device=self.device,
            precision="bfloat16" if self.precision == "bfloat16" else "float32",
        )

    def figures_of(self, method: str) -> list[Figure]:
        return [figure for figure in self.figures if figure.method == method]


def reproduction(
    data: str,
    towers: str,
    published: Published,
    *,
    setting: str | None = None,
    base: int | None = None,
    step: int | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    methods: Sequence[str] | None = None,
    settings: dict[str, object] | None = None,
    device: str = "auto",
    precision: str = "float32",
    where: str = "the figures",
) -> Reproduction:
    """What is to be run for `data`, `KEY` or `KEY=PATH`, or a features file called like the key.

    Without `base` and `step` the first protocol that has figures. Raises UnknownName, ConfigError for what has no figures.
    """
    name = setting or published.setting_of(towers, where)
    if name not in published.settings:
        raise UnknownName("setting", name, published.settings)
    key = _key(data)
    if key in CATALOGUE and CATALOGUE[key].published and data.partition("=")[0] == key:
        data = data.replace(key, f"{key}:published", 1)
    found = published.figures(name, key)
    if not found:
        keys = dict.fromkeys(row[0] for source in published.source if source.setting == name for row in source.figures)
        raise UnknownName(f"data set with figures in setting {name}:", key, keys)
    protocols = list(dict.fromkeys((figure.base, figure.step) for figure in found))
    wanted = (base if base is not None else protocols[0][0], step if step is not None else protocols[0][1])
    if (base, step) != (None, None) and wanted not in protocols:
        known = ", ".join(f"--base {b} --step {s}" for b, s in protocols)
        raise ConfigError(f"--base {wanted[0]} --step {wanted[1]}: no figures of {key}; there are {known}")
    kept = tuple(figure for figure in found if (figure.base, figure.step) == wanted)
    chosen = tuple(methods or dict.fromkeys((*FIRST, *OURS, *(figure.method for figure in kept))))
    for method in chosen:
        if method not in METHODS:
            raise UnknownName("method", method, METHODS)
    for path in settings or {}:
        if path.partition(".")[0] not in chosen:
            raise ConfigError(f"--set {path}: begin with one of the methods, {', '.join(chosen)}, and a point")
    return Reproduction(
        data, key, towers, name, published.settings[name], *wanted, tuple(seeds), kept, published, chosen,
        dict(settings or {}), device, precision,
    )  # fmt: skip


def _key(data: str) -> str:
    """What a data set is called in a file of figures: its key, or the name of its folder or file."""
    key = data.partition("=")[0]
    return Path(key).stem if os.path.exists(key) else key.partition(":")[0]


class Cost(NamedTuple):
    """Passes through the image tower in terms of passes forward of one image, and seconds where a pass was timed."""

    passes: float
    seconds: float | None


def seconds_per_image(towers: Towers, dataset: Dataset) -> float | None:
    """Of opening an image and passing it forward, timed on a few; None for embeddings."""
    if not towers.has_images or len(dataset.train) == 0:
        return None
    rows = np.linspace(0, len(dataset.train) - 1, min(SAMPLE, len(dataset.train))).astype(int)
    embedded(towers, dataset.train, rows[:2])  # what is slow only once
    start = time.perf_counter()
    embedded(towers, dataset.train, rows)
    return (time.perf_counter() - start) / len(rows)


@torch.no_grad()
def embedded(towers: Towers, images: Images, rows: np.ndarray) -> Tensor:
    """Features of some images, batch by batch; rows of a features file as they are."""
    parts = []
    for start in range(0, len(rows), SAMPLE):
        items = [towers.prepare(images[int(row)]) for row in rows[start : start + SAMPLE]]
        parts.append(towers.image(towers.pixels(torch.stack(items))).cpu())
    return torch.cat(parts)


def costs(reproduction: Reproduction, dataset: Dataset, towers: Towers) -> dict[str, Cost]:
    """What the runs of each method cost, by their tower passes alone: the features of a frozen tower are made once, by the first
    method that needs them; what trains the tower passes every image of a task in every epoch."""
    each = seconds_per_image(towers, dataset)
    train = _size(dataset.train.labels, reproduction.setting.limit_train)
    test = _size(dataset.test.labels, reproduction.setting.limit_test)
    tasks = len(task_sizes(len(dataset.classes), reproduction.base, reproduction.step))
    found, cached = {}, not towers.has_images
    for method in dict.fromkeys(run.method for run in reproduction.runs()):
        config = next(run.config for run in reproduction.runs() if run.method == method)
        entry = METHODS[method]
        settings = with_settings(entry.default_config(towers), config.settings)
        if not towers.has_images:
            passes = 0.0
        elif tower_stands(entry, settings):
            passes, cached = (0.0 if cached else float(train + test)), True
        else:
            epochs = max(
                [int(value) for path, value, _ in every_setting(settings) if path.endswith("schedule.epochs")],
                default=1,
            )
            once = train * (WITH_GRADIENTS * epochs + 2) + test * (tasks + 1) / 2
            passes = once * len(reproduction.seeds)
        found[method] = Cost(passes, None if each is None else each * passes)
    return found


def _size(labels: np.ndarray, limit: int | None) -> int:
    counts = np.bincount(labels)
    return int(counts.sum() if limit is None else np.minimum(counts, limit).sum())

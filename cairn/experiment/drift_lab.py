"""The drift laboratory: does a calibration put old Gaussians where the old classes really are?

For research only. It opens the images of old tasks, which no method may do, to measure what accuracy cannot show: the
distance between each old class's stored Gaussian and its true statistics under the new encoder. Stage 1 does not depend on
what is kept of old classes: the encoder is trained once per task, and all estimators go on with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel

from cairn.config import choices
from cairn.data.loading import Loader
from cairn.data.stream import TaskStream
from cairn.errors import ConfigError, UnknownName
from cairn.experiment.evaluator import Evaluator
from cairn.experiment.inputs import prepared
from cairn.experiment.metrics import average_incremental, seen_accuracy
from cairn.experiment.schema import SCHEMA_VERSION, RunConfig
from cairn.maths.bures import bures_parts
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.dmc_ot import DMCOT, DmcOtConfig, Motion
from cairn.storage.versions import versions
from cairn.towers.protocol import Towers
from cairn.training.context import Checkpoint, Context, Log, Seeds

Row = dict[str, Any]

ERRORS = ("mean_error", "covariance_error", "bures_error")

TRUTH = "truth"
"""The row of the ceiling: old Gaussians replaced by the true ones. What it lacks, no calibration can give."""


class _Truthful(DMCOT):
    """DMC-OT told the true statistics of its old classes, which no method may know."""

    truth: GaussianMemory

    def calibrated(self, motion: Motion, log: Log) -> GaussianMemory:
        return self.truth


def drift_rows(
    stream: TaskStream, towers: Towers, config: DmcOtConfig, estimators: Mapping[str, BaseModel], *, seed: int, log: Log
) -> tuple[list[Row], list[Row]]:
    """Errors and accuracies of every estimator on one stream.

    The first list has a row per estimator, task and old class: squared distances between the stored and the true
    Gaussian, `mean_error` |mu - mu'|^2, `covariance_error` |S - S'|^2 (Frobenius), and the Bures-Wasserstein distance
    split into its mean part, equal to `mean_error`, and its covariance part `bures_error`. The second has a row per
    estimator, and one for the truth itself: `average` and `last` accuracy of DMC-OT with it.
    """
    learners = {
        name: DMCOT(towers, config.model_copy(update={"drift": drift}), seed=seed) for name, drift in estimators.items()
    }
    learners[TRUTH] = oracle = _Truthful(towers, config, seed=seed)
    evaluator = Evaluator(stream, towers)
    rows: list[Row] = []
    accuracies: dict[str, list[list[float]]] = {name: [] for name in learners}
    for task in stream.tasks:
        done = Checkpoint()
        for number, (name, learner) in enumerate(learners.items()):
            # The first trains the encoder; the others are handed what it was trained to and what it made of the images
            checkpoint = done.handed_on(torch.arange(len(task.train)), len(task.train)) if number else done
            learner.learn(task, Context(Seeds(seed), log, checkpoint))
            if not number:
                oracle.truth = _truth(stream, learner, task.index)
            errors = _errors(learner.memory, oracle.truth)
            rows += [row | {"estimator": name, "task": task.index, "seed": seed} for row in errors]
            accuracies[name].append(evaluator.after(task.index, learner).accuracy)
        log("laboratory", task=task.index, tasks=len(stream.tasks))
    sizes = [len(test) for test in stream.tests]
    figures = []
    for name, table in accuracies.items():
        seen = seen_accuracy(table, sizes)
        figures.append({"estimator": name, "seed": seed, "average": average_incremental(seen), "last": seen[-1]})
    return rows, figures


def _truth(stream: TaskStream, learner: DMCOT, task: int) -> GaussianMemory:
    """The statistics of all classes of earlier tasks, from their images under the encoder as it stands."""
    memory = learner.config.memory(learner.towers.dim)
    for old in stream.tasks[:task]:
        memory = memory.add(
            *learner.features(Loader(old.train, learner.towers.prepare, learner.towers.pixels, batch=256))
        )
    return memory


def _errors(memory: GaussianMemory, truth: GaussianMemory) -> list[Row]:
    rows = []
    for c in range(truth.classes):
        S0, S1 = memory.covariance(c), truth.covariance(c)
        mean, bures = bures_parts(memory.mean(c), S0, truth.mean(c), S1)
        covariance = ((S0 - S1) ** 2).sum()
        rows.append(
            {"class": c, "mean_error": mean.item(), "covariance_error": covariance.item(), "bures_error": bures.item()}
        )
    return rows


def relative(rows: Sequence[Row], figures: Sequence[Row]) -> list[Row]:
    """Per estimator and seed: errors summed over tasks and old classes, relative to those of `none`; accuracies.

    Where `none` has no error, because nothing moved, the ratio is 1 for an estimator that has none either, and None for
    one that has.
    """
    table = []
    for figure in figures:
        name, seed = figure["estimator"], figure["seed"]
        entry = dict(figure)
        for key in ERRORS:
            own = sum(row[key] for row in rows if row["estimator"] == name and row["seed"] == seed)
            base = sum(row[key] for row in rows if row["estimator"] == "none" and row["seed"] == seed)
            entry[key] = own / base if base > torch.finfo(torch.float64).tiny else (1.0 if own <= 0 else None)
        table.append(entry)
    return table


def by_task(rows: Sequence[Row]) -> list[Row]:
    """A row per estimator, task and seed: the number of old classes, and their errors summed."""
    summed: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        place = row["estimator"], row["task"], row["seed"]
        start = {"estimator": place[0], "task": place[1], "seed": place[2], "classes": 0} | dict.fromkeys(ERRORS, 0.0)
        total = summed.setdefault(place, start)
        total["classes"] += 1
        for key in ERRORS:
            total[key] += row[key]
    return list(summed.values())


def drift_report(
    config: RunConfig, estimators: Sequence[str], seeds: Sequence[int], log: Log | None = None
) -> dict[str, Any]:
    """The drift laboratory on a stream: every estimator's errors and accuracies, for each seed, as JSON values.

    `config.method` must be dmc-ot, whose settings apply. Raises UnknownName for an unknown estimator.
    """
    log = log or Log()
    entry, stream, towers, settings = prepared(config)
    if not isinstance(settings, DmcOtConfig):
        raise ConfigError(f"method '{entry.name}': the drift laboratory compares estimators of dmc-ot")
    family = choices(entry.config.model_fields["drift"])
    for name in estimators:
        if name not in family:
            raise UnknownName("estimator", name, family)
    chosen = {name: family[name]() for name in dict.fromkeys(["none", *estimators])}
    for notice in stream.notices:
        log("notice", text=notice)
    rows, figures = [], []
    for seed in seeds:
        log(
            "start",
            method="drift laboratory",
            data=stream.name,
            tasks=len(stream.tasks),
            classes=len(stream.class_names),
            seed=seed,
        )
        more = drift_rows(stream, towers, settings, chosen, seed=seed, log=log)
        rows += more[0]
        figures += more[1]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": config.model_dump(mode="json"),
        "config": settings.model_dump(mode="json"),
        "estimators": {name: drift.model_dump(mode="json") for name, drift in chosen.items()},
        "data": stream.name,
        "split": stream.fingerprint,
        "towers": {"name": towers.name, "fingerprint": towers.fingerprint},
        "seeds": list(seeds),
        "relative": relative(rows, figures),
        "rows": by_task(rows),
        "versions": versions(),
    }

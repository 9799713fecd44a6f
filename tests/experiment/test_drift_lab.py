"""The drift laboratory, on embeddings, where everything is quick."""

from __future__ import annotations

import json

import pytest

from cairn.errors import UnknownName
from cairn.experiment.drift_lab import by_task, drift_report, relative
from cairn.experiment.schema import RunConfig
from cairn.reports.drift import drift_figure, drift_table


@pytest.fixture
def report(features):
    config = RunConfig(
        method="dmc-ot", data=features, step=2, settings=("stage1.schedule.lr=1e-2", "stage2.schedule.epochs=1")
    )
    return drift_report(config, ["mean", "paired"], [1, 2])


def test_it_measures_every_estimator_on_the_old_classes_of_every_task(report):
    assert {row["estimator"] for row in report["rows"]} == {"none", "mean", "paired", "truth"}
    for seed in (1, 2):
        own = [r for r in report["rows"] if r["seed"] == seed and r["estimator"] == "paired"]
        assert [(row["task"], row["classes"]) for row in own] == [(1, 2), (2, 4)]
    json.dumps(report, allow_nan=False)


def test_errors_are_relative_to_doing_nothing_and_means_are_not_covariances(report):
    by = {(e["estimator"], e["seed"]): e for e in report["relative"]}
    for seed in (1, 2):
        assert by["none", seed]["mean_error"] == by["none", seed]["covariance_error"] == 1
        assert by["mean", seed]["covariance_error"] == pytest.approx(1, abs=1e-9)
        assert by["paired", seed]["mean_error"] < 0.8
        assert by["truth", seed]["mean_error"] == by["truth", seed]["covariance_error"] == 0
        assert 0 <= by["paired", seed]["last"] <= 1


def test_ratios_are_of_sums():
    rows = [
        {"estimator": "none", "seed": 1, "mean_error": 3.0, "covariance_error": 1.0, "bures_error": 0.0},
        {"estimator": "none", "seed": 1, "mean_error": 1.0, "covariance_error": 1.0, "bures_error": 0.0},
        {"estimator": "x", "seed": 1, "mean_error": 1.0, "covariance_error": 4.0, "bures_error": 0.0},
    ]
    figures = [{"estimator": "x", "seed": 1, "average": 0.5, "last": 0.4}]
    (entry,) = relative(rows, figures)
    assert (entry["mean_error"], entry["covariance_error"], entry["bures_error"]) == (0.25, 2.0, 1.0)
    (entry,) = relative([*rows[:2], {**rows[2], "bures_error": 0.5}], figures)
    assert entry["bures_error"] is None  # an infinite ratio, which JSON cannot hold


def test_errors_of_old_classes_are_summed():
    place = {"estimator": "none", "task": 1}
    rows = [
        {**place, "seed": seed, "class": c, "mean_error": seed + c, "covariance_error": 2.0, "bures_error": 0.5}
        for seed in (1, 2)
        for c in (0, 1, 2)
    ]
    assert by_task(rows) == [
        {**place, "seed": 1, "classes": 3, "mean_error": 6.0, "covariance_error": 6.0, "bures_error": 1.5},
        {**place, "seed": 2, "classes": 3, "mean_error": 9.0, "covariance_error": 6.0, "bures_error": 1.5},
    ]


def test_the_table_and_the_figure(report, tmp_path):
    table = drift_table([report])
    assert len(table.splitlines()) == 6
    assert "| made | paired | " in table
    drift_figure(report, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unknown_estimator_is_named():
    with pytest.raises(UnknownName, match="unknown estimator 'pairde': did you mean paired"):
        drift_report(RunConfig(method="dmc-ot", data="shapes", step=20, limit_train=1), ["pairde"], [1])

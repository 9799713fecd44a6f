"""Fewer images than directions: no calibration may turn singular or lose a number."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

from cairn.data.embeddings import save_features
from cairn.experiment.drift_lab import drift_report
from cairn.experiment.schema import RunConfig

few_images = runpy.run_path(str(Path(__file__).resolve().parents[2] / "experiments" / "few_images.py"))["few_images"]
FAMILY = ["mean", "sdc", "bures", "sinkhorn", "paired", "local"]


@pytest.mark.parametrize(
    "size",
    [
        {"classes": 40, "dim": 64, "train": 6, "test": 4},
        pytest.param({"classes": 200, "dim": 512, "train": 30, "test": 10}, marks=pytest.mark.slow),
    ],
    ids=["small", "CUB's size"],
)
def test_every_estimator_stays_finite_over_ten_tasks(tmp_path, size):
    save_features(tmp_path / "few.safetensors", **few_images(**size))
    config = RunConfig(
        method="dmc-ot",
        data=str(tmp_path / "few.safetensors"),
        step=size["classes"] // 10,
        settings=("stage1.schedule.lr=1e-3", "stage1.schedule.epochs=3", "stage2.schedule.epochs=1"),
    )
    report = drift_report(config, FAMILY, [1])
    assert all(math.isfinite(value) for row in report["rows"] for value in row.values() if isinstance(value, float))
    errors = {row["estimator"]: row["mean_error"] for row in report["relative"]}
    assert errors.keys() == {"none", *FAMILY, "truth"}
    assert errors["paired"] < errors["mean"] <= 1.0 + 1e-9

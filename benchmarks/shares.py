"""Where the time of a whole run goes: inside the towers, waiting for data, and the rest; and what the feature store saves.

DMC on the drawn world with few images. Inside a tower is: its forward pass, from call to return, and its backward pass,
from the moment the gradient reaches the tower's output until `backward` returns, since nothing lies below the trained
layers of a tower. Waiting is the time in which a batch was asked for and not yet there, evaluation included. All else is
losses, optimiser, Gaussians, merging of LoRA and bookkeeping.

SPA on the same images three times: without a store, with an empty one, with one that is full.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Row
from torch import Tensor

from cairn.data.feature_store import FeatureStore
from cairn.data.loading import Loader
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig, RunResult
from cairn.towers.clip import ClipTowers, VisionTower
from cairn.training.log import Log

SIZES = {"full": {"limit_train": 40, "limit_test": 20}, "quick": {"limit_train": 8, "limit_test": 4}}
TARGET = 5.0
"""Wall time over time outside the towers: at most a fifth."""


@contextmanager
def clocked() -> Iterator[Counter]:
    """Seconds in the towers, forward and backward, and waiting for data, of whatever runs inside."""
    spent: Counter = Counter()
    arrived: list[float] = []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            mark = time.perf_counter()
            value = call(*args, **kwargs)
            spent[part] += time.perf_counter() - mark
            for output in value if isinstance(value, tuple) else (value,):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(lambda gradient: arrived.append(time.perf_counter()))
            return value

        return inside

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        arrived.clear()
        plain_backward(self, *args, **kwargs)
        if arrived:
            spent["towers, backward"] += time.perf_counter() - min(arrived)

    plain_backward = Tensor.backward
    replaced = [
        (VisionTower, "forward", "image tower, forward"),
        (VisionTower, "tokens", "image tower, forward"),
        (ClipTowers, "_encoded", "text tower, forward"),
        (ClipTowers, "encoded_tree", "text tower, forward"),
        (Loader, "_next", "waiting for data"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, part in replaced:
            setattr(owner, name, timed(part, getattr(owner, name)))
        Tensor.backward = backward
        yield spent
    finally:
        Tensor.backward = plain_backward
        for owner, name, original in originals:
            setattr(owner, name, original)


def dmc_shares(limit_train: int, limit_test: int) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    config = RunConfig(method="dmc", limit_train=limit_train, limit_test=limit_test)
    with clocked() as spent:
        result = run_stream(config, Log(keep=events.append))
    towers = sum(seconds for part, seconds in spent.items() if "tower" in part)
    return {
        "seconds": result.seconds,
        "parts": dict(spent),
        "outside": result.seconds - towers,
        "waited_in_training": sum(event["waited"] for event in events if event["event"] == "epoch"),
    }


def spa_with_store(limit_train: int, limit_test: int) -> dict[str, Any]:
    config = RunConfig(method="spa", limit_train=limit_train, limit_test=limit_test)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "no store": run_stream(config),
            "first run": run_stream(config, store=FeatureStore(Path(folder))),
            "second run": run_stream(config, store=FeatureStore(Path(folder))),
        }
    plain = runs["no store"].accuracy
    return {name: _counted(run) | {"same_accuracies": run.accuracy == plain} for name, run in runs.items()}


def _counted(run: RunResult) -> dict[str, Any]:
    learning, evaluating = run.tower_passes, run.evaluation_passes
    return {
        "seconds": run.seconds,
        "image_passes": learning.images + evaluating.images,
        "stored": learning.stored + evaluating.stored,
    }


def measured(limit_train: int, limit_test: int) -> dict[str, Any]:
    limits = {"limit_train": limit_train, "limit_test": limit_test}
    return limits | {"dmc": dmc_shares(**limits), "spa": spa_with_store(**limits)}


def rows(report: dict[str, Any]) -> list[Row]:
    dmc, spa = report["dmc"], report["spa"]
    images = f"shapes, {report['limit_train']} training images per class"

    def share(part: float) -> str:
        return f"{100 * part / dmc['seconds']:.0f} % of the time"

    made = [
        Row(
            f"DMC, {images}",
            "the whole run",
            dmc["seconds"],
            "outside the towers",
            dmc["outside"],
            target=TARGET,
            equal=share(dmc["outside"]),
        )
    ]
    if waiting := dmc["parts"].get("waiting for data"):
        text = f"{share(waiting)}, part of the row above; in training alone {1e3 * dmc['waited_in_training']:.0f} ms"
        made.append(Row("the same", "the whole run", dmc["seconds"], "waiting for data", waiting, equal=text))
    for name in ("first run", "second run"):
        run = spa[name]
        same = "same accuracies" if run["same_accuracies"] else "OTHER ACCURACIES"
        made.append(
            Row(
                f"SPA, {images}",
                f"no store, {spa['no store']['image_passes']:,} image passes",
                spa["no store"]["seconds"],
                f"{name} with a store, {run['image_passes']:,} passes",
                run["seconds"],
                equal=same,
            )
        )
    return made

"""Trackers that are told of a run besides its own files: TensorBoard, Weights & Biases, Trackio, MLflow.

They are spoken to through accelerate, which the tuning library brings. Where a tracker keeps or sends what it is told is
its own business, settled by its own environment variables; nothing is told to one that was not asked for.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cairn.errors import ConfigError, UnknownName, one_line
from cairn.experiment.schema import RunConfig, RunResult
from cairn.storage.distribution import extra_remedy

PROJECT = "cairn"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
ROWS = ("wandb", "trackio")
"""Those that number what they are told in order of arrival: theirs is a row that says where it belongs."""


class Tracking:
    """Tells trackers of one run: its settings, the loss of every epoch, the accuracies of every task, the result.

    What goes wrong in a tracker is told once to `warn` and ends the tracker, not the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, run: RunConfig, warn: Callable[[str], Any]):
        """Raises UnknownName for a name that is no tracker, ConfigError for one whose client is not installed."""
        for name in names:
            _require(name)
        self.folder, self.run, self._warn = folder, run, warn
        self._names = tuple(dict.fromkeys(names))
        self._trackers: dict[str, Any] = {}
        self._epochs = 0

    def begin(self, earlier: Iterable[dict[str, Any]] = ()) -> None:
        """Start the trackers of a run that already had the events `earlier`."""
        self._epochs = sum(event["event"] == "epoch" for event in earlier)
        self._trackers = dict.fromkeys(self._names)
        self._each(self._start)

    def __call__(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                values = self.run.model_dump(mode="json", exclude={"settings"}) | {"settings": event["config"]}
                self._each(lambda name: self._trackers[name].store_init_configuration(dict(_flat(values))))
            case "epoch":
                self._log({f"loss/stage {event.get('stage', 1)}": event["loss"]}, "epoch", self._epochs)
                self._epochs += 1
            case "task":
                values = {f"accuracy/task {task}": accuracy for task, accuracy in enumerate(event["accuracy"])}
                values |= {f"accuracy/{key}": event[key] for key in ("seen", "zero_shot", "future")}
                self._log(values | {key: event[key] for key in ("seconds", "memory_bytes")}, "task", event["task"])

    def result(self, result: RunResult) -> None:
        keys = ("average", "last", "forgetting", "seconds", "peak_rss_bytes")
        self._log({f"result/{key}": getattr(result, key) for key in keys}, "task", len(result.task_sizes) - 1)

    def close(self) -> None:
        self._each(lambda name: self._trackers[name].finish())
        self._trackers = {}

    def _start(self, name: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers' own log lines fail without it, and those of wandb and trackio do not make it

        label = "/".join(self.folder.parts[-2:])
        arguments = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(self.folder)},
            "wandb": {"run_name": PROJECT, "name": label, "dir": str(self.folder)},
            "trackio": {"run_name": PROJECT, "name": label},
            "mlflow": {"experiment_name": PROJECT, "run_name": label},
        }
        tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
        if hasattr(tracker, "start"):  # older releases start when they are made
            tracker.start()
        self._trackers[name] = tracker

    def _log(self, values: dict[str, float | None], axis: str, position: int) -> None:
        """Values at a place of an axis, `epoch` (counted over all tasks) or `task`."""
        known = {key: value for key, value in values.items() if value is not None}

        def tell(name: str) -> None:
            if name in ROWS:
                self._trackers[name].log(known | {axis: position})
            else:
                self._trackers[name].log(known, step=position)

        self._each(tell)

    def _each(self, act: Callable[[str], Any]) -> None:
        for name in list(self._trackers):
            try:
                act(name)
            except Exception as error:  # of a library, a disk or a network: whatever it is, the run is worth more
                del self._trackers[name]
                reason = one_line(str(error) or type(error).__name__)[:300]
                self._warn(f"--track {name}: {reason}; the run goes on without it")


def _require(name: str) -> None:
    if name not in TRACKERS:
        raise UnknownName("tracker", name, TRACKERS)
    try:
        importlib.import_module("accelerate.tracking")
        importlib.import_module(name)
    except Exception as error:  # one that is there may still lack something, and say so in any way
        client = "" if name == "tensorboard" else f", and pip install {name}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--track {name}: not there ({reason}); {extra_remedy('track')}{client}") from None


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their path, as trackers take them: numbers, truth values and text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else json.dumps(value)

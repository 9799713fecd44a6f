"""A CLIP model learns new classes, task after task, without keeping old images and without forgetting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cairn.classifier.classifier import IncrementalClassifier
    from cairn.config import with_settings
    from cairn.data.embeddings import save_features
    from cairn.data.images import Dataset
    from cairn.data.opening import open_dataset
    from cairn.data.stream import TaskStream, task_stream
    from cairn.data.task import Images, Task
    from cairn.errors import CairnError
    from cairn.experiment.evaluator import Evaluator
    from cairn.experiment.run import run_stream
    from cairn.experiment.schema import RunConfig, RunResult
    from cairn.memory.gaussians import GaussianMemory
    from cairn.methods.catalogue import METHODS, method_named
    from cairn.methods.protocol import Method
    from cairn.towers.catalogue import load_towers
    from cairn.towers.protocol import Towers
    from cairn.training.context import Log

_HOMES = {
    "CairnError": "errors", "Dataset": "data.images", "Evaluator": "experiment.evaluator",
    "GaussianMemory": "memory.gaussians", "Images": "data.task",
    "IncrementalClassifier": "classifier.classifier", "Log": "training.context",
    "METHODS": "methods.catalogue", "Method": "methods.protocol", "RunConfig": "experiment.schema", "RunResult": "experiment.schema",
    "Task": "data.task", "TaskStream": "data.stream", "Towers": "towers.protocol", "load_towers": "towers.catalogue",
    "method_named": "methods.catalogue", "open_dataset": "data.opening", "run_stream": "experiment.run",
    "save_features": "data.embeddings", "task_stream": "data.stream", "with_settings": "config",
}  # fmt: skip

__all__ = [
    "METHODS", "CairnError", "Dataset", "Evaluator", "GaussianMemory", "Images", "IncrementalClassifier", "Log", "Method", "RunConfig",
    "RunResult", "Task", "TaskStream", "Towers", "load_towers", "method_named", "open_dataset", "run_stream",
    "save_features", "task_stream", "with_settings",
]  # fmt: skip


def __getattr__(name: str):
    """Public names are loaded when first used, so that `import cairn` and `cairn --help` are quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cairn' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cairn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""A method that says it keeps no image is held to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn.config import NoSettings
from cairn.data.loading import Loader
from cairn.errors import ExemplarsKept
from cairn.experiment.evaluator import Evaluator
from cairn.experiment.exemplar_check import looked_for
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods import catalogue
from cairn.methods.catalogue import METHODS, Entry
from cairn.methods.simplecil import SimpleCIL
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def keeping(what):
    """SimpleCIL that keeps `what(method, task)` beside its means."""

    class Keeping(SimpleCIL):
        def learn(self, task, ctx):
            super().learn(task, ctx)
            self.kept = what(self, task)

    return Keeping


def closure(task):
    return lambda: task.train


def rows(method, task):
    return torch.stack([method.towers.prepare(task.train[i]) for i in range(len(task.train))])


WAYS = {
    "task": lambda method, task: task,
    "images": lambda method, task: {"old": [(task.train,)]},
    "what they were taken from": lambda method, task: task.train.source,
    "loader": lambda method, task: Loader(task.train, method.towers.prepare, method.towers.pixels),
    "closure": lambda method, task: closure(task),
    "prepared": rows,
    "flattened": lambda method, task: rows(method, task).flatten(1).numpy(),
    "in half precision": lambda method, task: rows(method, task).half(),
    "one, in a module": lambda method, task: torch.nn.ParameterList(
        [torch.nn.Parameter(rows(method, task)[:1].float())]
    ),
}


def evaluated(method, stream, towers, exemplar_free=True):
    method.learn(stream.tasks[0], Context(Seeds(1)))
    return Evaluator(stream, towers, exemplar_free=exemplar_free).after(0, method)


@pytest.mark.parametrize("way", WAYS)
def test_a_method_that_keeps_images_is_refused_whatever_it_hides_them_in(way, small_stream, towers):
    method = keeping(WAYS[way])(towers, NoSettings(), seed=1)
    with pytest.raises(ExemplarsKept, match=r"Keeping holds .* of task 0 .*declare keeps="):
        evaluated(method, small_stream, towers)
    assert evaluated(keeping(WAYS[way])(towers, NoSettings(), seed=1), small_stream, towers, exemplar_free=False)


def test_what_is_no_image_of_the_task_is_not_minded(small_stream, towers):
    kept = lambda method, task: (rows(method, task).float().mean(0), task.names, task.classes, np.arange(5), print)  # noqa: E731
    assert evaluated(keeping(kept)(towers, NoSettings(), seed=1), small_stream, towers)


def test_a_class_of_one_image_or_of_copies_is_not_looked_for(embedded_dataset, small_stream, towers):
    task = small_stream.tasks[0]
    one = replace(task, train=type(task.train)(task.train, np.array([0, 0, 0]), np.array([0, 0, 1])))
    assert looked_for(one, towers) == []
    assert len(looked_for(task, towers)) == 2


def test_a_run_of_such_a_method_leaves_no_result(monkeypatch):
    sly = keeping(WAYS["loader"])
    monkeypatch.setattr(catalogue, "METHODS", {**METHODS, "sly": Entry("sly", sly)})
    config = RunConfig(method="sly", data="shapes", step=20, limit_train=2, limit_test=1)
    with pytest.raises(ExemplarsKept):
        run_stream(config)
    sly.card = replace(sly.card, keeps="images")
    assert not run_stream(config).exemplar_free

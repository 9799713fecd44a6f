"""One class per task: what a softmax over the classes of a task then does."""

from __future__ import annotations

import pytest
import torch

from cairn.config import settings, with_settings
from cairn.data.stream import task_stream
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

QUICK = {
    "stage1.schedule.epochs": "2", "stage1.schedule.lr": "1e-2", "stage1.schedule.batch": "8",
    "stage2.schedule.epochs": "0", "schedule.epochs": "2", "tuning": "adapter",
}  # fmt: skip
ALL_SEEN = "one class in this task: all 2 classes seen stand in the softmax of this stage"
NO_OTHER = "one class, and no other to tell it from: the image encoder is not trained"


@pytest.fixture
def towers(flat):
    return flat


def learned(name, towers, dataset, tasks, *assignments):
    """Rows of the first test images under the encoder after each task, and what was said in each."""
    entry, said = METHODS[name], []
    config = entry.default_config(towers)
    known = {path for path, _, _ in settings(config)}
    quick = [f"{key}={value}" for key, value in QUICK.items() if key in known]
    method = entry.build(towers, with_settings(config, [*quick, *assignments]), seed=1)
    ctx = Context(Seeds(1), Log(keep=said.append))
    stream, rows = task_stream(dataset, step=1), []
    x = torch.as_tensor(dataset.test.values[:5])
    for task in stream.tasks[:tasks]:
        method.learn(task, ctx)
        with torch.no_grad():
            rows.append(method.embed(x)[:, -towers.dim :])  # joint has the frozen embedding before it
    return rows, [[e["text"] for e in said if e["event"] == "notice" and e["task"] == i] for i in range(tasks)]


@pytest.mark.parametrize("choice", ["current", "seen"])
@pytest.mark.parametrize("name", ["dmc", "dmc-ot", "clipood", "finetune", "joint"])
def test_the_encoder_learns_from_the_second_class_on(name, choice, towers, embedded_dataset):
    rows, said = learned(name, towers, embedded_dataset, 2, f"stage1.classes={choice}")
    frozen = torch.as_tensor(embedded_dataset.test.values[:5])
    assert torch.equal(rows[0], frozen)
    assert not torch.allclose(rows[1], rows[0], atol=1e-3)
    assert said[0] == [NO_OTHER]
    # Joint training has the images of both classes
    assert said[1] == ([ALL_SEEN] if choice == "current" and name != "joint" else [])


def test_the_slow_learner_tells_the_class_from_those_before(towers, embedded_dataset):
    rows, said = learned("slca", towers, embedded_dataset, 2, "stage1.schedule.lr=0.1")
    assert torch.equal(rows[0], torch.as_tensor(embedded_dataset.test.values[:5]))
    assert not torch.allclose(rows[1], rows[0], atol=1e-3)
    assert said == [[NO_OTHER], [ALL_SEEN]]


@pytest.mark.parametrize("name", ["aper", "ranpac"])
def test_an_encoder_adapted_in_the_first_task_alone_stays_as_it_is(name, towers, embedded_dataset):
    """Later it must not move: means and sums of the classes before would no longer be of its embeddings."""
    rows, said = learned(name, towers, embedded_dataset, 2)
    assert torch.equal(rows[1], rows[0])
    assert said == [[NO_OTHER], []]


def test_stage_1_with_all_classes_seen_is_what_the_setting_gives(towers, embedded_dataset):
    current, seen = (learned("dmc", towers, embedded_dataset, 3, f"stage1.classes={c}")[0] for c in ("current", "seen"))
    assert all(torch.equal(a, b) for a, b in zip(current, seen, strict=True))

"""A task's images pass the frozen blocks of an encoder once, whatever the passes and epochs."""

from __future__ import annotations

import pytest
import torch

from cairn.config import with_values
from cairn.data.loading import Loader
from cairn.methods.catalogue import METHODS
from cairn.methods.parts import stages
from cairn.methods.parts.stages import BehindTrunk, behind_trunk
from cairn.towers.tuning import Adapter, ImageEncoder, Lora, Projection
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def loader_of(task, towers):
    return Loader(task.train, towers.prepare, towers.pixels, batch=4)


def batches_of(loader, encoder):
    """What the encoder makes of two epochs, of a part of one, and of a pass in order."""
    epochs = [list(epoch) for epoch in loader.epochs([rng(1), rng(2)], 1)]
    with torch.no_grad():
        return [(encoder(x), y) for x, y in [*epochs[0], *epochs[1], *loader.ordered(1, 2)]]


@pytest.mark.parametrize("tuning", [Lora(layers=2), Projection(), Adapter()], ids=lambda tuning: tuning.kind)
def test_batches_behind_the_trunk_give_what_whole_passes_give(towers, small_stream, tuning):
    encoder, task = ImageEncoder(towers, tuning, rng()), small_stream.tasks[0]
    plain, ours = loader_of(task, towers), behind_trunk(loader_of(task, towers), encoder, Context(Seeds(1)))
    assert isinstance(ours, BehindTrunk)
    before = dict(towers.passes)
    assert towers.passes == before  # nothing before a batch is asked for
    list(ours.ordered(len(ours)))
    assert towers.passes == before
    found = batches_of(ours, encoder)
    assert towers.passes["images"] - before["images"] == len(task.train)
    for (z, y), (whole, labels) in zip(found, batches_of(plain, encoder), strict=True):
        assert torch.equal(y, labels)
        torch.testing.assert_close(z, whole, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        passes = [[encoder(x) for x, _ in loader.ordered()] for loader in (ours, plain)]
    assert all(torch.equal(*pair) for pair in zip(*passes, strict=True))


def test_what_does_not_fit_passes_whole_and_the_default_is_left_alone(towers, small_stream, monkeypatch):
    task, encoder = small_stream.tasks[0], ImageEncoder(towers, Projection(), rng())
    monkeypatch.setattr(stages, "TRUNK_BYTES", 4 * 160 * len(task.train) - 1)
    ours = behind_trunk(loader_of(task, towers), encoder, Context(Seeds(1)))
    found, expected = batches_of(ours, encoder), batches_of(loader_of(task, towers), encoder)
    assert all(torch.equal(z, whole) for (z, _), (whole, _) in zip(found, expected, strict=True))
    monkeypatch.setattr(stages, "TRUNK_BYTES", 4 * 160 * len(task.train))
    before = towers.passes["continued"]
    batches_of(behind_trunk(loader_of(task, towers), encoder, Context(Seeds(1))), encoder)
    assert towers.passes["continued"] > before
    loader = loader_of(task, towers)
    assert behind_trunk(loader, ImageEncoder(towers, Lora(), rng()), Context(Seeds(1))) is loader


@pytest.mark.parametrize("name", ["dmc", "dmc-ot", "finetune", "slca", "joint", "aper", "ranpac"])
def test_learning_passes_the_trunk_once_and_learns_what_whole_passes_teach(towers, small_stream, name, monkeypatch):
    entry, task = METHODS[name], small_stream.tasks[0]
    stage = "" if name in ("aper", "ranpac") else "stage1."
    changed = [(f"{stage}tuning", "projection"), (f"{stage}schedule.epochs", 2)]
    config = with_values(entry.default_config(towers), [*entry.card.quick.items(), *changed])

    def learned():
        method, before = entry.build(towers, config, seed=1), dict(towers.passes)
        method.learn(task, Context(Seeds(1)))
        return method.state_dict(), {what: towers.passes[what] - before[what] for what in before}

    ours, passes = learned()
    monkeypatch.setattr(stages, "TRUNK_BYTES", 0)
    whole, all_passes = learned()
    n = len(task.train)
    assert ours.keys() == whole.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, whole[key], atol=1e-4, rtol=1e-3)
    if (
        name == "joint"
    ):  # holds some images out, has blend's embeddings beside them, and passes all once more in the end
        assert 2 * n < passes["images"] < 3 * n
        assert all_passes["images"] > 3 * n
    else:
        assert passes["images"] == n
        assert all_passes["images"] >= 2 * n

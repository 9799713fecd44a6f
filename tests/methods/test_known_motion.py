"""Real CLIP embeddings behind an adapter: the encoder's motion is affine and known, so calibration can be held to it."""

from __future__ import annotations

import pytest
import torch

from cairn.config import with_settings
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.schema import RunConfig
from cairn.maths.drift import BuresMap, MeanShift, NoDrift, PairedMap
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.seeds import Seeds


@pytest.fixture(params=[("caltech51", 10, 41), ("ucf101", 50, 51)], ids=lambda p: p[0])
def motion(request, shared):
    """Before and after stage 1 of the second task, not normalised: rows and labels of the old and the new classes."""
    name, base, step = request.param
    config = RunConfig(method="dmc-ot", data=str(shared / "clip-vit-b32-features" / f"{name}.safetensors"))
    dataset = open_dataset(config.data)
    stream = task_stream(dataset, base=base, step=step, order="seed:1993")
    towers = towers_for(config, dataset)
    entry = METHODS["dmc-ot"]
    settings = ("stage1.schedule.epochs=2", "stage1.schedule.lr=1e-3", "stage2.schedule.epochs=0")
    method = entry.build(towers, with_settings(entry.default_config(towers), settings), seed=1)
    first, second = stream.tasks

    @torch.no_grad()
    def embedded(task):
        rows = torch.stack([torch.as_tensor(task.train[i]) for i in range(len(task.train))])
        return method.embed(rows).clone(), torch.as_tensor(task.train.labels)

    method.learn(first, Context(Seeds(1)))
    before = [embedded(task) for task in stream.tasks]
    method.learn(second, Context(Seeds(1)))
    return before, [embedded(task) for task in stream.tasks]


def error(memory: GaussianMemory, truth: GaussianMemory) -> tuple[float, float]:
    apart = [(memory.covariance(c) - truth.covariance(c)).abs().max() for c in range(truth.classes)]
    return float((memory.means - truth.means).abs().max()), float(max(apart))


def test_paired_recovers_the_moved_gaussians(motion):
    (old0, (Z0, y)), (old1, (Z1, _)) = motion
    d = Z0.shape[1]
    assert len(Z0) > d, "as many images as directions, or the motion is not determined"
    memory, truth = GaussianMemory(d).add(*old0), GaussianMemory(d).add(*old1)
    found = {}
    for drift in (NoDrift(), MeanShift(), BuresMap(), PairedMap(lam=1e-9)):
        found[drift.kind] = error(memory.moved(drift.maps(Z0, Z1, y, memory)), truth)
    assert found["none"][0] > 1e-3
    assert max(found["paired"]) <= 1e-6
    assert found["paired"][0] < 1e-2 * min(found["mean"][0], found["bures"][0])

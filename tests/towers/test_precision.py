"""bfloat16 where the processor has arithmetic for it, and float32 elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.towers import precision
from cairn.towers.catalogue import load_towers
from cairn.training.log import Log


@pytest.fixture
def slow(monkeypatch):
    """A processor on which bfloat16 takes so many times as long."""

    def processor(factor):
        monkeypatch.setattr(precision, "bfloat16_slowdown", lambda device: factor)

    return processor


def test_a_slow_bfloat16_is_float32_and_said(slow, towers):
    slow(12.0)
    found = load_towers("tiny", device="cpu", precision="bfloat16")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert found.precision == "float32"
    assert torch.equal(found.image(pixels), towers.image(pixels))
    assert torch.equal(found.text(["a star"]), towers.text(["a star"]))
    assert len(found.notices) == 1
    assert "bfloat16 takes 12 times as long as float32 on this cpu" in found.notices[0]


def test_a_fast_one_is_taken_in_silence(slow, towers):
    slow(1.5)
    found = load_towers("tiny", device="cpu", precision="bfloat16")
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert (found.precision, found.notices) == ("bfloat16", ())
    assert not torch.equal(found.image(pixels), towers.image(pixels))


@pytest.mark.parametrize(("factor", "used"), [(0.5, "bfloat16"), (0.9, "float32"), (12.0, "float32")])
def test_auto_is_the_faster_and_said(slow, factor, used):
    slow(factor)
    found = load_towers("tiny", device="cpu", precision="auto")
    assert found.precision == used
    assert f"precision auto: {used}, for bfloat16 takes {factor:.1f} times" in found.notices[0]


def test_nothing_is_measured_for_float32(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda device: pytest.fail("measured"))
    assert precision.usable_precision("float32", torch.device("cpu")) == ("float32", ())


@pytest.mark.parametrize(("factor", "used"), [(12.0, "float32"), (0.5, "bfloat16")])
def test_a_result_says_which_was_used(slow, factor, used):
    slow(factor)
    events = []
    config = RunConfig(method="zero-shot", step=40, limit_train=1, limit_test=1, device="cpu", precision="bfloat16")
    result = run_stream(config, log=Log(keep=events.append))
    assert (result.run.precision, result.precision) == ("bfloat16", used)
    said = [event["text"] for event in events if event["event"] == "notice" and "bfloat16" in event["text"]]
    assert len(said) == (used == "float32")


def test_a_processor_without_bfloat16_is_noticed():
    """The library of matrix products is told to use nothing newer than SSE4.1."""
    code = "from cairn.towers.precision import bfloat16_slowdown as s; print(s('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert float(done.stdout) > precision.SLOWER

"""What the evaluator keeps of the test images, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cairn.evaluation.evaluate import Evaluator
from cairn.methods.catalogue import METHODS
from cairn.training.log import Log


@pytest.mark.parametrize("name", ["simplecil", "spa"])
def test_what_does_not_fit_in_memory_lies_in_a_file_and_changes_nothing(towers, small_stream, name, monkeypatch):
    mapped, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda file, **how: mapped.append(file) or from_file(file, **how))
    entry = METHODS[name]
    method = entry.build(towers, entry.default_config(towers), seed=1, log=Log())
    plain, tight = Evaluator(small_stream, towers), Evaluator(small_stream, towers, keep_bytes=5000)
    for task in small_stream.tasks:
        method.learn(task)
        assert plain.after(task.index, method) == tight.after(task.index, method)
    assert len(mapped) >= 1
    assert not any(Path(name).exists() for name in mapped)
    before = dict(towers.passes)
    tight.after(2, method)
    assert towers.passes["images"] == before["images"]  # kept, not computed again

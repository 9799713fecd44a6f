"""What the evaluator keeps of the test images, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cairn.errors import NotFinite
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


def test_scores_that_are_not_finite_are_no_accuracy(towers, small_stream, monkeypatch):
    """Of the method, and of the class texts that it is compared with."""
    entry = METHODS["simplecil"]
    method = entry.build(towers, entry.default_config(towers), seed=1, log=Log())
    method.learn(small_stream.tasks[0])
    evaluator = Evaluator(small_stream, towers)
    evaluator._texts[1, 0] = float("nan")
    with pytest.raises(NotFinite, match="zero-shot scores: those of test image 0 are not finite"):
        evaluator.after(0, method)
    method.means.means[0, 0] = float("nan")
    with pytest.raises(NotFinite, match="task 0: the scores of the method: those of test image 0 are not finite"):
        Evaluator(small_stream, towers).after(0, method)

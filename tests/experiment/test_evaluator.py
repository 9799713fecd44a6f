"""What the evaluator keeps of the test images, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from cairn.config import NoSettings, with_values
from cairn.data.embeddings import Rows
from cairn.data.stream import task_stream
from cairn.errors import NotFinite, ResultError
from cairn.experiment.evaluator import Evaluation, Evaluator
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.seeds import Seeds


@pytest.mark.parametrize("name", ["simplecil", "spa"])
def test_what_does_not_fit_in_memory_lies_in_a_file_and_changes_nothing(towers, small_stream, name, monkeypatch):
    mapped, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda file, **how: mapped.append(file) or from_file(file, **how))
    entry = METHODS[name]
    method = entry.build(towers, entry.default_config(towers), seed=1)
    plain, tight = Evaluator(small_stream, towers), Evaluator(small_stream, towers, keep_bytes=5000)
    for task in small_stream.tasks:
        method.learn(task, Context(Seeds(1)))
        assert plain.after(task.index, method) == tight.after(task.index, method)
    assert len(mapped) >= 1
    assert not any(Path(name).exists() for name in mapped)
    before = dict(towers.passes)
    tight.after(2, method)
    assert towers.passes["images"] == before["images"]  # kept, not computed again


def test_a_disk_without_room_for_that_file_is_an_error_and_not_the_end_of_the_process(
    towers, small_stream, small_files
):
    entry = METHODS["simplecil"]
    method = entry.build(towers, entry.default_config(towers), seed=1)
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    evaluator = Evaluator(small_stream, towers, keep_bytes=0)
    with (
        small_files(1000),
        pytest.raises(ResultError, match=r"rows': cannot be written: .*set TMPDIR to another folder"),
    ):
        evaluator.after(0, method)


def test_scores_that_are_not_finite_are_no_accuracy(towers, small_stream, monkeypatch):
    """Of the method, and of the class texts that it is compared with."""
    entry = METHODS["simplecil"]
    method = entry.build(towers, entry.default_config(towers), seed=1)
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    evaluator = Evaluator(small_stream, towers)
    evaluator._texts[1, 0] = float("nan")
    with pytest.raises(NotFinite, match="zero-shot scores: those of test image 0 are not finite"):
        evaluator.after(0, method)
    method.means.means[0, 0] = float("nan")
    with pytest.raises(NotFinite, match="task 0: the scores of the method: those of test image 0 are not finite"):
        Evaluator(small_stream, towers).after(0, method)


def rows_of(tests):
    x = torch.cat([torch.stack([torch.as_tensor(test[i]) for i in range(len(test))]) for test in tests])
    return x, torch.cat([torch.as_tensor(test.labels) for test in tests])


def share_of_texts(tests, texts, classes):
    """Share of the images whose nearest text among those of `classes` is that of their own class, one by one."""
    x, y = rows_of(tests)
    right = 0
    for image, label in zip(x, y.tolist(), strict=True):
        cosines = {c: float(image @ texts[c] / image.norm() / texts[c].norm()) for c in classes}
        right += max(cosines, key=cosines.get) == label
    return right / len(x)


def test_classes_to_come_are_asked_among_themselves_and_seen_ones_among_the_seen(flat, blurred_dataset):
    stream = task_stream(blurred_dataset, step=2)
    method, texts = (
        METHODS["simplecil"].build(flat, NoSettings(), seed=1),
        torch.as_tensor(blurred_dataset.embeddings.text),
    )
    evaluator = Evaluator(stream, flat)
    for task, seen in enumerate((2, 4, 6)):
        method.learn(stream.tasks[task], Context(Seeds(1)))
        found = evaluator.after(task, method)
        coming = stream.tests[task + 1 :]
        assert found.future == (share_of_texts(coming, texts, range(seen, 6)) if coming else None)
        assert found.zero_shot == share_of_texts(stream.tests[: task + 1], texts, range(seen))
        if task == 1:  # it makes a difference here
            assert found.future != share_of_texts(coming, texts, range(6))


def test_classes_to_come_are_asked_of_the_adapted_encoder(flat, blurred_dataset):
    """APER's rows hold the frozen embedding too, which says nothing of what was learned."""
    stream, texts = task_stream(blurred_dataset, step=2), torch.as_tensor(blurred_dataset.embeddings.text)
    entry = METHODS["aper"]
    config = entry.default_config(flat)
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"lr": 1.0})})
    method = entry.build(flat, config, seed=1)
    method.learn(stream.tasks[0], Context(Seeds(1)))
    found = Evaluator(stream, flat).after(0, method)
    with torch.no_grad():
        adapted = [Rows(method.image(rows_of([test])[0]).numpy(), test.labels, "adapted") for test in stream.tests]
    assert found.future == share_of_texts(adapted[1:], texts, range(2, 6))
    assert found.future != share_of_texts(stream.tests[1:], texts, range(2, 6))  # it makes a difference here
    assert found.zero_shot == share_of_texts(stream.tests[:1], texts, range(2))


def test_the_row_of_the_table_counts_image_by_image(flat, blurred_dataset):
    """Of tasks and of classes with unequal numbers of test images."""
    stream = task_stream(blurred_dataset, step=2)
    method, evaluator = METHODS["simplecil"].build(flat, NoSettings(), seed=1), Evaluator(stream, flat)
    for task in range(2):
        method.learn(stream.tasks[task], Context(Seeds(1)))
        found = evaluator.after(task, method)
    correct, total = [0] * 4, [0] * 4
    for j, test in enumerate(stream.tests[:2]):
        x, y = rows_of([test])
        right = method.scores(x).argmax(1) == y
        assert found.accuracy[j] == right.sum() / len(y)
        for c, hit in zip(y.tolist(), right.tolist(), strict=True):
            total[c] += 1
            correct[c] += hit
    assert (found.correct, found.total) == (correct, total)
    assert len(set(total)) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((key, wrong) for key in ("future", "zero_shot", "ece", "ece_by_chance") for wrong in (1e308, -0.1, float("nan"))),
        *((key, [wrong]) for key in ("accuracy", "precision", "iou") for wrong in (1e308, -0.1, float("nan"))),
        ("nll", -1.0), ("nll", float("inf")), ("temperature", 0.0), ("temperature", float("inf")), ("correct", [-1]),
    ],
)  # fmt: skip
def test_what_was_kept_of_an_evaluation_is_in_range(field, value):
    """It is read from a checkpoint, and becomes part of a result."""
    sound = {"accuracy": [0.5], "correct": [1], "total": [2], "future": None, "zero_shot": 1.0}
    schema = TypeAdapter(Evaluation)
    assert schema.validate_python(sound).accuracy == [0.5]
    with pytest.raises(ValidationError):
        schema.validate_python(sound | {field: value})


LAST_BLOCK = [
    ("dmc", {"stage1.tuning.layers": 1}),
    ("finetune", {"stage1.tuning": "projection"}),
    ("finetune", {"stage1.tuning": "adapter"}),
]


class Whole(Evaluator):
    """Images pass the whole tower after every task."""

    def _begun(self, j, trunk):
        return super()._begun(j, None)


@pytest.mark.parametrize(("name", "changed"), LAST_BLOCK, ids=["block", "projection", "adapter"])
def test_test_images_pass_frozen_blocks_once_a_run(towers, small_stream, name, changed):
    """The evaluation is that of whole passes to the bit, whether all or nothing of what the frozen blocks gave is kept."""
    entry = METHODS[name]
    config = with_values(entry.default_config(towers), [*entry.card.quick.items(), *changed.items()])
    method = entry.build(towers, config, seed=1)
    kept, none, whole = (
        Evaluator(small_stream, towers),
        Evaluator(small_stream, towers, trunk_bytes=0),
        Whole(small_stream, towers),
    )
    images = sum(map(len, small_stream.tests))
    passed = []
    for task in small_stream.tasks:
        method.learn(task, Context(Seeds(1)))
        before = dict(towers.passes)
        found = kept.after(task.index, method)
        passed.append({what: towers.passes[what] - before[what] for what in before})
        assert found == whole.after(task.index, method) == none.after(task.index, method)
    assert [row["images"] for row in passed] == [images, 0, 0]
    # Of the encoder all of them, and once those of each task through the towers as they came
    own = [0 if "adapter" in changed.values() else images + len(test) for test in small_stream.tests]
    assert [row["continued"] for row in passed] == own
    assert any(kept._trunks.values())
    assert not any(none._trunks.values())


def test_what_frozen_blocks_gave_is_kept_while_there_is_room(towers, small_stream):
    entry = METHODS["finetune"]
    config = with_values(entry.default_config(towers), [*entry.card.quick.items(), ("stage1.tuning", "projection")])
    method = entry.build(towers, config, seed=1)
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    row = 4 * 160
    tight = Evaluator(small_stream, towers, trunk_bytes=row * (sum(map(len, small_stream.tests[:2])) + 1))
    tight.after(0, method)
    sizes = [sum(map(len, own)) for _, own in sorted(tight._trunks.items())]
    assert sizes == [*map(len, small_stream.tests[:2]), 0]
    assert tight._trunk_room == row


def test_nothing_is_kept_of_a_tower_that_moves_from_its_first_block_on(towers, small_stream):
    entry = METHODS["finetune"]
    method = entry.build(towers, with_values(entry.default_config(towers), [*entry.card.quick.items()]), seed=1)
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    evaluator = Evaluator(small_stream, towers)
    evaluator.after(0, method)
    assert not any(evaluator._trunks.values())

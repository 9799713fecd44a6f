"""SDA: what a step is made of, what altered copies are told apart from, and what a buffer never exceeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn.config import with_settings
from cairn.data.images import Subset
from cairn.data.stream import task_stream
from cairn.errors import ConfigError
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.maths.losses import supervised_contrast
from cairn.maths.similarity import unit
from cairn.memory.buffer import Buffer
from cairn.methods import sda
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context, Seeds

REPLAY = ("contrast=0", "classified=both")


def build(towers, *assignments, seed=1):
    entry = METHODS["sda"]
    config = with_settings(entry.default_config(towers), ["schedule.batch=6", "replayed=5", "buffer=12", *assignments])
    return entry.build(towers, config, seed=seed)


def steps_of(method, task, monkeypatch):
    """What the task's steps are made of, in one pass, and what `fit` is given; nothing is trained."""
    given = {}

    def watched(loss, parameters, batches, schedule, ctx, **others):
        rngs = [ctx.seeds.at(epoch=e).generator("batches") for e in range(schedule.epochs)]
        given["epochs"] = [list(epoch) for epoch in batches.epochs(rngs)]
        given.update(loss=loss, parameters=parameters, batches=batches, ctx=ctx, **others)

    with monkeypatch.context() as patch:
        patch.setattr(sda, "fit", watched)
        method.learn(task, Context(Seeds(1)))
    return given


@pytest.fixture
def tasks(embedded_dataset):
    return task_stream(embedded_dataset, step=2).tasks


# --- steps ------------------------------------------------------------------------------------------------------------


def test_copies_are_those_of_the_batch_and_of_what_is_replayed(flat, tasks, monkeypatch):
    """By hand, without noise: 4 shifts of 2 views of 6 images and 5 of the buffer; label y S + a."""
    method = build(flat, "noise=0")
    given = steps_of(method, tasks[0], monkeypatch)
    (steps,) = given["epochs"]
    source = {tuple(np.round(tasks[0].train[i], 5)): int(y) for i, y in enumerate(tasks[0].train.labels)}
    stream = []
    for number, (step, y) in enumerate(steps):
        rows = 6 if number + 1 < len(steps) else len(tasks[0].train) - 6 * number
        both = rows + (0 if number == 0 else 5)
        assert len(step.contrasted) == len(step.groups) == 8 * both
        plain = step.contrasted[:both]
        assert torch.equal(plain, step.contrasted[both : 2 * both])  # views, here without noise
        for a, shift in enumerate(method.shifts):
            copies = slice(2 * a * both, 2 * (a + 1) * both)
            assert torch.equal(step.contrasted[copies], torch.cat([shift(plain)] * 2))
            labels = [source[tuple(np.round(row.numpy(), 5))] * 4 + a for row in plain]
            assert step.groups[copies].tolist() == labels * 2
        stream += [tuple(np.round(row.numpy(), 5)) for row in plain[:rows]]
        assert len(step.classified) == len(y) == min(5, 6 if number == 0 else 12)
        assert [source[tuple(np.round(row.numpy(), 5))] for row in step.classified] == y.tolist()
    assert sorted(stream) == sorted(source)  # each image of the stream once


def test_the_draw_of_the_classifier_and_the_copies_of_the_contrast_may_be_others(flat, tasks, monkeypatch):
    method = build(flat, "noise=0", "sampled=8", "contrasted=views")
    (steps,) = steps_of(method, tasks[0], monkeypatch)["epochs"]
    for number, (step, y) in enumerate(steps[:-1]):
        both = 6 + (0 if number == 0 else 5)
        assert len(step.contrasted) == len(step.groups) == 4 * both
        plain = step.contrasted[:both]
        for a, shift in enumerate(method.shifts):
            assert torch.equal(step.contrasted[a * both : (a + 1) * both], shift(plain))
        assert (step.groups % 4).tolist() == [a for a in range(4) for _ in range(both)]
        assert len(step.classified) == len(y) == min(8, 6 * (number + 1), 12)


def test_plain_replay_learns_from_the_batch_and_a_draw_of_what_came_before(flat, tasks, monkeypatch):
    given = steps_of(build(flat, "noise=0", "steps=3", *REPLAY), tasks[0], monkeypatch)
    (steps,) = given["epochs"]
    assert len(steps) == 3 * -(-len(tasks[0].train) // 6)
    assert all(step.contrasted is None for step, _ in steps)
    for number in range(3, len(steps) - 3, 3):
        own = [step.classified for step, _ in steps[number : number + 3]]
        assert all(len(rows) == 11 for rows in own)
        assert torch.equal(own[0][:6], own[1][:6])
        assert not torch.equal(own[0][6:], own[1][6:])
        assert not (own[0][None, :6] == own[0][6:, None]).all(2).any()  # none of the batch among the replayed
    assert len(given["parameters"]) == 3  # the adapter's two and R: the head of the contrast does not train


def test_the_loss_is_the_written_sum(flat, tasks, monkeypatch):
    method = build(flat, "contrast=0.7", "temperature=0.2", "class_rate=3")
    method.learn(tasks[0], Context(Seeds(1)))
    given = steps_of(method, tasks[1], monkeypatch)
    step, y = given["epochs"][0][1]
    adapter, head = method.image, method.head
    T, s = unit(method.anchors + method.residuals), flat.logit_scale
    shares = (s * unit(adapter(step.classified)) @ T.T).log_softmax(1)
    wanted = -shares[torch.arange(len(y)), y].mean()
    wanted = wanted + 0.7 * supervised_contrast(unit(head(adapter(step.contrasted))), step.groups, 0.2)
    torch.testing.assert_close(given["loss"](step, y), wanted)
    assert given["rates"] == [0.2, 0.2, 1.0, 1.0, 1.0, 1.0, 3.0]


def test_copies_move_away_from_their_rows_and_with_the_label_of_the_class_towards_them(flat, tasks):
    """The mean cosine of h between rows and their shifted copies, after a task."""
    x, found = torch.stack([torch.as_tensor(tasks[0].train[i]) for i in range(20)]), {}
    for label in ("apart", "own"):
        method = build(flat, f"shifted={label}", "steps=5")
        method.learn(tasks[0], Context(Seeds(1)))
        with torch.no_grad():
            rows, *copies = (unit(method.head(method.image(shift(x)))) for shift in method.shifts)
        found[label] = torch.stack([(rows * copy).sum(1).mean() for copy in copies])
    assert (found["apart"] < 0.5).all()
    assert (found["own"] > 0.8).all()


# --- shifts -----------------------------------------------------------------------------------------------------------


def test_turns_are_those_of_numpy(towers):
    pixels = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for number, turns in ((4, (0, 1, 2, 3)), (2, (0, 2))):
        method = build(towers, f"shifts.number={number}")
        for shift, k in zip(method.shifts, turns, strict=True):
            np.testing.assert_array_equal(shift(pixels).numpy(), np.rot90(pixels.numpy(), k, (2, 3)))


@pytest.mark.parametrize(("n", "number"), [(4, 4), (9, 4), (16, 3)])
def test_of_no_two_orders_a_piece_has_the_same_place(n, number):
    orders = sda.derangements(n, number, torch.Generator().manual_seed(1))
    assert orders[0].tolist() == list(range(n))
    for a in range(number):
        assert sorted(orders[a].tolist()) == list(range(n))
        assert all((orders[a] != orders[b]).all() for b in range(a))


def test_tiles_change_places():
    pixels = torch.arange(2 * 7 * 6.0).view(1, 2, 7, 6)
    order = torch.tensor([2, 3, 1, 0])
    moved = sda.moved_tiles(pixels, 2, order)
    tiles = [pixels[..., i : i + 3, j : j + 3] for i in (0, 3) for j in (0, 3)]
    for t, (i, j) in enumerate((i, j) for i in (0, 3) for j in (0, 3)):
        assert torch.equal(moved[..., i : i + 3, j : j + 3], tiles[order[t]])
    assert torch.equal(moved[..., 6:, :], pixels[..., 6:, :])  # a row that no tile has


def test_shifts_that_cannot_be_are_refused(flat, towers):
    with pytest.raises(
        ConfigError, match="shifts 'rotations': a features file has no images to turn; take permutations"
    ):
        build(flat, "shifts=rotations")
    with pytest.raises(ConfigError, match=r"shifts.number=5: at most 4, one for each piece"):
        build(towers, "shifts=permutations", "shifts.number=5")


# --- the buffer -------------------------------------------------------------------------------------------------------


def test_the_buffer_never_exceeds_its_size_and_its_bytes_are_counted(flat, tasks, monkeypatch):
    sizes, add = [], Buffer.add
    monkeypatch.setattr(Buffer, "add", lambda *given: sizes.append(len(found := add(*given))) or found)
    method = build(flat)
    for task in tasks:
        method.learn(task, Context(Seeds(1)))
    assert max(sizes) == 12
    assert method.memory_bytes == 12 * (4 * flat.dim + 8) + 6 * 8
    assert method.buffer.labels.bincount().tolist() == [2] * 6


def test_an_image_of_the_stream_is_opened_once(flat, tasks):
    opened = []

    class Counting(Subset):
        def __getitem__(self, index):
            opened.append(index)
            return super().__getitem__(index)

    train, n = tasks[0].train, len(tasks[0].train)
    watched = Counting(train, np.arange(n), train.labels)
    build(flat, "steps=2").learn(replace(tasks[0], train=watched), Context(Seeds(1)))
    assert sorted(opened) == list(range(n))


@pytest.mark.parametrize("epochs", [1, 2])
def test_steps_that_are_left_out_change_nothing(flat, tasks, monkeypatch, epochs):
    """Who goes on in the midst of a pass finds the same steps, and the same buffer at the end; also who has none left."""
    settings = ("steps=2", f"schedule.epochs={epochs}")
    method = build(flat, *settings)
    given = steps_of(method, tasks[0], monkeypatch)
    whole = [step for epoch in given["epochs"] for step in epoch]
    length = len(given["batches"])
    assert len(whole) == epochs * length
    for skip in (0, 1, 7, length, epochs * length):
        other = sda.OnlineBatches(tasks[0], flat, method.config, method.shifts, Buffer(12), given["batches"].seeds)
        done, left = divmod(skip, length)
        rngs = [given["ctx"].seeds.at(epoch=e).generator("batches") for e in range(done, epochs)]
        rest = [step for epoch in other.epochs(rngs, left) for step in epoch]
        assert len(rest) == len(whole) - skip
        for (a, y), (b, names) in zip(whole[skip:], rest, strict=True):
            assert torch.equal(a.classified, b.classified)
            assert torch.equal(a.contrasted, b.contrasted)
            assert torch.equal(y, names)
        assert torch.equal(other.all_entered().items, method.buffer.items)


def test_class_means_of_the_buffer_decide(flat, tasks):
    method = build(flat, "decision=means")
    for task in tasks:
        method.learn(task, Context(Seeds(1)))
    z = unit(method.image(method.buffer.items))
    for c in range(6):
        torch.testing.assert_close(method.class_matrix[c], unit(z[method.buffer.labels == c].mean(0)[None])[0])
    assert method.memory_bytes == 12 * (4 * flat.dim + 8) + 6 * 8 + 6 * 4 * flat.dim
    method = build(flat, "decision=means", "buffer=1", "replayed=1")
    method.learn(tasks[0], Context(Seeds(1)))
    gone = 1 - int(method.buffer.labels)
    torch.testing.assert_close(method.class_matrix[gone], unit(method.anchors + method.residuals)[gone])


# --- as a method ------------------------------------------------------------------------------------------------------


def test_chunk_by_chunk_and_only_once(features):
    config = RunConfig(
        method="sda", data=features, step=2, stream="online", chunk=15, settings={"buffer": 30, "schedule.batch": 5}
    )
    result = run_stream(config)
    assert len(result.chunk_accuracy) > 3
    assert result.any_time is not None
    assert not result.exemplar_free
    assert result.memory_bytes == 30 * (4 * 16 + 8) + 6 * 8
    with pytest.raises(ConfigError, match=r"not with method 'sda': schedule\.epochs=2 goes over images again"):
        run_stream(config.model_copy(update={"settings": {"schedule.epochs": 2}}))

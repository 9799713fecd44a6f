"""Streams that are seen once: order, chunks and blurry borders."""

from __future__ import annotations

import numpy as np
import pytest
from numbered import COUNTS, dataset, rows

from cairn.data.stream import task_stream, without
from cairn.errors import ConfigError


def sizes(stream):
    return [len(part.content.train) for part in stream.parts()]


def test_the_parts_of_a_stream_of_whole_tasks_are_its_tasks():
    stream = task_stream(dataset(), step=2)
    assert [part.content for part in stream.parts()] == list(stream.tasks)
    assert [(part.task, part.last) for part in stream.parts()] == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize("blurry", [0.0, 0.4])
@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_every_image_is_seen_once(chunk, blurry):
    seen = [
        (part.content.train[i], part.content.train.labels[i])
        for part in task_stream(dataset(), step=2, chunk=chunk, blurry=blurry).parts()
        for i in range(len(part.content.train))
    ]
    assert sorted(seen) == list(enumerate(np.repeat(np.arange(6), COUNTS)))


def test_the_first_chunk_of_a_task_brings_its_classes_and_one_image_of_each():
    stream = task_stream(dataset(), step=3, chunk=2)
    parts = stream.parts()
    assert [part.content.index for part in parts] == list(range(len(parts)))
    for task in stream.tasks:
        own = [part for part in parts if part.task == task.index]
        assert own[0].content.names == task.names
        assert own[0].content.classes == task.classes
        assert sorted(own[0].content.train.labels) == list(task.classes)  # three images, though a chunk has two
        assert {len(part.content.train) for part in own[1:-1]} == {2}
        assert all(part.content.names == () and len(part.content.classes) == 0 for part in own[1:])
        assert [part.last for part in own] == [False] * (len(own) - 1) + [True]


def test_a_task_of_one_chunk():
    assert sizes(task_stream(dataset(), step=3, chunk=100)) == [26, 16]


def test_images_come_in_random_order_and_always_in_the_same():
    first, again = (task_stream(dataset(), step=6, chunk=7) for _ in range(2))
    assert rows(first.tasks[0].train) == rows(again.tasks[0].train) != sorted(rows(first.tasks[0].train))
    late = first.tasks[0].train.labels[20:]
    assert (np.diff(late) < 0).any()  # classes are mixed


def test_a_share_of_each_class_comes_with_later_tasks():
    sharp, blurry = (task_stream(dataset(), step=2, blurry=share) for share in (0.0, 0.5))
    for task, whole in zip(blurry.tasks, sharp.tasks, strict=True):
        for c, n in zip(task.classes, np.bincount(whole.train.labels)[task.classes.start :], strict=True):
            stays = n if task.index == 2 else max(1, n - round(0.5 * n))
            assert (task.train.labels == c).sum() == stays
    assert (blurry.tasks[1].train.labels < 2).any()
    everything = sorted(row for task in blurry.tasks for row in rows(task.train))
    assert everything == list(range(sum(COUNTS)))
    assert [len(test) for test in blurry.tests] == [len(test) for test in sharp.tests]


def test_classes_come_in_their_order_however_blurry():
    stream = task_stream(dataset(), step=1, blurry=0.99, chunk=1)
    assert [part.content.names for part in stream.parts() if part.content.names] == [(name,) for name in "abcdef"]


def test_an_image_that_is_left_out_is_replaced_at_the_start_of_its_task():
    """A chunk is as large as it takes to have one image of each class, wherever these stand."""
    stream = task_stream(dataset(), step=2, chunk=2)
    less = without(stream, [[0], [], [], [], [], []])
    assert set(less.parts()[0].content.train.labels) == {0, 1}
    assert sum(sizes(less)) == sum(COUNTS) - 1
    assert less.fingerprint != stream.fingerprint


@pytest.mark.parametrize(("key", "value"), [("blurry", 1.0), ("blurry", -0.1), ("blurry", float("nan")), ("chunk", 0)])
def test_what_is_out_of_range_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} {value}: must be at least"):
        task_stream(dataset(), step=2, **{key: value})

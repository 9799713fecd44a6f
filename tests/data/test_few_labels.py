"""Streams of which only some training images are labelled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numbered import COUNTS, Numbers, dataset, rows
from PIL import Image

from cairn.data.few_labels import few_labels
from cairn.data.folders import class_folders, folder_dataset, loose_pictures, unreadable
from cairn.data.images import Concatenation, Subset, Unlabelled
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import task_stream, without
from cairn.errors import ConfigError, DataError


@pytest.mark.parametrize("share", [0.01, 0.125, 0.5, 0.99])
def test_a_share_of_each_class_keeps_its_label_and_no_image_is_lost(share):
    whole, few = task_stream(dataset(), step=2), task_stream(dataset(), step=2, labelled=share)
    for before, task in zip(whole.tasks, few.tasks, strict=True):
        for c in task.classes:
            assert (task.train.labels == c).sum() == max(1, round(share * COUNTS[c]))
        truth = dict(zip(rows(before.train), before.train.labels, strict=True))
        assert [truth[item] for item in rows(task.train)] == task.train.labels.tolist()
        hidden = rows(task.unlabelled) if task.unlabelled is not None else []
        assert sorted([*rows(task.train), *hidden]) == sorted(rows(before.train))
    assert [rows(test) for test in few.tests] == [rows(test) for test in whole.tests]


def test_the_draw_is_always_the_same_and_even():
    first, again = (task_stream(dataset(), step=6, labelled=0.5).tasks[0].train for _ in range(2))
    assert rows(first) == rows(again)
    kept = np.zeros(1000)
    told, _ = few_labels([Numbers(np.zeros(1000))], 0.3)
    kept[rows(told[0])] = 1
    assert abs(np.diff([part.sum() for part in kept.reshape(4, 250)])).max() < 40


def test_all_labels_is_what_it_was():
    stream = task_stream(dataset(), step=2)
    assert task_stream(dataset(), step=2, labelled=1.0).fingerprint == stream.fingerprint
    assert all(task.unlabelled is None for task in stream.tasks)
    assert len(stream.collections) == 6
    assert task_stream(dataset(), step=1, labelled=0.5).tasks[4].unlabelled is None  # its only image is labelled


def test_of_an_image_without_a_label_nothing_says_what_it_shows():
    stream = task_stream(shapes_dataset(), step=20, limit_train=4, labelled=0.5)
    hidden = stream.tasks[0].unlabelled
    assert hidden is not None
    assert len(hidden) == 40
    assert set(hidden.labels) == {-1}
    for name in ("mask", "targets", "source", "images", "indices"):
        assert not hasattr(hidden, name)
    assert hidden[0].shape == (56, 56, 3)


def test_limits_and_tail_come_before():
    stream = task_stream(dataset(), step=6, limit_train=8, imbalance=4, labelled=0.5)
    whole = task_stream(dataset(), step=6, limit_train=8, imbalance=4)
    sizes = [np.bincount(s.tasks[0].train.labels) for s in (stream, whole)]
    assert sizes[0].tolist() == [max(1, round(n / 2)) for n in sizes[1].tolist()]


def test_loose_pictures_come_with_every_task_beside_those_whose_label_is_hidden():
    loose = Unlabelled(Numbers(np.zeros(3)))
    stream = task_stream(dataset(), step=2, labelled=0.5, unlabelled=loose)
    for task in stream.tasks:
        assert task.unlabelled is not None
        assert rows(task.unlabelled)[-3:] == [0, 1, 2]
        assert set(task.unlabelled.labels) == {-1}
    assert [rows(task.unlabelled) for task in task_stream(dataset(), step=3, unlabelled=loose).tasks] == [[0, 1, 2]] * 2


def test_images_without_labels_can_be_left_out():
    stream = task_stream(dataset(), step=2, labelled=0.5)
    before = [rows(images) for images in stream.unlabelled]
    less = without(stream, [[], [], [], [], [], [], [0, 2], [], range(len(before[2]))])
    assert [rows(images) for images in less.unlabelled] == [np.delete(before[0], [0, 2]).tolist(), before[1]]
    assert less.tasks[2].unlabelled is None
    assert [rows(test) for test in less.tests] == [rows(test) for test in stream.tests]


def test_a_folder_of_pictures_whatever_they_are_called(tmp_path):
    for name in ("b.png", "inside/deep/a.jpg", "inside/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    images, notices = loose_pictures(tmp_path)
    assert [images.describe(i).partition("/")[2] for i in range(4)] == [
        "b.png",
        "inside/c.png",
        "inside/deep/a.jpg",
        "torn.png",
    ]
    assert images[2].size == (8, 8)
    assert ".txt" in notices[0]
    assert list(unreadable(Concatenation([Subset(images, np.array([0, 3]), images.labels[:2])]))) == [1]
    assert len({images.identity(i) for i in range(4)}) == 4


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no picture in it \(.jpg, .png, ...\); give one that has some"):
        loose_pictures(tmp_path)
    (tmp_path / "1.png").write_bytes(b"")
    for name, call in (
        ("pictures without labels", loose_pictures),
        ("pictures", class_folders),
        ("data", folder_dataset),
    ):
        with pytest.raises(DataError, match=f"{name} '.*1.png': is a file, not a folder; give "):
            call(tmp_path / "1.png")
    with pytest.raises(DataError, match="nowhere': no such folder"):
        loose_pictures(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match=f"labelled {share}: must be above 0 and at most 1"):
        task_stream(dataset(), step=2, labelled=share)


def test_an_online_stream_is_labelled():
    with pytest.raises(ConfigError, match="chunk 4: images of an online stream are labelled; leave --labelled"):
        task_stream(dataset(), step=2, labelled=0.5, chunk=4)


def test_images_of_several_classes_are_labelled():
    from cairn.data.attributes import attributes_dataset

    with pytest.raises(ConfigError, match="images without labels: data 'attributes' has several classes in an image"):
        task_stream(attributes_dataset(), step=5, labelled=0.5)


def test_a_task_says_nothing_of_them_after_a_change():
    task = task_stream(dataset(), step=2, labelled=0.5).tasks[0]
    assert replace(task, index=3).unlabelled is task.unlabelled

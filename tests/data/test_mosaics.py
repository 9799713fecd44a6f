"""Grids of the pictures of a data set."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cairn.data.catalogue import CATALOGUE
from cairn.data.embeddings import save_features
from cairn.data.images import Dataset, LabelSets, reduced
from cairn.data.mosaics import ALIKE, CELL, MEAN, PLACES, Mosaics, mosaic_dataset, superclasses
from cairn.data.opening import open_dataset
from cairn.data.stream import long_tail, task_stream
from cairn.errors import ConfigError, DataError
from cairn.experiment.inputs import readable
from cairn.experiment.run import RunConfig, run_stream

ROOT = Path(__file__).resolve().parents[2]

COARSE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16,
    9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0,
    1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip
"""`coarse_label` of CIFAR-100's classes in their published, alphabetical order."""

CIFAR = [*json.loads((ROOT / "examples" / "cifar100-descriptions.json").read_text())["classes"]]


class Sealed:
    """Pictures of k classes, which must not be opened."""

    def __init__(self, k, each, name):
        self.labels, self.name = np.arange(k * each) % k, name

    def __len__(self):
        return len(self.labels)

    def describe(self, index):
        return f"{self.name}{index}"

    def identity(self, index):
        return self.describe(index).encode()


class Tiles(Sealed):
    """Pictures of one colour each, which says their number; their sides are given."""

    def __init__(self, k, each, name, sizes=((6, 6),)):
        super().__init__(k, each, name)
        self.sizes = sizes

    def __getitem__(self, index):
        return Image.new("RGB", self.sizes[index % len(self.sizes)], (index, 7, 9))


def dataset(images=Sealed, classes=CIFAR, each=20, **kinds):
    k = len(classes)
    return Dataset("toy", tuple(classes), images(k, each, "train", **kinds), images(k, 5, "test", **kinds), ("a {}.",))


def shown(sets):
    """Of each mosaic the numbers of its pictures."""
    assert isinstance(sets.source, Mosaics)
    return [[row for row in cells if row >= 0] for cells in sets.source.cells.tolist()]


# --- what is in them ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_picture_is_in_one_mosaic_whose_labels_are_those_of_its_pictures(split):
    data = dataset()
    sets, pictures = getattr(mosaic_dataset(data), split), getattr(data, split)
    assert isinstance(sets, LabelSets)
    assert sets.source.pictures is pictures
    assert sorted(row for rows in shown(sets) for row in rows) == [*range(len(pictures))]
    for rows, targets in zip(shown(sets), sets.targets, strict=True):
        assert (
            sorted(pictures.labels[rows]) == targets.nonzero()[0].tolist()
        )  # each class once: sorted, without repeats
    assert (sets.targets.sum(0) == np.bincount(pictures.labels)).all()


def test_one_to_four_pictures_as_often_at_places_drawn_anew():
    cells = mosaic_dataset(dataset(each=100)).train.source.cells
    filled = Counter((cells >= 0).sum(1).tolist())
    assert {*filled} == {1, 2, 3, 4}
    assert max(abs(number / len(cells) - 0.25) for number in filled.values()) < 0.03
    alone = (cells >= 0)[(cells >= 0).sum(1) == 1].mean(0)
    assert abs(alone - 1 / PLACES).max() < 0.05


def test_further_classes_are_often_of_the_same_superclass():
    sets = mosaic_dataset(dataset(each=100)).train
    groups = superclasses(CIFAR)
    one = [len({groups[c] for c in targets.nonzero()[0]}) == 1 for targets in sets.targets if targets.sum() > 1]
    assert abs(np.mean(one) - ALIKE) < 0.05


def test_where_superclasses_are_unknown_all_classes_are_drawn_alike():
    names = [f"class {i}" for i in range(100)]
    assert superclasses(names).tolist() == [*range(100)]
    sets = mosaic_dataset(dataset(each=100, classes=names)).train
    groups = superclasses(CIFAR)  # by number, which these know nothing of
    one = [len({groups[c] for c in targets.nonzero()[0]}) == 1 for targets in sets.targets if targets.sum() > 1]
    assert np.mean(one) < 0.05


def test_the_superclasses_are_those_that_cifar100_is_published_with():
    assert superclasses(CIFAR).tolist() == COARSE
    assert superclasses(["Sweet Pepper", "worm"]).tolist() == [4, 13]
    assert len(CIFAR) == CATALOGUE["cifar100"].classes[0]


def test_mosaics_are_the_same_every_time_and_others_where_pictures_differ():
    stream = task_stream(mosaic_dataset(dataset()), step=50)
    assert stream.fingerprint == task_stream(mosaic_dataset(dataset()), step=50).fingerprint
    fewer, called = dataset(each=19), dataset()
    called.train.name = "others"
    prints = {task_stream(mosaic_dataset(data), step=50).fingerprint for data in (fewer, called)}
    assert len({stream.fingerprint, *prints}) == 3


def test_a_long_tail_is_of_the_first_pictures_of_each_class():
    data = dataset(each=60)
    stream = task_stream(mosaic_dataset(data), step=100, imbalance=20)
    sets = stream.tasks[0].label_sets
    n = long_tail(60, 100, 20)
    assert sets is not None
    assert sets.targets.sum(0).tolist() == n.tolist()
    assert (n.min(), n.max()) == (3, 60)
    rows = sorted(row for rows in shown(sets) for row in rows)
    assert rows == [row for row in range(6000) if row // 100 < n[row % 100]]
    assert sum(map(len, stream.tests)) == len(mosaic_dataset(data).test)
    with pytest.raises(ConfigError, match="imbalance 20: data 'attributes' has several classes in an image"):
        task_stream(open_dataset("attributes"), step=5, imbalance=20)


# --- what they look like ---


def test_a_mosaic_has_its_pictures_at_their_places_and_the_mean_colour_elsewhere():
    sets = mosaic_dataset(dataset(Tiles, ["a", "b", "c", "d", "e"], each=40)).train
    empty = 0
    for index, cells in enumerate(sets.source.cells.tolist()):
        mosaic = np.asarray(sets[index])
        assert mosaic.shape == (12, 12, 3)
        for place, row in enumerate(cells):
            cell = mosaic[6 * (place // 2) :, 6 * (place % 2) :][:6, :6]
            assert (cell == (MEAN if row < 0 else (row, 7, 9))).all()
            empty += row < 0
    assert empty


def test_cells_are_as_wide_as_the_largest_picture_and_show_its_middle():
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 200

    class Pair(Tiles):
        def __getitem__(self, index):
            return wide if index == 0 else Image.new("RGB", (2, 3))

    found = np.asarray(Mosaics(Pair(2, 1, ""), np.array([[0, 1, -1, -1]]), np.arange(2))[0])
    assert found.shape == (8, 8, 3)
    assert (found[:4, :4] == 200).all()
    assert (found[:4, 4:] == 0).all()
    large = Mosaics(Tiles(2, 1, "", sizes=((500, 300),)), np.array([[0, -1, -1, 1]]), np.arange(2))
    assert large[0].size == (2 * CELL, 2 * CELL)


def test_what_a_mosaic_is_called_and_known_by():
    pictures = Sealed(2, 3, "p")
    one = Mosaics(pictures, np.array([[3, -1, -1, 0], [-1, 3, -1, 0]]), np.arange(2))
    assert one.describe(0) == "mosaic of p3, -, -, p0"
    assert one.identity(0) != one.identity(1)
    assert one.identity(0) == Mosaics(pictures, one.cells[:1], np.arange(2)).identity(0)


# --- files ---


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 6), ("test", 3)):
        for name in ("bear", "lion", "wolf"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(number):
                picture = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
                picture.save(tmp_path / "pictures" / split / name / f"{i}.jpg")
    return tmp_path / "pictures"


def test_mosaics_of_a_folder_are_learned_and_measured_as_images_that_show_several_classes(folder):
    found = run_stream(RunConfig(method="simplecil", data=f"mosaic={folder}", step=2, imbalance=3))
    assert found.data == "mosaic=pictures"
    assert found.metric == "mAP"
    assert sorted(found.train_sizes) == [2, 3, 6]
    assert found.accuracy[-1][0] is not None


def test_test_mosaics_have_test_pictures_alone(folder):
    data = open_dataset(f"mosaic={folder}")
    for split, images in (("train", data.train), ("test", data.test)):
        for row in range(len(images)):
            places = images.describe(row).removeprefix("mosaic of ").split(", ")
            assert all(place == "-" or place.startswith(f"{split}/") for place in places)


def test_a_picture_that_cannot_be_read_takes_its_mosaic_with_it(folder):
    (folder / "train" / "lion" / "1.jpg").write_bytes(b"no picture")
    stream = task_stream(open_dataset(f"mosaic={folder}"), step=3)
    with pytest.raises(DataError, match=r"mosaic of .*lion/1\.jpg"):
        readable(stream, skip=False)
    left = readable(stream, skip=True)
    assert len(left.tasks[0].label_sets) == len(stream.tasks[0].label_sets) - 1


def test_pictures_are_decoded_reduced_to_no_less_than_a_cell(folder):
    data = open_dataset(f"mosaic={folder}")
    small = reduced(data.train, 8)
    assert small[0].size == data.train[0].size == (2 * CELL, 2 * CELL)
    assert min(small.source.pictures[0].size) == 150
    assert min(data.train.source.pictures[0].size) == 300


def test_what_has_no_mosaics_is_refused(tmp_path):
    rng, labels, file = np.random.default_rng(0), np.array([0, 1, 0, 1]), tmp_path / "rows.safetensors"
    rows = rng.normal(size=(4, 8)).astype(np.float32)
    save_features(
        file, train_features=rows, train_labels=labels, test_features=rows, test_labels=labels, class_names=["a", "b"]
    )
    for spec, problem in (
        (f"mosaic={file}", "holds embeddings, of which there are no mosaics; give pictures"),
        ("mosaic=attributes", "its images show several classes as they are; give it without mosaic="),
        ("mosaic=", "no data set after '='; write mosaic=PATH"),
        ("mosaic", "no data set after '='; write mosaic=PATH"),
        (f"mosaic={tmp_path}/none", "no such folder or file; check the path"),
    ):
        with pytest.raises(DataError, match=problem):
            open_dataset(spec)


def test_a_folder_called_mosaic_is_a_folder(folder, monkeypatch):
    folder.rename(folder.parent / "mosaic")
    monkeypatch.chdir(folder.parent)
    assert isinstance(open_dataset("mosaic").train, LabelSets) is False
    assert isinstance(open_dataset("mosaic=mosaic").train, LabelSets)

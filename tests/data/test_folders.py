"""Folders of images: layouts, laziness, complaints. What becomes of odd files is in test_hard_inputs."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cairn.data.decoding import rgb
from cairn.data.folders import folder_dataset, unreadable
from cairn.data.images import Concatenation, Subset
from cairn.data.stream import task_stream
from cairn.errors import ConfigError, DataError

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar100"


def paint(path, colour=(200, 30, 30), size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def split_layout(root, classes=("cat", "dog"), test="test", train_images=3, test_images=2):
    for name in classes:
        for i in range(train_images):
            paint(root / "train" / name / f"{i}.png")
        for i in range(test_images):
            paint(root / test / name / f"t{i}.png")
    return root


def flat_layout(root, classes=("cat", "dog"), images=10):
    for name in classes:
        for i in range(images):
            paint(root / name / f"{i}.png")
    return root


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# --- layouts ---


@pytest.mark.parametrize("test", ["test", "val"])
def test_split_layout(tmp_path, test):
    data = folder_dataset(split_layout(tmp_path, test=test))
    assert data.name == tmp_path.name
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.dtype == np.int64
    assert [data.test.describe(i) for i in range(4)] == [
        f"{test}/{name}/t{i}.png" for name in ("cat", "dog") for i in (0, 1)
    ]
    assert data.train[0].mode == "RGB"
    assert data.train[0].size == (4, 3)


def test_test_folder_comes_before_val(tmp_path):
    split_layout(tmp_path, test="val")
    split_layout(tmp_path, test="test")
    assert folder_dataset(tmp_path).test.describe(0).startswith("test/")


def test_flat_layout_is_cut_per_class(tmp_path):
    data = folder_dataset(flat_layout(tmp_path))
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    shown = [side.describe(i) for side in (data.train, data.test) for i in range(len(side))]
    assert sorted(shown) == sorted(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10))


def test_flat_split_follows_the_seed(tmp_path):
    flat_layout(tmp_path)

    def items(**options):
        test = folder_dataset(tmp_path, **options).test
        return [test.describe(i) for i in range(len(test))]

    assert items() == items(split_seed=0)
    assert items() != items(split_seed=1)
    assert len(items(test_share=0.5)) == 10


def test_flat_split_keeps_one_image_on_either_side(tmp_path):
    data = folder_dataset(flat_layout(tmp_path, images=2), test_share=0.01)
    assert np.bincount(data.test.labels).tolist() == np.bincount(data.train.labels).tolist() == [1, 1]


def test_names_are_the_folders_and_order_is_fixed(tmp_path):
    data = folder_dataset(split_layout(tmp_path, classes=("b_b", "Zebra", "a")))
    assert data.classes == ("Zebra", "a", "b_b")


def test_descriptions_do_not_depend_on_the_machine(tmp_path):
    one, two = split_layout(tmp_path / "here"), split_layout(tmp_path / "there" / "deeper")
    assert task_stream(folder_dataset(one), step=1).fingerprint == task_stream(folder_dataset(two), step=1).fingerprint


def test_hidden_and_foreign_files_are_passed_over(tmp_path):
    split_layout(tmp_path)
    paint(tmp_path / "train" / ".cache" / "x.png")
    paint(tmp_path / "train" / "cat" / ".hidden.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "folder.png").mkdir()
    (tmp_path / "train" / "README.md").write_text("no class")
    paint(tmp_path / "train" / "cat" / "UPPER.JPG")
    data = folder_dataset(tmp_path)
    assert data.classes == ("cat", "dog")
    assert [data.train.describe(i) for i in np.flatnonzero(data.train.labels == 0)] == [
        "train/cat/0.png",
        "train/cat/1.png",
        "train/cat/2.png",
        "train/cat/UPPER.JPG",
    ]


def test_nothing_is_opened_before_it_is_asked_for(tmp_path, monkeypatch):
    split_layout(tmp_path)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    stream = task_stream(folder_dataset(tmp_path), step=1)
    assert len(stream.tasks) == 2


# --- complaints ---


def test_missing_folder(tmp_path):
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path / "nowhere")
    one_line(error, "nowhere", "no such folder", "give a folder with train/<class>/")


def test_file_instead_of_folder(tmp_path):
    paint(tmp_path / "x.png")
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path / "x.png")
    one_line(error, "x.png", "is a file, not a folder")


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_share_out_of_range(tmp_path, share):
    with pytest.raises(ConfigError, match=f"test_share {share}: must be above 0 and below 1"):
        folder_dataset(tmp_path, test_share=share)


def test_no_class(tmp_path):
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path)
    one_line(error, str(tmp_path), "no class found", "make one folder of images per class")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path)
    one_line(error, str(tmp_path / "train"), "no class found")


@pytest.mark.parametrize(("present", "absent"), [("train", "neither test/ nor val/"), ("val", "no train/")])
def test_half_a_split(tmp_path, present, absent):
    paint(tmp_path / present / "cat" / "0.png")
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path)
    one_line(error, f"has {present}/ but {absent}", "add")


@pytest.mark.parametrize(("side", "other"), [("test", "train"), ("train", "test")])
def test_class_on_one_side_only(tmp_path, side, other):
    split_layout(tmp_path)
    paint(tmp_path / side / "owl" / "0.png")
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path)
    one_line(error, "class 'owl'", f"'{other}' lacks it", f"add images to {other}/owl or remove {side}/owl")


def test_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    split_layout(tmp_path)
    refused, scandir = tmp_path / "train" / "cat", os.scandir

    def guarded(folder):
        if folder == refused:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError) as error:
        folder_dataset(tmp_path)
    one_line(error, str(refused), "Permission denied", "check its permissions")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_damaged_image_is_named_when_opened(tmp_path, content):
    split_layout(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(content)
    data = folder_dataset(tmp_path)
    assert data.train[0].mode == "RGB"
    with pytest.raises(DataError) as error:
        data.train[1]
    one_line(error, str(tmp_path / "train" / "cat" / "1.png"), "cannot be read", "replace or remove the file")


# --- checking beforehand ---


def test_unreadable_names_all_offenders(tmp_path):
    split_layout(tmp_path)
    for name in ("cat/2.png", "dog/0.png"):
        (tmp_path / "train" / name).write_bytes(b"not an image")
    data = folder_dataset(tmp_path)
    assert unreadable(data.train) == {2: "not an image", 3: "not an image"}
    assert [data.train.describe(i) for i in (2, 3)] == ["train/cat/2.png", "train/dog/0.png"]
    assert unreadable(data.test) == {}
    assert list(unreadable(Concatenation([data.test, data.train]))) == [6, 7]
    some = Subset(data.train, np.array([3, 0]), np.array([1, 0]))
    assert list(unreadable(Subset(some, np.array([1, 0]), np.array([0, 1])))) == [1]


def test_unreadable_passes_over_what_is_no_file():
    class Drawn:
        labels = np.zeros(2, dtype=np.int64)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise AssertionError("opened")

        def describe(self, index):
            return str(index)

    assert unreadable(Drawn()) == {}


# --- what becomes of other kinds of pixels ---


def opened(tmp_path, image, suffix=".png", **options):
    for side in ("train", "test"):
        folder = tmp_path / side / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"0{suffix}", **options)
    found = folder_dataset(tmp_path).train[0]
    assert found.mode == "RGB"
    return np.asarray(found)


def test_bilevel(tmp_path):
    assert opened(tmp_path, Image.new("1", (2, 2), 1))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 127, 255]),
        (np.array([[-2.0, 0.0, 2.0]], dtype=np.float32), [0, 127, 255]),
        (np.array([[0, 256, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[0, 100000, 200000]], dtype=np.int32), [0, 127, 255]),
    ],
)
def test_floats_and_wide_integers(values, expected):
    assert np.asarray(rgb(Image.fromarray(values)))[0, :, 0].tolist() == expected


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the CIFAR-100 folder beside the project is absent")
def test_real_photographs():
    data = folder_dataset(CIFAR)
    assert len(data.classes) == 100
    assert np.bincount(data.train.labels).tolist() == [100] * 100
    assert np.bincount(data.test.labels).tolist() == [20] * 100
    assert data.train[1234].size == (32, 32)


# --- identity ---


def test_an_image_is_its_path_size_and_time(tmp_path):
    root = flat_layout(tmp_path / "here")
    before = folder_dataset(root).train
    known = [before.identity(i) for i in range(len(before))]
    assert len(set(known)) == len(known)
    again = folder_dataset(root.rename(tmp_path / "there")).train
    assert [again.identity(i) for i in range(len(again))] == known
    path = tmp_path / "there" / again.describe(0)
    old = path.stat()
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert again.identity(0) != known[0]
    paint(path, size=(40, 30))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert again.identity(0) != known[0]
    path.unlink()
    with pytest.raises(DataError) as error:
        again.identity(0)
    one_line(error, str(path), "remove the file")

"""Files that are in a data set twice."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from cairn.data import same_files as module
from cairn.data.folders import folder_dataset
from cairn.data.images import Concatenation
from cairn.data.opening import open_dataset
from cairn.data.same_files import repeats, same_files
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import task_stream


def paint(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="BMP")


@pytest.fixture
def root(tmp_path):
    """Two classes of three training pictures and of two and one test pictures, all different files of one size."""
    for seed, (part, name, i) in enumerate(
        [(part, name, i) for part in ("train", "test") for name in ("cat", "owl") for i in range(3)][:-1]
    ):
        if (part, name, i) != ("test", "cat", 2):
            paint(tmp_path / "data" / part / name / f"{i}.bmp", seed)
    return tmp_path / "data"


def said(root, **how):
    return repeats(task_stream(open_dataset(root), step=1, **how))


def test_pictures_that_are_all_different_give_no_notice(root):
    assert said(root) == []


def test_test_images_that_are_learned_are_counted_and_the_first_is_named(root):
    shutil.copy(root / "train" / "owl" / "2.bmp", root / "test" / "owl" / "other name.bmp")
    (text,) = said(root)
    assert "1 of 5 test images are learned, byte for byte (test/owl/other name.bmp is train/owl/2.bmp): " in text
    assert text.endswith("keep each on one side")
    for name in ("cat", "owl"):
        for i in range(2):
            shutil.copy(root / "train" / name / f"{i}.bmp", root / "test" / name / f"{i}.bmp")
    (text,) = said(root)
    assert "5 of 5 test images" in text
    assert "(test/cat/0.bmp is train/cat/0.bmp, ...)" in text
    (text,) = said(root, limit_train=1)  # of what is used alone
    assert "2 of 5" in text


def test_a_folder_that_is_split_here_has_the_same_picture_on_both_sides(tmp_path):
    for name, seeds in (("cat", [1] * 5), ("owl", range(2, 7))):
        for i, seed in enumerate(seeds):
            paint(tmp_path / name / f"{i}.bmp", seed)
    (text,) = said(tmp_path)
    assert "1 of 2 test images" in text


def test_validation_looks_at_the_images_it_tests_on(root):
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    assert "6 of 6 test images" in said(root)[0]
    assert said(root, validation=0.4) == []
    shutil.copy(root / "train" / "cat" / "0.bmp", root / "train" / "cat" / "1.bmp")
    shutil.copy(root / "train" / "cat" / "0.bmp", root / "train" / "cat" / "2.bmp")
    assert "1 of 2 test images" in said(root, validation=0.4)[0]


def test_a_list_that_names_a_file_for_both_parts(tmp_path):
    for i in range(4):
        paint(tmp_path / "pictures" / f"{i}.bmp", 50 + i)
    for part, rows in (("train", "0a 1a 2b 3b"), ("test", "0a 2b")):
        lines = [f"pictures/{row[0]}.bmp,{row[1]}" for row in rows.split()]
        (tmp_path / f"{part}.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    assert "2 of 2 test images are learned" in said(tmp_path)[0]
    for part in ("train", "test"):
        path = tmp_path / f"{part}.csv"
        path.write_text(path.read_text().replace("label\n", "labels\n").replace("0.bmp,a", "0.bmp,a;b"))
    assert "2 of 2 test images are learned" in said(tmp_path)[0]
    assert len(said(tmp_path)) == 1  # shown to be of two classes, as it is


def test_a_training_image_of_two_classes_is_named_and_one_twice_in_a_class_is_not(root):
    shutil.copy(root / "train" / "cat" / "0.bmp", root / "train" / "cat" / "1.bmp")
    assert said(root) == []
    shutil.copy(root / "train" / "cat" / "0.bmp", root / "train" / "owl" / "0.bmp")
    (text,) = said(root)
    assert "the same file in two classes, learned as both: 1 image (train/cat/0.bmp is train/owl/0.bmp)" in text


def test_groups_are_those_that_comparing_every_pair_finds(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):  # some end alike, some begin alike, some are empty
        begin, end = (bytes([rng.integers(2)]) * int(rng.integers(3)) * 4096 for _ in range(2))
        (tmp_path / "all" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / "a" / f"{i:02}.png").write_bytes(begin + end)
    dataset = folder_dataset(tmp_path / "all")
    images = Concatenation([dataset.train, dataset.test])
    held = [(tmp_path / "all" / images.describe(i)).read_bytes() for i in range(len(images))]
    naive = [[j for j, other in enumerate(held) if other == value] for value in held]
    assert same_files(images) == [g for i, g in enumerate(naive) if len(g) > 1 and g[0] == i]


def test_files_of_different_sizes_are_not_opened_and_drawn_pictures_not_asked_for(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / "all" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / "a" / f"{i}.png").write_bytes(b"x" * i)
    monkeypatch.setattr(module, "_ending", None)
    dataset = folder_dataset(tmp_path / "all")
    assert same_files(Concatenation([dataset.train, dataset.test])) == []
    monkeypatch.setattr(module, "same_files", None)
    assert repeats(task_stream(shapes_dataset(), step=20, limit_train=1, limit_test=1)) == []


def test_a_file_that_is_gone_is_the_same_as_none(root):
    images = folder_dataset(root).train
    shutil.copy(root / "train" / "cat" / "0.bmp", root / "train" / "cat" / "1.bmp")
    assert same_files(images) == [[0, 1]]
    (root / "train" / "cat" / "0.bmp").unlink()
    assert same_files(images) == []


def test_a_run_and_embed_say_so(root, cairn):
    shutil.copy(root / "train" / "owl" / "2.bmp", root / "test" / "owl" / "0.bmp")
    for call in (
        ["run", "zero-shot", "--data", str(root), "--step", "1", "--out", "r"],
        ["embed", "--data", str(root), "--out", "f.safetensors"],
    ):
        status, out, err = cairn(*call)
        assert status == 0, err
        assert "1 of 4 test images are learned" in " ".join((out + err).split())

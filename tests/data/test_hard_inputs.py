"""Hard inputs: every row of the table in docs/hard-inputs.md is a test here, and the other way round."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from cairn.classifier.classifier import IncrementalClassifier
from cairn.cli import app as cli
from cairn.data.decoding import decoded_within
from cairn.data.embeddings import features_dataset
from cairn.data.folders import class_folders, folder_dataset, unreadable
from cairn.data.picture_files import ENDINGS, optional_formats, passed_over, pictures_below
from cairn.data.stream import task_sizes, task_stream
from cairn.data.templates import filled
from cairn.errors import ConfigError, DataError, TowersError, UnreadableImages, counted
from cairn.experiment.inputs import prepared
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.towers.catalogue import load_towers
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hard-inputs.md"
QUICK = ("stage1.schedule.epochs=1", "stage2.schedule.epochs=1")


# --- what the tests stand on ---


def paint(path, colour=(200, 30, 30), size=(6, 5)):
    """A picture that is no other's file, though it may show the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = PngInfo()
    own.add(b"tEXt", b"path\0" + hashlib.sha256(os.fsencode(path)).hexdigest().encode(), after_idat=True)
    Image.new("RGB", size, colour).save(path, "PNG", pnginfo=own)


@pytest.fixture
def root(tmp_path):
    """A sound folder: two classes of two training images and a test image each."""
    folder = tmp_path / "pictures"
    for i, name in enumerate(("cat", "dog")):
        for file in ("train/{}/1.png", "train/{}/2.png", "test/{}/3.png"):
            paint(folder / file.format(name), colour=(200 * i, 30, 200 - 200 * i))
    return folder


def config(data, **changes):
    return RunConfig(**({"method": "zero-shot", "data": str(data), "step": 1, "device": "cpu"} | changes))


def refusal(call, *parts, kind=DataError):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable()  # and so on one line
    for part in parts:
        assert part in text
    return text


def described(stream):
    return [images.describe(i) for images in stream.collections for i in range(len(images))]


def refused(root, *names, why):
    """Those files, below `root`, are all named before training and when opened; `skip` leaves out them and no others, and names them
    in its notice: whether it does."""
    assert refusal(
        lambda: prepared(config(root)),
        f"{counted(len(names), 'image')} that cannot be read",
        why,
        "repair or remove them",
        "--on-bad-image skip",
        *names,
    )
    data = folder_dataset(root)
    for images in (data.train, data.test):
        for i in range(len(images)):
            if images.describe(i) in names:
                assert refusal(lambda images=images, i=i: images[i], images.describe(i), why, "remove the file")
    stream = prepared(config(root, on_bad_image="skip")).stream
    assert sorted([*described(stream), *names]) == sorted(described(task_stream(data, step=1)))
    assert f"left out: {counted(len(names), 'image')}" in stream.notices[-1]
    return all(name in stream.notices[-1] for name in names)


def read(root, name):
    """The image as a method gets it, after a run's checks: an array (h, w, 3) of ints."""
    ready = prepared(config(root))
    images = next(i for i in ready.stream.collections if name in [i.describe(k) for k in range(len(i))])
    image = images[[images.describe(k) for k in range(len(images))].index(name)]
    assert image.mode == "RGB"
    assert ready.towers.prepare(image).shape == (3, 56, 56)
    return np.asarray(image).astype(int)


def saved(root, image, name="0.png", **options):
    """What is read of an image that was saved as a training image."""
    image.save(root / "train" / "cat" / name, **options)
    return read(root, f"train/cat/{name}")


def noise(size=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def bytes_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- the table ---


def test_the_table_names_the_tests():
    rows = re.findall(r"^\|[^|]+\|[^|]+\| `(test_\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_table_names_the_tests"}
    assert len(rows) == len(set(rows))
    assert set(rows) == here


# --- damaged files ---


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_truncated_jpeg(root, options):
    whole = bytes_of(noise(), "JPEG", **options)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    names = []
    for i, cut in enumerate((2, 3, 100, len(whole) // 2)):
        names.append(f"train/cat/cut{i}.jpg")
        (root / names[-1]).write_bytes(whole[:-cut])
    (root / "train" / "cat" / "whole.jpg").write_bytes(whole)
    assert refused(root, *names, why="truncated")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_truncated_images(root, kind):
    name = f"test/dog/cut.{kind.lower()}"
    (root / name).write_bytes(bytes_of(noise(), kind)[:-200])
    assert refused(root, name, why="(")


def test_zero_bytes(root):
    (root / "train" / "cat" / "0.jpg").touch()
    assert refused(root, "train/cat/0.jpg", why="not an image")


@pytest.mark.parametrize(
    "text", ["some words", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"], ids=["words", "postscript"]
)
def test_text_called_an_image(root, text):
    (root / "train" / "cat" / "0.png").write_text(text)
    assert refused(root, "train/cat/0.png", why="not an image")


@pytest.mark.parametrize("size", [(10_000, 9_000), (50_000, 50_000)], ids=["Pillow warns", "Pillow refuses"])
def test_decompression_bomb(root, size):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # No pixels at all follow the header: whoever tries to decode them says that the file is truncated.
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (root / "train" / "cat" / "0.png").write_bytes(bomb)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert refused(root, "train/cat/0.png", why="limit of")


def test_large_picture_sent_to_the_service():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture = small.resize((1200, 900), Image.Resampling.BICUBIC)

    def sent(kind, pixels=200_000, **how):
        file = io.BytesIO()
        picture.save(file, kind, **how)
        return decoded_within(file, pixels, 200)

    reduced = sent("JPEG", quality=95)  # at a quarter: an eighth would have fewer than 200 rows
    assert reduced.size == (300, 225)
    expected = np.asarray(picture.resize((300, 225), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(reduced) - expected).mean() < 3
    exif = picture.getexif()
    exif[0x0112] = 6
    assert sent("JPEG", exif=exif).size == (225, 300)
    for kind, how in (("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})):
        with pytest.raises(Image.DecompressionBombError, match="1200 x 900 pixels, where 200,000 are the most"):
            sent(kind, **how)
    assert np.array_equal(sent("PNG", pixels=1200 * 900), np.asarray(picture))


def test_many_damaged_images(root):
    for i in range(30):
        (root / "train" / "dog" / f"bad{i:02d}.png").touch()
    (root / "train" / "cat" / "bad.png").touch()
    (root / "test" / "cat" / "bad.png").touch()
    text = refusal(
        lambda: prepared(config(root)), "32 images", "train/cat/bad.png", "train/dog/bad18.png", ", and 12 more"
    )
    assert "bad19" not in text


def test_damaged_images_left_out(root, monkeypatch, capsys):
    (root / "train" / "cat" / "bad.png").touch()
    monkeypatch.chdir(root.parent)
    call = ["run", "zero-shot", "--data", "pictures", "--step", "1", "--out", "here"]
    assert refusal(lambda: cli.app(call, standalone_mode=False), "train/cat/bad.png")
    assert not Path("here").exists()
    cli.app([*call, "--on-bad-image", "skip"], standalone_mode=False)
    assert "note: left out: 1 image that cannot be read: train/cat/bad.png (not an image)" in capsys.readouterr().out
    # the split is that of the folder without the file
    skipped, everything = prepared(config(root, on_bad_image="skip")).stream, task_stream(folder_dataset(root), step=1)
    (root / "train" / "cat" / "bad.png").unlink()
    assert skipped.fingerprint == task_stream(folder_dataset(root), step=1).fingerprint != everything.fingerprint


def test_damaged_images_in_drift(root, monkeypatch, capsys):
    (root / "train" / "cat" / "bad.png").write_bytes(b"damaged")
    monkeypatch.chdir(root.parent)
    quick = [word for stage in (1, 2) for word in ("--set", f"stage{stage}.schedule.epochs=1")]
    call = ["drift", "--data", "pictures", "--step", "1", "--estimators", "mean", "--out", "here", *quick]
    assert refusal(lambda: cli.app(call, standalone_mode=False), "train/cat/bad.png", "--on-bad-image skip")
    assert not Path("here").exists()
    cli.app([*call, "--on-bad-image", "skip"], standalone_mode=False)
    assert "note: left out: 1 image that cannot be read: train/cat/bad.png (not an image)" in capsys.readouterr().out
    split = json.loads(Path("here/drift.json").read_text())["split"]
    (root / "train" / "cat" / "bad.png").unlink()
    assert split == task_stream(folder_dataset(root), step=1).fingerprint


def test_class_of_damaged_images(root):
    for file in (root / "test" / "dog").iterdir():
        file.write_bytes(b"")
    assert refusal(
        lambda: prepared(config(root, on_bad_image="skip")), "class 'dog' loses all its test images", "remove the class"
    )


@pytest.fixture
def learner(tmp_path, towers):
    """One that knows dark and bright pictures."""
    images = [np.full((4, 4, 3), shade, np.uint8) for shade in (0, 30, 220, 250)]
    IncrementalClassifier("simplecil", towers).partial_fit(images, ["dark", "dark", "bright", "bright"]).save(
        tmp_path / "l"
    )
    return tmp_path / "l"


def test_damaged_images_in_predict(tmp_path, learner, cairn):
    for name, colour in (("a", (0, 0, 0)), ("b", (250, 250, 250)), ("c", (0, 0, 0))):
        paint(tmp_path / "new" / f"{name}.png", colour)
    (tmp_path / "new" / "b0.jpg").write_bytes(bytes_of(noise(), "JPEG")[:-100])
    (tmp_path / "new" / "c0.png").touch()
    status, out, err = cairn("predict", learner, "new", "gone.png", "--csv", "--device", "cpu")
    assert status == 1
    rows = [line.split(",") for line in out.splitlines()[1:]]
    assert [(row[0], row[4]) for row in rows] == [("new/a.png", "dark"), ("new/b.png", "bright"), ("new/c.png", "dark")]
    assert "new/b0.jpg (image file is truncated" in err
    assert "new/c0.png (not an image)" in err
    assert "gone.png (No such file or directory)" in err
    assert "cannot be read: 3 of 6 images; the others are answered" in err
    # no answer where that is asked for, or where there is none to give
    status, out, err = cairn("predict", learner, "new", "--on-bad-image", "stop", "--device", "cpu")
    assert (status, out) == (2, "")
    assert "2 images that cannot be read: new/b0.jpg" in err
    assert cairn("predict", learner, "new/c0.png", "--device", "cpu")[:2] == (2, "")
    assert cairn("predict", learner, "new/a.png", "--device", "cpu")[0] == 0

    held = IncrementalClassifier.load(learner, device="cpu")
    files = sorted(Path("new").iterdir())
    for ask in (held.predict, held.predict_proba, held.known_score, held.predict_topk):
        with pytest.raises(UnreadableImages, match="2 image") as caught:
            ask(files)
        assert list(caught.value.reasons) == [2, 4]


def test_damaged_images_in_learn(root, tmp_path, cairn):
    (root / "train" / "cat" / "bad.png").touch()
    for name in ("cat", "dog"):
        (root / "train" / name / "2.png").unlink()  # the same picture as the other one
    call = ("learn", "new", root, "--method", "simplecil", "--towers", "tiny", "--device", "cpu")
    status, _, err = cairn(*call)
    assert status == 2
    assert "train/cat/bad.png (not an image)" in err
    assert not Path("new").exists()
    status, out, _ = cairn(*call, "--on-bad-image", "skip")
    assert status == 0
    assert "note: left out: 1 image that cannot be read" in out
    assert "2 pictures learned, 2 new classes" in out
    assert IncrementalClassifier.load("new", device="cpu").counts_.tolist() == [1, 1]
    (root / "train" / "owl").mkdir()
    (root / "train" / "owl" / "bad.png").touch()
    status, _, err = cairn("learn", "new", root, "--on-bad-image", "skip", "--again", "--device", "cpu")
    assert status == 2
    assert "class 'owl': 2 images that cannot be read" in err
    assert IncrementalClassifier.load("new", device="cpu").counts_.tolist() == [1, 1]


def test_damaged_row_of_a_table():
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    from cairn.data.hub import HubImages

    sound, cut = bytes_of(noise(), "PNG"), bytes_of(noise(), "JPEG")[:-100]
    cells = [{"bytes": data, "path": None} for data in (sound, cut, b"")]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    images = HubImages(rows, "image", np.zeros(3, dtype=np.int64), "toy/train")
    found = unreadable(images)
    assert list(found) == [1, 2]
    assert "truncated" in found[1]
    assert refusal(lambda: images[1], "toy/train[1]", "truncated", "repair the copy")


# --- kinds of pixels ---


def test_cmyk(root):
    pixels = saved(root, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "0.jpg", quality=100)
    assert np.abs(pixels[0, 0] - [0, 255, 255]).max() <= 3


def test_sixteen_bits(root):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert saved(root, Image.fromarray(values))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite(root, value):
    """One of them would stretch all others to nothing."""
    Image.fromarray(np.array([[0.0, value, 1.0]], dtype=np.float32)).save(root / "train" / "cat" / "0.tif")
    assert refused(root, "train/cat/0.tif", why="pixels that are not finite")


def test_palette(root):
    assert saved(root, Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4))[0, 0].tolist() == [10, 200, 30]


def test_alpha(root):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert saved(root, image).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((1, 0), (40, 0))
    assert saved(root, grey).tolist() == [[[40] * 3, [255] * 3]]


def test_palette_with_alpha(root):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.putdata([0, 1])
    assert saved(root, image, transparency=b"\x00\xff").tolist() == [[[255] * 3, [9, 8, 7]]]


def test_animation(root):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pixels = saved(root, frames[0], "0.gif", save_all=True, append_images=frames[1:])
    assert pixels[0, 0].tolist() == [255, 0, 0]


def test_one_pixel(root):
    for kind in ("png", "jpg", "gif", "bmp"):
        assert saved(root, Image.new("RGB", (1, 1)), f"0.{kind}").shape == (1, 1, 3)


def test_thread_of_an_image(root):
    """A thread of an image becomes one of the tower's size, and nothing of a thousand times that in between."""
    towers = load_towers("tiny", device="cpu")
    colours = np.zeros((1, 20_000, 3), dtype=np.uint8)
    colours[:, 9_900:10_100] = 255  # the middle
    paint(root / "train" / "cat" / "0.png")
    Image.fromarray(colours).save(root / "train" / "cat" / "0.png")
    tracemalloc.start()
    prepared_image = towers.prepare(folder_dataset(root).train[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = prepared_image.shape[-1]
    assert prepared_image.shape == (3, size, size)
    assert (prepared_image == 255).all()
    assert peak < 50_000_000
    tall = towers.prepare(Image.fromarray(colours.transpose(1, 0, 2)))
    assert torch.equal(tall, prepared_image)


def test_avif(root):
    if not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    pixels = saved(root, Image.new("RGB", (8, 8), (10, 200, 30)), "0.avif", quality=100)
    assert np.abs(pixels[0, 0] - [10, 200, 30]).max() <= 3
    cut = bytes_of(noise(), "AVIF")[:-200]
    (root / "train" / "cat" / "1.avif").write_bytes(cut)
    assert refused(root, "train/cat/1.avif", why="(")


def test_heic(root):
    pytest.importorskip("pillow_heif", reason="the heic extra is not installed")
    assert "HEIF" in optional_formats()
    for name in ("0.heic", "1.HEIF"):
        pixels = saved(root, Image.new("RGB", (64, 32), (10, 200, 30)), name, format="HEIF", quality=100)
        assert pixels.shape == (32, 64, 3)
        assert np.abs(pixels[5, 5] - [10, 200, 30]).max() <= 6
    (root / "train" / "cat" / "2.heic").write_bytes(bytes_of(noise(), "HEIF")[:-200])
    assert refused(root, "train/cat/2.heic", why="(")


def test_rotation(root):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    assert saved(root, image, "0.jpg", exif=exif).shape == (8, 4, 3)


# --- the file system ---


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to this user")
def test_no_permission(root):
    (root / "train" / "cat" / "2.png").chmod(0)
    assert refused(root, "train/cat/2.png", why="Permission denied")


def test_broken_link(root):
    (root / "train" / "cat" / "0.png").symlink_to(root / "gone.png")
    assert refused(root, "train/cat/0.png", why="No such file")


def test_file_link_to_itself(root):
    (root / "train" / "cat" / "0.png").symlink_to("0.png")
    assert refused(root, "train/cat/0.png", why=os.strerror(errno.ELOOP))


@pytest.mark.parametrize("target", ["owl", "gone"])
def test_class_link_to_nowhere(root, target):
    (root / "train" / "owl").symlink_to(target)
    assert refusal(lambda: prepared(config(root)), str(root / "train" / "owl"), "leads nowhere", "repair or remove it")


def test_folder_link_upwards(root):
    before = task_stream(folder_dataset(root), step=1).fingerprint
    (root / "train" / "cat" / "up").symlink_to("..")
    (root / "train" / "cat" / "up.png").symlink_to(root)
    assert prepared(config(root)).stream.fingerprint == before


def test_folders_of_cairns_own(root):
    made = {"shop.cairn": "learner-000001.json", "begun": "work-000002.json", "run": "events.jsonl"}
    for name, file in made.items():
        (root / "train" / name).mkdir()
        (root / "train" / name / file).write_text("{}")
    found = folder_dataset(root)
    assert found.classes == ("cat", "dog")
    assert found.notices == ()
    paint(root / "train" / "run" / "0.png")  # what has pictures is a class, whatever it is called
    assert class_folders(root).classes == ("cat", "dog", "run")


def test_files_of_operating_systems(root):
    before = task_stream(folder_dataset(root), step=1)
    for junk in (
        "train/__MACOSX/._cat.png",
        "train/.ipynb_checkpoints/1-checkpoint.png",
        "train/cat/._1.png",
        "train/cat/.hidden.png",
        "train/cat/.ipynb_checkpoints/1.png",
        "train/cat/__MACOSX/1.png",
        "train/cat/Thumbs.db",
        "test/dog/@eaDir/1.png",
        "__MACOSX/cat/1.png",
        ".cache/1.png",
    ):
        paint(root / junk)
    after = task_stream(folder_dataset(root), step=1)
    assert after.fingerprint == before.fingerprint
    assert after.notices == ()
    assert class_folders(root).notices == ()
    found, passed = pictures_below(root)
    assert [file.relative_to(root).as_posix() for file in found] == sorted(described(before))
    assert passed_over(passed) == []


def test_files_that_are_passed_over(root, tmp_path, learner, cairn, monkeypatch):
    monkeypatch.setattr("cairn.data.picture_files.optional_formats", lambda: ())
    monkeypatch.setattr("cairn.data.picture_files.endings", lambda: ENDINGS)
    for name in ("a.heic", "b.HEIC", "c.avif", "scan", "notes.txt", "front/1.png", "back/1.png"):
        paint(root / "train" / "cat" / name)
    paint(root / "train" / "dog" / "d.heic")
    paint(root / "train" / "stray.png")
    paint(root / "extra" / "1.png")
    before = described(task_stream(folder_dataset(root), step=1))
    assert before == [
        f"{side}/{name}/{i}.png"
        for side, some in (("train", "12"), ("test", "3"))
        for name in ("cat", "dog")
        for i in some
    ]
    used, passed = folder_dataset(root).notices
    assert used == "not used, beside train/ and test/: extra/"
    beside, learned = class_folders(root).notices
    assert beside == used
    for notice in (passed, learned):
        cat = next(part for part in re.split("passed over: |; ", notice) if "2 .heic" in part)
        kinds, _, place = cat.partition(" in ")
        assert sorted(kinds.split(", ")) == ["1 .avif", "1 .txt", "1 file without an ending", "2 .heic", "2 folders"]
        assert place == "'train/cat'"
        assert "1 .heic in 'train/dog'" in notice
        assert "1 picture beside the class folders" in notice
        assert ".heic needs pillow-heif" in notice
        assert ".avif needs a Pillow with AVIF" in notice
        assert "give a picture an ending" in notice
        assert "move pictures in folders inside a class up" in notice
    # predict looks into folders, and passes over the same files otherwise
    status, out, err = cairn("predict", learner, root, "--device", "cpu")
    assert status == 0
    inside = [*before, "train/stray.png", "extra/1.png", "train/cat/front/1.png", "train/cat/back/1.png"]
    assert [line.partition(": ")[0] for line in out.splitlines()] == sorted(str(root / name) for name in inside)
    assert err.count("\n") == 1
    assert "2 .heic" in err
    # a class that has nothing else
    (root / "train" / "owl").mkdir()
    paint(root / "train" / "owl" / "e.heic")
    paint(root / "test" / "owl" / "e.png")
    assert refusal(lambda: folder_dataset(root), "class 'owl': no image", "1 .heic", "pillow-heif")


def test_linked_folder_in_predict(root, tmp_path, learner, cairn):
    (tmp_path / "new").mkdir()
    paint(tmp_path / "new" / "1.png")
    (tmp_path / "new" / "more").symlink_to(root)
    (tmp_path / "new" / "self").symlink_to(".")
    status, out, err = cairn("predict", learner, "new", "--device", "cpu")
    assert status == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == ["new/1.png"]
    assert "2 linked folders in 'new'. To take them: name a linked folder in the call as well" in err
    assert len(cairn("predict", learner, "new/more", "--device", "cpu")[1].splitlines()) == 6


def test_link_out_of_the_folder(root, tmp_path):
    paint(tmp_path / "elsewhere" / "one.png", (1, 2, 3))
    (root / "train" / "cat" / "0.png").symlink_to((tmp_path / "elsewhere" / "one.png").absolute())
    for side in ("train", "test"):
        (root / side / "owl").symlink_to((tmp_path / "elsewhere").absolute())
    assert read(root, "train/cat/0.png")[0, 0].tolist() == [1, 2, 3]
    assert read(root, "test/owl/one.png")[0, 0].tolist() == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe(root):
    os.mkfifo(root / "train" / "cat" / "0.png")
    assert refused(root, "train/cat/0.png", why="not a regular file")


@pytest.mark.parametrize("number", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_files(tmp_path, number):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(number // 2):
            (tmp_path / name / f"{i:08d}.jpg").touch()
    began = time.perf_counter()
    data = folder_dataset(tmp_path)
    assert time.perf_counter() - began < number / 10_000  # seconds; thirty times what it takes
    assert len(data.train) + len(data.test) == number
    tracemalloc.start()
    folder_dataset(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 250 * number  # bytes


# --- names ---


@pytest.mark.parametrize(
    "name", ["a b  c.png", "猫 été κότα.png", '\'; rm -rf "$HOME" #.png', "two\nlines\t.png", "\x1b[31m.png"]
)
def test_file_names(root, name):
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    paint(root / "train" / "cat" / name, (1, 2, 3))
    assert read(root, f"train/cat/{shown}")[0, 0].tolist() == [1, 2, 3]
    (root / "train" / "cat" / name).write_bytes(b"")
    assert refused(root, f"train/cat/{shown}", why="not an image")


def test_file_name_that_is_not_utf8(root, monkeypatch):
    try:
        paint(root / "train" / "cat" / os.fsdecode(b"\xff.png"), (1, 2, 3))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert read(root, "train/cat/\\udcff.png")[0, 0].tolist() == [1, 2, 3]
    assert run_stream(config(root)).last >= 0
    (root / "train" / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert refused(root, "train/cat/\\udcff.png", why="not an image")


@pytest.mark.parametrize(
    "name",
    [
        b"ow\xffl",
        b"ow\nl",
        b"ow\x1b[31ml",
        *(f"ow{sign}l".encode() for sign in "\u200b\u202e\xad\ufeff\u2066\u3164\ufe0f"),
    ],
    ids=repr,
)
def test_class_name_that_is_no_text(root, embedded_dataset, name):
    name = os.fsdecode(name)
    asks = (
        "class 'ow\\",
        "control character, an invisible or direction-changing one, or is not UTF-8",
        "rename the class",
    )
    assert refusal(lambda: task_stream(replace(embedded_dataset, classes=(name, *"abcde")), step=1), *asks)
    with pytest.raises(DataError, match="rename the class"):
        IncrementalClassifier("zero-shot", "tiny").partial_fit([np.zeros((4, 4, 3), np.uint8)], [name])
    try:
        paint(root / "train" / name / "1.png")
    except OSError:
        pytest.skip("this file system does not take such a name")
    assert refusal(lambda: prepared(config(root)), *asks)


def test_empty_class_name(root, embedded_dataset):
    for name in ("", " ", "\t"):
        assert refusal(
            lambda name=name: replace(embedded_dataset, classes=(name, *"abcde")), "at least one visible character"
        )
        with pytest.raises(DataError, match="at least one visible character"):
            IncrementalClassifier("zero-shot", "tiny").partial_fit([np.zeros((4, 4, 3), np.uint8)], [name])
    for side in ("train", "test"):
        paint(root / side / " " / "1.png")
    assert refusal(
        lambda: prepared(config(root)), "class ' '", "at least one visible character", "give the class a name"
    )


def test_one_class_name_in_two_spellings(root, towers):
    """Composed (one character) and decomposed (a letter and an accent), with and without a space at the end."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for side, name in (("train", composed), ("test", f"{decomposed} ")):
        for i in range(2):
            paint(root / side / name / f"{i}.png")
    stream = prepared(config(root)).stream
    assert list(stream.class_names) == [composed, "cat", "dog"]
    assert [len(images) for images in stream.collections] == [2, 2, 2, 2, 1, 1]
    paint(root / "train" / decomposed / "1.png")
    text = refusal(
        lambda: prepared(config(root)), f"both are class '{composed}'", "put their images into one of the two"
    )
    assert r"'cafe\u0301'" in text  # else one could not see the difference

    images = [np.full((4, 4, 3), shade, np.uint8) for shade in (0, 90, 180, 250)]
    learner = IncrementalClassifier("simplecil", towers)
    learner.partial_fit(images, [composed, decomposed, "bear", "bear "])
    assert list(learner.classes_) == [composed, "bear"]
    assert learner.counts_.tolist() == [2, 2]
    assert learner.score(images[2:], ["bear", "bear"]) == 1
    learner.forget(decomposed)
    assert list(learner.classes_) == ["bear"]


def test_braces_in_a_class_name(root, towers):
    names = ["a{b}c", "{0}", "{}", "{name!r}"]
    for name in names:
        for side in ("train", "test"):
            paint(root / side / name / "1.png")
    assert [filled("a photo of a {}.", name) for name in names] == [f"a photo of a {name}." for name in names]
    assert {*names} < {*run_stream(config(root)).class_order}


ODD = ["<script>alert(1)</script>", "..%2f", "../../x", "[red]b[/red]", "%s", "$x^$"]


def test_template_without_a_place(root):
    for template in ("a photo of a {label}.", "a photo.", "a {} and a {}.", ""):
        assert refusal(lambda template=template: prepared(config(root, template=template)), template, kind=ConfigError)
    assert prepared(config(root, template="a {}")).stream.tasks[0].templates == ("a {}",)


def test_class_names_like_markup_and_paths(root, features_file, monkeypatch):
    monkeypatch.chdir(root.parent)
    before = {path for path in root.parent.rglob("*") if root not in path.parents}
    data = features_file(class_names=ODD)
    cli.app(["run", "simplecil", "--data", data, "--step", "2", "--out", "here"], standalone_mode=False)
    made = {path for path in root.parent.rglob("*") if root not in path.parents} - before - {Path(data)}
    assert {path.relative_to(root.parent).parts[0] for path in made} == {"here"}
    assert run_stream(config(data, method="simplecil", step=2)).class_order == ODD
    folders = {"<b>bold<b>", "%2e%2e%2f", "[red]", "%s", "$x^$", "a;b & c", "~"}
    for name in folders:
        for side in ("train", "test"):
            paint(root / side / name / "1.png")
    assert folders < {*run_stream(config(root)).class_order}


def test_class_names_that_differ_by_case(features_file, towers):
    names = ["Owl", "cat", "owl", "OWL", "dog", "Dog"]
    stream = prepared(config(features_file(class_names=names), step=2)).stream
    assert list(stream.class_names) == names
    (notice,) = stream.notices
    assert "by case, underscores or spaces alone" in notice
    assert "'Owl' and 'owl' and 'OWL', 'dog' and 'Dog'" in notice


def test_class_names_with_one_prompt(root, towers):
    """An underscore is said as a space, so that half of each class would be taken for the other."""
    for name in ("tea_cup", "tea cup"):
        for side in ("train", "test"):
            paint(root / side / name / "1.png")
    assert "'tea cup' and 'tea_cup'" in prepared(config(root)).stream.notices[0]

    images, told = [np.full((4, 4, 3), shade, np.uint8) for shade in (0, 250)], []
    learner = IncrementalClassifier("simplecil", towers).partial_fit(images[:1], ["tea_cup"])
    assert learner.notices_ == []
    learner.partial_fit(images[1:], ["Tea cup"], log=Log(keep=told.append))
    assert "'tea_cup' and 'Tea cup'" in learner.notices_[0]
    assert [event["event"] for event in told].count("notice") == 1
    learner.partial_fit([np.full((4, 4, 3), 120, np.uint8)], ["oak"])  # said once, when one of them came
    assert len(learner.notices_) == 1


def test_class_called_train(tmp_path, cairn):
    """CIFAR-100 has one: a folder called train is a part of the data set only if there are folders in it."""
    for c, name in enumerate(("train", "test", "owl")):
        for i in range(4):
            paint(tmp_path / "data" / name / f"{i}.png", (60 * i, 90 * c, 30))
    data = folder_dataset(tmp_path / "data")
    assert data.classes == ("owl", "test", "train")
    assert [len(data.train), len(data.test)] == [9, 3]
    found = class_folders(tmp_path / "data")
    assert found.classes == ("owl", "test", "train")
    assert len(found.images) == 12
    status, out, _ = cairn("learn", "l", "data", "--method", "simplecil", "--towers", "tiny", "--device", "cpu")
    assert status == 0
    assert "12 pictures learned, 3 new classes" in out
    # with folders in it, it is a part as before
    paint(tmp_path / "data" / "train" / "owl" / "1.png")
    assert refusal(
        lambda: folder_dataset(tmp_path / "data"), "has train/ but neither test/ nor val/ with a folder per class"
    )


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "o.json",
            "[1, 0, 2]",
            "are taken as positions, from 0: the first is class '1'; for names put them into quotes",
        ),
        ("o.json", '["2", "0", "10"]', "are taken as names: whole numbers without quotes"),
        ("o.yaml", "- 1\n- 0\n- 2\n", "are taken as positions"),
        ("o.txt", "2\n0\n10\n", "are taken as names"),
    ],
)
def test_order_file_where_classes_are_called_by_numbers(tmp_path, file, text, said):
    for name in ("0", "2", "10"):
        for i in range(2):
            paint(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / file).write_text(text)
    stream = prepared(config(tmp_path / "data", order=str(tmp_path / file))).stream
    assert list(stream.class_names) == (["10", "0", "2"] if "positions" in said else ["2", "0", "10"])
    (notice,) = stream.notices
    assert "every class is called by a number" in notice
    assert said.replace("class '1'", "class '10'") in notice


def test_positions_in_a_text_file(root, tmp_path):
    (tmp_path / "order.txt").write_text("1\n0\n")
    assert refusal(
        lambda: prepared(config(root, order=str(tmp_path / "order.txt"))),
        "2 unknown class names: '1', '0'",
        "positions are whole numbers without quotes, in a JSON or YAML list",
        kind=ConfigError,
    )


# --- classes and tasks ---


def test_class_with_one_image(root):
    for name in ("cat", "dog"):
        (root / "train" / name / "2.png").unlink()
    result = run_stream(config(root, method="dmc", settings=QUICK))
    assert result.test_sizes == [1, 1]
    assert refusal(lambda: prepared(config(root, validation=0.2)), "has one training image", "needs two")


def test_class_with_one_image_to_split(tmp_path):
    for file in ("cat/1.png", "cat/2.png", "owl/1.png"):
        paint(tmp_path / file)
    assert refusal(lambda: prepared(config(tmp_path)), "class 'owl'", "has one image, a split needs two", "add some")


def test_one_image_in_two_classes(root):
    for file in root.rglob("*.png"):
        paint(file, (9, 9, 9))
    assert run_stream(config(root, method="simplecil")).last == 0.5  # one of the two is always wrong
    assert prepared(config(root)).stream.notices == ()  # other files: only learners, who know pixels, see that
    shutil.copy(root / "train" / "cat" / "1.png", root / "train" / "dog" / "2.png")
    (notice,) = prepared(config(root)).stream.notices
    assert "the same file in two classes, learned as both: 1 image (train/cat/1.png is train/dog/2.png)" in notice


def test_test_image_that_is_learned(root):
    shutil.copy(root / "train" / "cat" / "1.png", root / "test" / "cat" / "4.png")
    (notice,) = prepared(config(root)).stream.notices
    assert "1 of 3 test images are learned, byte for byte (test/cat/4.png is train/cat/1.png)" in notice


@pytest.mark.parametrize("side", ["train", "test"])
def test_empty_class(root, side):
    paint(root / ("test" if side == "train" else "train") / "owl" / "1.png")
    (root / side / "owl").mkdir()
    assert refusal(
        lambda: prepared(config(root)), "class 'owl'", str(root / side / "owl"), "add some", "or remove the folder"
    )


def taught(root):
    learner = IncrementalClassifier("simplecil", "tiny", device="cpu")
    files = [root / "train" / name / file for name in ("cat", "dog") for file in ("1.png", "2.png")]
    for i, file in enumerate(files):
        paint(file, colour=(60 * i, 30, 200))
    return learner.partial_fit(files, [file.parent.name for file in files]), files


def test_picture_learned_already(root, tmp_path):
    learner, files = taught(root)
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[0].read_bytes())
    os.utime(files[1], (1, 1))
    learner.partial_fit([copy, files[1]], ["cat", "cat"])
    assert learner.counts_.tolist() == [2, 2]
    assert "left out: 2 of 2 images, already learned as the same class" in learner.notices_[-1]
    assert learner.partial_fit([copy], ["cat"], again=True).counts_.tolist() == [3, 2]


def test_relabelled_picture(root):
    learner, files = taught(root)
    learner.partial_fit(files[0], "dog")
    assert learner.counts_.tolist() == [2, 3]
    assert f"{files[0]} as 'dog', also learned as 'cat'" in learner.notices_[-1]


def test_array_that_is_no_picture(root):
    learner, _ = taught(root)
    for array in (np.zeros((3, 6, 5), np.uint8), np.zeros((6, 5, 3)), np.zeros(8, np.float32), torch.zeros(3, 6, 5)):
        assert refusal(lambda array=array: learner.predict(array), str(tuple(array.shape)), "uint8 (h, w, 3)")
    assert len(learner.predict(np.zeros((6, 5, 3), np.uint8))) == 1


def test_class_that_comes_back(root):
    """What every method does with it is in the contract tests; here the count of images of one that keeps means."""
    entry, stream, towers, settings = prepared(config(root, method="simplecil"))
    method = entry.build(towers, settings, seed=1)
    first = stream.tasks[0]
    method.learn(first, Context(Seeds(1)))
    mean = method.means.means.clone()
    method.learn(replace(first, index=1, classes=range(1, 1), names=()), Context(Seeds(1)))
    assert method.means.counts.tolist() == [4]
    torch.testing.assert_close(method.means.means, mean)


def test_empty_task(root):
    assert refusal(lambda: prepared(config(root, step=0)), "step 0", "at least 1", kind=ConfigError)
    assert all(size > 0 for base in range(8) for step in range(1, 8) for size in task_sizes(7, base, step))


def own_weights(tmp_path):
    """Those of the tiny towers in a folder of a user."""
    shutil.copytree(str(resources.files("cairn.towers").joinpath("tiny")), tmp_path / "mine")
    return tmp_path / "mine" / "model.safetensors"


def test_lora_beside_the_weights(tmp_path):
    """W + (alpha / rank) B A, here with rank 1, alpha 3, B all ones and A all .01."""
    path = own_weights(tmp_path)
    weights = load_file(path)
    layer = "vision_model.encoder.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": [layer]}
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    delta = {"A": torch.full((1, 160), 0.01), "B": torch.ones(160, 1)}
    state = {f"base_model.model.{layer}.lora_{part}.weight": value for part, value in delta.items()}
    save_file(state, path.parent / "adapter_model.safetensors")
    found = load_towers(str(path.parent), device="cpu")
    expected = weights[f"{layer}.weight"].float() + 0.03
    torch.testing.assert_close(found._model.state_dict()[f"{layer}.weight"], expected)
    assert "merged" in found.notices[0]


def test_prefix_of_a_wrapper(tmp_path, towers):
    path = own_weights(tmp_path)
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path)
    found = load_towers(str(path.parent), device="cpu")
    assert found.fingerprint == towers.fingerprint
    assert "'module.'" in found.notices[0]


def test_path_of_towers_that_is_not_there():
    assert refusal(lambda: load_towers("./copies/clip"), "'./copies/clip': no such folder", kind=TowersError)


def test_weights_that_are_not_finite(tmp_path):
    path = own_weights(tmp_path)
    weights = load_file(path)
    weights["text_projection.weight"][3, 4] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    assert refusal(lambda: load_towers(str(path.parent)), "not finite", "'text_projection.weight'", kind=TowersError)


def tiny_copy(tmp_path) -> Path:
    return Path(shutil.copytree(str(resources.files("cairn.towers").joinpath("tiny")), tmp_path / "copy"))


def test_checkpoint_without_a_tokenizer(tmp_path):
    folder = tiny_copy(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert refusal(lambda: load_towers(str(folder)), "tokenizer.json is missing", "merges.txt", kind=TowersError)


def test_checkpoint_with_a_foreign_tokenizer(tmp_path):
    folder = tiny_copy(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["model"] = {"type": "WordLevel", "vocab": {"a": 0, "photo": 1, "<unk>": 2}, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(stored | {"added_tokens": []}), encoding="utf-8")
    assert refusal(lambda: load_towers(str(folder)), "ids up to", "a table of 784 rows", kind=TowersError)


def test_preprocessing_that_is_not_understood(tmp_path):
    path = tiny_copy(tmp_path) / "preprocessor_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    for field, value in (("sharpen", 2), ("do_center_crop", False), ("do_pad", True), ("resample", 77)):
        path.write_text(json.dumps(stored | {field: value}), encoding="utf-8")
        assert refusal(lambda: load_towers(str(path.parent)), field, "correct the file", kind=TowersError)


def test_metadata_of_a_features_file(root):
    rows, file = torch.zeros(2, 4), root / "strange.safetensors"
    tensors = {"train_features": rows, "test_features": rows.clone()}
    tensors |= {f"{part}_labels": torch.arange(2) for part in ("train", "test")}
    sound = {"class_names": '["cat", "dog"]', "templates": "a {}", "logit_scale": "50", "model": "M"}
    save_file(tensors, file, sound)
    assert features_dataset(file).classes == ("cat", "dog")
    for key, text in {
        "class_names": '["cat", "dog\\u202e"]',
        "templates": '["a {}", 3]',
        "logit_scale": "nan",
        "model": "\x1b[2J",
    }.items():
        save_file(tensors, file, sound | {key: text})
        assert refusal(
            lambda: features_dataset(file), f"features file '{file}': metadata {key}", "; store ", f"under '{key}'"
        )


def test_embedding_that_is_not_finite():
    rows = np.eye(4, dtype="float32")
    towers = FeatureTowers(name="x", dim=4, logit_scale=9.0, fingerprint="x", names=tuple("abcd"), text=rows)
    learner = IncrementalClassifier("simplecil", towers).partial_fit(rows, list("abcd"))
    rows[2] = float("nan")
    assert refusal(lambda: learner.predict(rows), "row 2", "not finite")

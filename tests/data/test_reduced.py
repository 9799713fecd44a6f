"""JPEG files decoded at a fraction of their size: never below what was asked for, upright, and nothing else than JPEG."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cairn import IncrementalClassifier
from cairn.data.decoding import decoded
from cairn.data.folders import FolderImages, folder_dataset
from cairn.data.images import Concatenation, LabelSets, Reducible, Subset, Unlabelled, reduced
from cairn.data.in_memory import Deferred, InMemoryImages
from cairn.data.stream import reduced_stream, task_stream
from cairn.errors import ConfigError
from cairn.experiment.inputs import prepared
from cairn.experiment.schema import RunConfig
from cairn.towers.catalogue import load_towers

SIDE = 112


def photograph(width, height, seed=0):
    """Soft colours, edges and grain: what a camera's picture has at every scale."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    for _ in range(12):
        left, top = (int(rng.integers(0, side * 3 // 4)) for side in (width, height))
        box = (left, top, left + max(2, width // 6), top + max(2, height // 5))
        picture.paste(tuple(rng.integers(0, 256, 3).tolist()), box)
    grainy = np.asarray(picture) + rng.normal(0, 8, (height, width, 1))
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))


def file_of(picture, kind="JPEG", **how):
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | how)
    file.seek(0)
    return file


@pytest.mark.parametrize(("width", "height"), [(900, 600), (896, 1790), (500, 375), (225, 224), (223, 400), (111, 64)])
def test_the_smallest_fraction_that_has_the_side(width, height):
    got = decoded(file_of(photograph(width, height)), SIDE).size
    fits = [n for n in (8, 4, 2, 1) if min(width, height) >= n * SIDE] or [1]
    assert got == (-(-width // fits[0]), -(-height // fits[0]))
    assert min(got) >= min(SIDE, width, height)


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}])
def test_a_fraction_is_the_picture_made_smaller(how):
    whole = photograph(960, 720)
    got = decoded(file_of(whole, **how), SIDE)
    assert got.size == (240, 180)
    shrunk = np.asarray(whole.resize(got.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(got) - shrunk).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_become_rgb_as_whole_ones_do(mode):
    file = file_of(photograph(960, 720).convert(mode), quality=95)
    whole = decoded(file)
    file.seek(0)
    got = decoded(file, SIDE)
    assert (got.mode, got.size) == ("RGB", (240, 180))
    shrunk = np.asarray(whole.resize(got.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(got) - shrunk).mean() < 4


@pytest.mark.parametrize("turned", range(1, 9))
def test_it_is_turned_as_exif_says(turned):
    picture = photograph(900, 600)
    exif = picture.getexif()
    exif[0x0112] = turned
    file = file_of(picture, exif=exif)
    whole = decoded(file)
    file.seek(0)
    got = decoded(file, SIDE)
    assert got.size == ((225, 150) if turned < 5 else (150, 225))
    shrunk = np.asarray(whole.resize(got.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(got) - shrunk).mean() < 4


@pytest.mark.parametrize(("kind", "how"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_other_kinds_are_decoded_whole(kind, how):
    picture = photograph(900, 600)
    assert np.array_equal(np.asarray(decoded(file_of(picture, kind, **how), SIDE)), np.asarray(picture))


def test_two_pictures_in_one_file_as_telephones_write_them():
    first, second = photograph(900, 600), photograph(900, 600, seed=1)
    assert decoded(file_of(first, "MPO", save_all=True, append_images=[second]), SIDE).size == (225, 150)


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        for i in range(3):
            folder = tmp_path / "pictures" / name
            folder.mkdir(parents=True, exist_ok=True)
            photograph(480, 360, seed=10 * number + i).save(folder / f"{i}.jpg", quality=90)
    return tmp_path / "pictures"


def test_collections_of_collections_pass_it_on(root):
    files = FolderImages(root, ["cat"], ["0.jpg", "1.jpg", "2.jpg"], np.zeros(3, dtype=np.int64))
    assert isinstance(files, Reducible)
    some = Subset(files, np.array([2, 0]), np.zeros(2, dtype=np.int64))
    sets = LabelSets.of(files, np.ones((3, 2), dtype=bool))
    rows = Subset(np.zeros((2, 4)), np.array([1]), np.zeros(1, dtype=np.int64))
    for images in (files, some, sets, Unlabelled(some), Concatenation([some, rows])):
        assert reduced(images, None) is images
        smaller = reduced(images, 60)
        assert type(smaller) is type(images)
        assert (smaller[0].size, images[0].size) == ((120, 90), (480, 360))  # those given stay as they are
        assert np.array_equal(smaller.labels, images.labels)
    joined = reduced(Concatenation([some, rows]), 60)
    assert np.array_equal(joined[2], np.zeros(4))
    assert reduced(sets, 60).targets is sets.targets


def test_a_run_reads_its_images_so_and_without_the_option_whole(root):
    config = RunConfig(method="zero-shot", data=str(root), step=1, device="cpu")
    whole, smaller = prepared(config), prepared(config.model_copy(update={"decode": "reduced"}))
    assert whole.towers.preprocessing.size == 56
    for plain, less in zip(whole.stream.collections, smaller.stream.collections, strict=True):
        assert [plain[i].size for i in range(len(plain))] == [(480, 360)] * len(plain)
        assert [less[i].size for i in range(len(less))] == [(240, 180)] * len(less)
        assert [plain.describe(i) for i in range(len(plain))] == [less.describe(i) for i in range(len(less))]
    assert whole.stream.fingerprint == smaller.stream.fingerprint
    assert whole.towers.fingerprint != smaller.towers.fingerprint
    stream = task_stream(folder_dataset(root), step=1)
    assert reduced_stream(stream, None) is stream


def test_pictures_without_labels_and_with_several_are_read_so_too(root):
    stream = task_stream(folder_dataset(root), step=1)
    task = stream.tasks[0]
    sets = LabelSets.of(task.train, np.ones((len(task.train), 1), dtype=bool))
    of_sets = replace(task, train=sets.copies(), label_sets=sets, unlabelled=Unlabelled(task.train))
    (got,) = reduced_stream(replace(stream, tasks=(of_sets,)), SIDE).tasks
    for images in (got.train, got.label_sets, got.unlabelled):
        assert images[0].size == (240, 180)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decode", "reduced"), ("preprocess", "squash"), ("precision", "bfloat16"), ("revision", "main")],
)
def test_embeddings_hold_no_images(features, name, value):
    """What would be done with images is refused, not passed over."""
    with pytest.raises(ConfigError, match=rf"{name} '{value}'.*holds embeddings, not images; leave it out"):
        prepared(RunConfig.model_validate({"method": "lda", "data": features, "step": 1, name: value}))
    with pytest.raises(ConfigError, match=rf"{name} '{value}'.*holds embeddings, not images; leave it out"):
        IncrementalClassifier("lda", features, **{name: value}).open_towers()


def test_what_a_picture_is_known_by_is_that_of_the_whole(root):
    file = root / "cat" / "0.jpg"
    items = [file, Image.open(file), Deferred(lambda: io.BytesIO(file.read_bytes()), "row 0")]
    whole = InMemoryImages(items, np.zeros(3, dtype=np.int64))
    smaller = whole.reduced(SIDE).taken([0, 1, 2])
    assert [smaller[i].size for i in range(3)] == [(240, 180), (480, 360), (240, 180)]
    assert smaller.content_hashes() == whole.content_hashes()
    assert [smaller.identity(i) for i in range(3)] == [whole.identity(i) for i in range(3)]


def test_embeddings_hardly_move():
    """Drawn photographs of a telephone's aspect, by the embedded towers."""
    towers = load_towers("tiny", device="cpu", decode="reduced")
    side = towers.preprocessing.decoded_side
    assert side == 2 * towers.preprocessing.size
    files = [file_of(photograph(1200, 900, seed=seed)).getvalue() for seed in range(8)]

    def embedded(side):
        prepared = torch.stack([towers.prepare(decoded(io.BytesIO(file), side)) for file in files])
        return torch.nn.functional.normalize(towers.image(towers.pixels(prepared)), dim=1)

    cosines = (embedded(None) * embedded(side)).sum(1)
    assert cosines.min() > 0.99

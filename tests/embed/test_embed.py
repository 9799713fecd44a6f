"""A data set as a features file: the rows that they must be, and the same bytes whoever made them and whoever was killed."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cairn.data.embeddings import features_dataset
from cairn.data.images import Subset
from cairn.data.shapes import shapes_dataset
from cairn.embed import EmbedConfig, embed_dataset, runner
from cairn.embed import shards as making
from cairn.embed.plan import Plan
from cairn.embed.shards import Embedding
from cairn.errors import CairnError, DataError, Interrupted, NotFinite, ResultError
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.storage.distribution import extra_remedy
from cairn.training.checkpoint import Checkpoint
from cairn.training.distributed import World
from cairn.training.log import Log

FEW = EmbedConfig(limit_train=2, limit_test=1, device="cpu", shard_rows=16, batch=8)
"""120 images of the drawn world: five shards to train on, three to test on."""

CALL = ("embed", "--limit-train", "2", "--limit-test", "1", "--device", "cpu", "--shard-rows", "16", "--batch", "8")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "RAY_worker_niceness": "0",  # other work on the machine would starve them
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    """The file of FEW, made in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "few.safetensors"
    embed_dataset(FEW, out)
    return out.read_bytes()


def folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def shards(out: Path) -> list[Path]:
    return [*folder_of(out).glob("t[re]*-*.safetensors")]


class After(Checkpoint):
    """Stops after so many passes."""

    def __init__(self, passes: int):
        super().__init__()
        self.left = passes

    def poll(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted(signal.SIGTERM)


def begun(out: Path, passes: int = 5, config: EmbedConfig = FEW, **options) -> None:
    """A call that was cut off: by default two shards are there, and half of the next is not."""
    with pytest.raises(Interrupted):
        embed_dataset(config, out, checkpoint=After(passes), **options)


def started(*arguments: str, folder: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cairn", *arguments],
        cwd=folder,
        env=ENVIRONMENT | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(claim, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


# --- the file ---------------------------------------------------------------------------------------------------------


def shuffled(images, towers, number: int, seed: int) -> Subset:
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(images.labels < 4))[:number]
    return Subset(images, rows, images.labels[rows])


def test_rows_are_the_towers_embeddings_in_data_set_order(tmp_path, towers, monkeypatch):
    world = shapes_dataset()
    small = replace(
        world,
        classes=world.classes[:4],
        train=shuffled(world.train, towers, 60, 0),
        test=shuffled(world.test, towers, 40, 1),
    )
    assert np.any(np.diff(small.train.labels) < 0)  # a data set whose classes are mixed
    monkeypatch.setattr(making, "open_dataset", lambda spec: small)
    made = embed_dataset(EmbedConfig(limit_train=9, shard_rows=10, batch=4), tmp_path / "x.safetensors")
    found = features_dataset(tmp_path / "x.safetensors")

    seen = np.zeros(4, dtype=int)
    kept = []
    for row, label in enumerate(small.train.labels):  # the naive way
        seen[label] += 1
        if seen[label] <= 9:
            kept.append(row)
    for images, source, rows in ((found.train, small.train, kept), (found.test, small.test, range(40))):
        assert images.labels.tolist() == [source.labels[row] for row in rows]
        expected = [towers.image(towers.pixels(towers.prepare(source[row])[None]))[0] for row in rows]
        np.testing.assert_allclose(images.values, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.classes == small.classes
    assert found.templates == small.templates
    assert found.embeddings.logit_scale == towers.logit_scale
    assert found.embeddings.name == towers.name
    assert np.array_equal(found.embeddings.text, towers.class_texts(small.classes, small.templates))
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata()["fingerprint"] == towers.fingerprint
    assert (made.images, made.made, made.dim) == (len(kept) + 40, len(kept) + 40, towers.dim)
    assert made.bytes == (tmp_path / "x.safetensors").stat().st_size
    assert not folder_of(made.path).exists()


def test_a_run_on_the_file_has_the_accuracies_of_a_run_on_the_images(tmp_path):
    out = tmp_path / "some.safetensors"
    embed_dataset(EmbedConfig(limit_train=4, limit_test=2), out)
    protocol = {"step": 8, "order": "seed:1993"}
    for method in ("simplecil", "zero-shot", "lda"):
        images = run_stream(RunConfig(method=method, limit_train=4, limit_test=2, **protocol))
        rows = run_stream(RunConfig(method=method, data=str(out), **protocol))
        for key in ("accuracy", "future_accuracy", "zero_shot_accuracy", "class_order"):
            assert getattr(rows, key) == getattr(images, key), (method, key)


def test_neither_the_size_of_a_shard_nor_the_rows_beside_one_move_a_bit(tmp_path, undisturbed):
    (tmp_path / "16.safetensors").write_bytes(undisturbed)
    embed_dataset(FEW.model_copy(update={"shard_rows": 7}), tmp_path / "7.safetensors")
    one, other = (load_file(tmp_path / f"{size}.safetensors") for size in (16, 7))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_it_is_laid_out_as_a_file_that_is_saved_at_once(tmp_path, undisturbed):
    from cairn.storage.tensors import serialized

    (tmp_path / "x.safetensors").write_bytes(undisturbed)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    keys = ("class_names", "templates", "logit_scale", "model", "fingerprint", "embedded")
    assert b"".join(bytes(piece) for piece in serialized(tensors, {key: about[key] for key in keys})) == undisturbed


def test_half_precision_takes_half_the_room_and_is_read(tmp_path, undisturbed, features_file):
    (tmp_path / "full.safetensors").write_bytes(undisturbed)
    embed_dataset(FEW.model_copy(update={"dtype": "float16"}), tmp_path / "half.safetensors")
    full, half = (load_file(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    assert half["train_features"].dtype == np.float16
    assert np.array_equal(half["train_features"], full["train_features"].astype(np.float16))
    assert np.array_equal(half["text_features"], full["text_features"])
    assert features_dataset(tmp_path / "half.safetensors").train.values.dtype == np.float32


def test_a_row_that_half_precision_cannot_hold_is_named(tmp_path, monkeypatch):
    from cairn.towers.clip import ClipTowers

    plain = ClipTowers.image
    monkeypatch.setattr(ClipTowers, "image", lambda self, pixels: 1e6 * plain(self, pixels))
    with pytest.raises(NotFinite, match="in float16 is not finite; store float32"):
        embed_dataset(FEW.model_copy(update={"dtype": "float16"}), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.fixture
def pictures(tmp_path) -> Path:
    world, root = shapes_dataset(), tmp_path / "pictures"
    for split, images, number in (("train", world.train, 3), ("test", world.test, 2)):
        for c in (0, 1):
            folder = root / split / world.classes[c].replace(" ", "_")
            folder.mkdir(parents=True)
            for row in np.flatnonzero(images.labels == c)[:number]:
                Image.fromarray(images[row]).resize((70, 50)).save(folder / f"{row}.png")
    return root


def test_a_folder_with_the_options_of_a_run(cairn, tmp_path, pictures):
    options = ("--data", "pictures", "--device", "cpu", "--preprocess", "squash", "--template", "see the {}")
    status, out, err = cairn("embed", *options, "--out", "deep/x.safetensors")
    assert (status, err) == (0, "")
    assert "pictures by tiny: 6 training images and 4 test images, 160 numbers each, in 2 shards" in out
    assert "10 images, 10 of them now (" in out
    assert f"{(tmp_path / 'deep/x.safetensors').stat().st_size:,} bytes -> deep/x.safetensors" in out
    accuracies = []
    for call in (("--data", "deep/x.safetensors"), options):
        assert cairn("run", "simplecil", *call, "--step", 1, "--out", f"r{len(accuracies)}")[0] == 0
        accuracies.append(json.loads((tmp_path / f"r{len(accuracies)}" / "result.json").read_text())["accuracy"])
    assert accuracies[0] == accuracies[1]
    found = features_dataset(tmp_path / "deep/x.safetensors")
    assert found.templates == ("see the {}",)
    assert list(tmp_path.glob("deep/*")) == [tmp_path / "deep/x.safetensors"]


def test_an_image_that_cannot_be_read_is_an_error_or_left_out(cairn, tmp_path, pictures):
    bad = next((pictures / "train").glob("*/*.png"))
    bad.write_bytes(b"no picture")
    call = ("embed", "--data", "pictures", "--device", "cpu", "--out", "x.safetensors")
    status, _, err = cairn(*call)
    assert (status, err.count("\n")) == (2, 1)
    assert bad.name in err
    assert "--on-bad-image skip" in err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    status, out, _ = cairn(*call, "--on-bad-image", "skip")
    assert status == 0
    assert f"note: left out: 1 image that cannot be read: train/{bad.parent.name}/{bad.name}" in out
    assert len(features_dataset(tmp_path / "x.safetensors").train) == 5


# --- cut off and gone on with -----------------------------------------------------------------------------------------


def test_a_process_that_is_killed_loses_one_shard(cairn, tmp_path, undisturbed):
    out = tmp_path / "x.safetensors"
    process = started(*CALL, "--out", out.name, folder=tmp_path)
    try:
        wait_for(lambda: len(shards(out)) >= 2, process)
    finally:
        process.kill()
        process.communicate()
    assert not out.exists()
    whole = {path: path.stat().st_mtime_ns for path in shards(out)}
    assert 2 <= len(whole) < 8
    status, said, _ = cairn(*CALL, "--out", out.name, "--keep-parts")
    assert status == 0
    assert f"{len(whole)} there already" in said
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert out.read_bytes() == undisturbed
    status, said, _ = cairn(*CALL, "--out", out.name)
    assert "already there: 120 images in x.safetensors" in said
    assert "'x.safetensors.parts' is no longer needed" in said


def test_a_signal_keeps_whole_shards_and_says_how_to_go_on(tmp_path, undisturbed):
    out = tmp_path / "x.safetensors"
    begun(out)
    assert len(shards(out)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.parts"]
    made = embed_dataset(FEW, out)
    assert (made.images, made.made) == (120, 120 - 32)
    assert out.read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_ends_before_there_is_a_shard_leaves_nothing(tmp_path):
    begun(tmp_path / "x.safetensors", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"\0", None])
def test_a_damaged_shard_is_made_again(tmp_path, undisturbed, damage):
    out = tmp_path / "x.safetensors"
    begun(out)
    one, _ = sorted(shards(out))
    content = bytearray(one.read_bytes())
    content[-1] ^= 1  # nothing but the hash can tell
    one.write_bytes(content if damage is None else damage)
    assert embed_dataset(FEW, out).made == 120 - 16
    assert out.read_bytes() == undisturbed


def test_a_shard_that_is_damaged_before_the_end_is_not_merged(tmp_path, undisturbed, monkeypatch):
    out = tmp_path / "x.safetensors"
    plain = Embedding.texts

    def texts(self):
        sorted(shards(out))[-1].write_bytes(b"")
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Embedding, "texts", texts)
        with pytest.raises(ResultError, match=r"train-000004.safetensors': damaged; the same call makes it again"):
            embed_dataset(FEW, out)
    assert not out.exists()
    assert embed_dataset(FEW, out).made == 16
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 4}, "begun with batch 8, not 4"),
        ({"shard_rows": 8}, "begun with shard-rows 16, not 8"),
        ({"dtype": "float16"}, "begun with dtype float32, not float16"),
        ({"limit_train": 1}, "begun with limit-train 2, not 1"),
        ({"data": "shapes:dev"}, "begun with data shapes, not shapes:dev"),
        ({"preprocess": "squash"}, "begun with preprocess crop, not squash"),
        ({"decode": "reduced"}, "begun with decode whole, not reduced"),
    ],
)
def test_what_was_begun_otherwise_is_refused(tmp_path, changes, says):
    out, other = tmp_path / "x.safetensors", FEW.model_copy(update=changes)
    begun(out)
    before = {path: path.read_bytes() for path in shards(out)}
    with pytest.raises(ResultError, match=says) as refused:
        embed_dataset(other, out)
    assert "--overwrite to begin again" in str(refused.value)
    assert {path: path.read_bytes() for path in shards(out)} == before
    embed_dataset(FEW, out)
    with pytest.raises(ResultError, match=says.replace("begun", "made")):
        embed_dataset(other, out)


def test_other_towers_and_other_images_are_refused(tmp_path, pictures, towers, monkeypatch):
    out, config = tmp_path / "x.safetensors", EmbedConfig(data=str(pictures), device="cpu", shard_rows=2, batch=2)
    begun(out, 1, config)
    with monkeypatch.context() as patch:
        patch.setattr(making, "towers_for", lambda run, dataset: other)
        other = type("Other", (), {**vars(towers), "fingerprint": "0" * 16})()
        with pytest.raises(ResultError, match=f"towers {towers.fingerprint}, which are {'0' * 16} today"):
            embed_dataset(config, out)
    file = next((pictures / "train").glob("*/*.png"))
    Image.new("RGB", (60, 60)).save(file)
    with pytest.raises(ResultError, match="begun with other images"):
        embed_dataset(config, out)
    assert embed_dataset(config, out, overwrite=True).made == 10


def test_images_that_change_meanwhile_are_not_mixed(tmp_path, pictures):
    out, config = tmp_path / "x.safetensors", EmbedConfig(data=str(pictures), device="cpu", shard_rows=2, batch=2)
    last = sorted((pictures / "test").glob("*/*.png"))[-1]

    class Changing(Checkpoint):
        def poll(self) -> None:
            os.utime(last, (1, 1))

    with pytest.raises(DataError, match="images of test-000001 changed meanwhile"):
        embed_dataset(config, out, checkpoint=Changing())
    assert not out.exists()


STRANGE = {
    "deep": ({"embedded": "[" * 50_000}, {}),
    "a list": ({"embedded": "[1, 2]"}, {}),
    "a text": ({"embedded": '"plan"'}, {}),
    "nothing of it": ({}, {}),
    "a call that is none": ({"embedded": '{"plan": "p", "split": "s", "config": {"settings": 3}}'}, {}),
    "no number": ({"embedded": '{"plan": "p", "split": "s", "config": {"batch": NaN}}'}, {}),
    "rows of no width": (None, {"train_features": np.zeros(3, dtype=np.float32)}),
    "no rows": (None, {"train_features": None}),
}  # fmt: skip


@pytest.mark.parametrize(("metadata", "changes"), STRANGE.values(), ids=STRANGE)
def test_a_file_that_is_there_and_was_made_by_a_stranger(tmp_path, undisturbed, metadata, changes):
    out = tmp_path / "x.safetensors"
    out.write_bytes(undisturbed)
    with safe_open(out, "np") as file:
        about = file.metadata() if metadata is None else metadata
    stored = {name: rows for name, rows in (load_file(out) | changes).items() if rows is not None}
    save_file(stored, out, about)
    with pytest.raises(ResultError, match="not made by this command; give another --out or --overwrite"):
        embed_dataset(FEW, out)
    embed_dataset(FEW, out, overwrite=True)
    assert out.read_bytes() == undisturbed


def test_overwriting_is_gone_on_with_though_the_old_file_is_there(tmp_path, undisturbed):
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"something else")
    with pytest.raises(ResultError, match="not made by this command; give another --out or --overwrite"):
        embed_dataset(FEW, out)
    begun(out, overwrite=True)
    assert out.read_bytes() == b"something else"
    assert embed_dataset(FEW, out, overwrite=True).made == 120 - 32
    assert out.read_bytes() == undisturbed


def test_what_is_not_ours_in_the_folder_stays(tmp_path):
    out = tmp_path / "x.safetensors"
    folder_of(out).mkdir()
    for name in ("mine.safetensors", "notes.txt"):
        (folder_of(out) / name).write_bytes(b"mine")
    embed_dataset(FEW, out)
    assert sorted(path.name for path in folder_of(out).iterdir()) == ["mine.safetensors", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing option '--out'"),
        (("--out", "x.npz"), "--out x.npz: must end in .safetensors"),
        (("--out", "x.safetensors", "--data", "nowhere/pictures"), "no such folder"),
        (("--out", "x.safetensors", "--data", "made.safetensors"), "holds embeddings, not images"),
        (("--out", "x.safetensors", "--towers", "tinny"), "did you mean tiny"),
        (("--out", "x.safetensors", "--dtype", "float8"), "--dtype float8"),
        (("--out", "x.safetensors", "--shard-rows", "0"), "--shard-rows 0"),
        (("--out", "x.safetensors", "--limit-train", "0"), "limit-train 0"),
        (("--out", "x.safetensors", "--template", "none"), "template: 'none'"),
        (("--out", "x.safetensors", "--workers", "0"), "--workers 0: must be at least 1"),
    ],
)  # fmt: skip
def test_bad_calls_are_one_line_and_leave_nothing(cairn, features, tmp_path, arguments, says):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = cairn("embed", *arguments)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert sorted(tmp_path.rglob("*")) == before


def test_two_calls_do_not_write_one_file(tmp_path):
    out = tmp_path / "x.safetensors"

    class Meanwhile(Checkpoint):
        def poll(self) -> None:
            with pytest.raises(ResultError, match="is being written by process"):
                embed_dataset(FEW, out)
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        embed_dataset(FEW, out, checkpoint=Meanwhile())


# --- disks and memory -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_half_shard(tmp_path, undisturbed, monkeypatch):
    out, calls = tmp_path / "x.safetensors", []
    flush = os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResultError, match="cannot be written: No space left on device; free some space"):
            embed_dataset(FEW, out)
    assert not out.exists()
    assert not list(tmp_path.rglob("*.part"))
    assert embed_dataset(FEW, out).made < 120
    assert out.read_bytes() == undisturbed


def test_a_disk_with_room_for_the_shards_alone_leaves_no_half_file(cairn, tmp_path, undisturbed):
    out = tmp_path / "x.safetensors"
    limit = 60_000  # a shard has 10 kB, the file more than 100
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = ['cairn', *{CALL!r}, '--out', 'x.safetensors']\n"
        "from cairn.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == "cairn: 'x.safetensors': cannot be written: File too large; free some space or give another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.parts"]
    status, said, _ = cairn(*CALL, "--out", out.name)
    assert status == 0
    assert "8 there already" in said
    assert "120 images, 0 of them now" in said
    assert out.read_bytes() == undisturbed


def test_a_disk_that_seems_too_small_is_told_of_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    events = []
    embed_dataset(FEW, tmp_path / "x.safetensors", log=Log(keep=events.append))
    (told,) = [event["text"] for event in events if event["event"] == "warning"]
    assert "shards and file take 153,600 bytes, 1,000 are free" in told


def test_the_key_of_a_plan_is_that_of_earlier_versions():
    """Or else what they have begun would be begun again."""
    plan = Plan(
        config=EmbedConfig(data="pictures", limit_train=2),
        split="s",
        towers={"name": "t", "fingerprint": "f"},
        dim=4,
        logit_scale=1.0,
        classes=("a",),
        templates=("{}",),
        left_out={"train": (), "test": (1,)},
        train=2,
        test=1,
        images=("x", "y"),
        versions={},
    )
    assert plan.key == "b2c4e48a25c2e7c2c87b8987211fa53c"  # as version 0.2.0 has it


def test_merging_holds_one_shard_at_a_time(tmp_path):
    config = EmbedConfig(shard_rows=1000)
    plan = Plan(
        config=config,
        split="s",
        towers={"name": "t", "fingerprint": "f"},
        dim=250,
        logit_scale=1.0,
        classes=("a",),
        templates=("{}",),
        left_out={},
        train=30_000,
        test=1,
        images=(),
        versions={},
    )
    images = {split: Subset(None, np.arange(n), np.zeros(n, int)) for split, n in (("train", 30_000), ("test", 1))}

    class Numbers(Embedding):
        def rows(self, shard, passed=None):
            return np.full((shard.rows, 250), shard.number, np.float32)

        def texts(self):
            return np.ones((1, 250), np.float32)

    held = Numbers(plan, images, None, tmp_path)
    for shard in plan.shards:
        held.make(shard)
    tracemalloc.start()
    try:
        held.merge(tmp_path / "all.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 1000 * 250 * 4  # of thirty
    merged = load_file(tmp_path / "all.safetensors")["train_features"]
    assert np.array_equal(merged[::1000, 0], np.arange(30))


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_two_ranks_of_torchrun_make_the_same_file(tmp_path, undisturbed):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "-m",
        "cairn",
    ]
    done = subprocess.run(
        [*words, *CALL, "--out", "x.safetensors"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("120 images, 120 of them now", done.stdout)) == 1
    assert (tmp_path / "x.safetensors").read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


class Second(World):
    """A process of two that finds the first one like itself, or unlike."""

    def __init__(self, like: bool):
        super().__init__(world_size=2, rank=1)
        self.like = like

    @contextmanager
    def connected(self, device: str):
        yield

    def all_gather(self, value):
        return [value if self.like else "other", value]

    def broadcast_from_main(self, act):
        return act()


def test_another_process_makes_its_own_shards_and_no_file(tmp_path, undisturbed):
    out = tmp_path / "x.safetensors"
    begun(out, keep_parts=True)
    embed_dataset(FEW, out, world=Second(like=True))
    assert not out.exists()
    assert sorted(path.stem for path in shards(out)) == [
        *("test-000000", "test-000002", "train-000000", "train-000001", "train-000003")
    ]
    assert embed_dataset(FEW, out).made == 120 - 16 * 4 - 8
    assert out.read_bytes() == undisturbed


def test_processes_that_have_other_images_or_towers_are_refused(tmp_path):
    with pytest.raises(DataError, match="differ between processes"):
        embed_dataset(FEW, tmp_path / "x.safetensors", world=Second(like=False))
    assert not list(tmp_path.iterdir())


# --- Ray --------------------------------------------------------------------------------------------------------------


def workers_of(process: subprocess.Popen) -> list[int]:
    """Ray's workers that make shards for it: children of a child of the process."""
    parents, workers = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                workers.append(int(folder.name))
    return [worker for worker in workers if parents.get(parents[worker]) == process.pid]


@pytest.mark.skipif(sys.platform != "linux", reason="which processes work is read from /proc")
def test_a_worker_that_is_killed_loses_one_shard(tmp_path, undisturbed):
    pytest.importorskip("ray")
    out = tmp_path / "x.safetensors"
    process = started(*CALL, "--out", out.name, "--workers", "2", folder=tmp_path)
    try:
        wait_for(lambda: shards(out), process)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        said, problems = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, problems
    assert "120 images, 120 of them now" in said
    assert out.read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_without_ray_it_is_said_what_to_install(cairn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = cairn(*CALL, "--out", "x.safetensors", "--workers", 2)
    assert status == 2
    assert err == f"cairn: ray is missing; {extra_remedy('ray')}, or torchrun\n"
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_one_line_and_leaves_nothing(cairn, tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, _, err = cairn(*CALL, "--out", "x.safetensors", "--workers", 2, "--address", address)
    assert status == 2
    assert err.startswith(f"cairn: --address {address}: ")
    assert "`ray start --head` begins a cluster" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_workers_and_ranks_are_one_too_many(tmp_path):
    with pytest.raises(CairnError, match="--workers 2: 2 processes started already; leave --workers out"):
        embed_dataset(FEW, tmp_path / "x.safetensors", workers=2, world=World(2))

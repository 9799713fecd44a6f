"""One thread, no network, shapes checked at run time, and the small worlds that tests share."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ["cairn.towers.clip", "cairn.towers.prefix", "cairn.towers.prompts"] + [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("maths", "memory", "methods")
    for path in sorted((ROOT / "cairn" / room).rglob("*.py"))
    if re.search("^from (jaxtyping|cairn.types) import", path.read_text(), re.MULTILINE)
]
"""The modules whose annotations tell shapes. They are executed: a wrong shape fails where it happens."""

install_import_hook(
    CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)  # an int is a float, too

import numpy as np
import pytest
import torch

from cairn.data import shapes
from cairn.data.images import Dataset, Images, Subset
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import TaskStream, task_stream

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real images and embeddings beside the project; tests that need them skip where they are absent."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session", autouse=True)
def drawings():
    """A drawing depends on its scene and style alone: what many tests ask for is drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "draw", lru_cache(maxsize=4096)(shapes.draw))
        yield


@pytest.fixture(scope="session")
def towers():
    """The embedded tiny towers. They never change, so one copy serves every test."""
    from cairn.towers.catalogue import load_towers

    return load_towers("tiny", device="cpu")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the data beside the project is absent")
    return SHARED


TRAIN_COUNTS, TEST_COUNTS = (10, 5, 8, 12, 6, 7), (4, 6, 3, 5, 2, 4)
"""Images of each class of the drawn world. Those for training are unequal, since equal counts hide every fault of a weighting;
so are both counts of the embedded world."""


def unequal(images: Images, counts: Sequence[int]) -> Subset:
    """The first so many images of each class."""
    rows = np.sort(np.concatenate([np.flatnonzero(images.labels == c)[:n] for c, n in enumerate(counts)]))
    return Subset(images, rows, images.labels[rows])


def few_classes(dataset: Dataset, number: int) -> Dataset:
    """The first classes of a data set."""
    kept = [np.flatnonzero(images.labels < number) for images in (dataset.train, dataset.test)]
    train, test = (
        Subset(images, rows, images.labels[rows])
        for images, rows in zip((dataset.train, dataset.test), kept, strict=True)
    )
    return replace(dataset, classes=dataset.classes[:number], train=train, test=test)


@pytest.fixture(scope="session")
def small_stream() -> TaskStream:
    """Six classes of the drawn world in three tasks, with unequal numbers of images."""
    data = few_classes(shapes_dataset(), 6)
    data = replace(data, train=unequal(data.train, TRAIN_COUNTS), test=unequal(data.test, TEST_COUNTS))
    return task_stream(data, step=2, order="seed:1993")


@pytest.fixture(scope="session")
def embedded_dataset() -> Dataset:
    """Six clusters of correlated embeddings of unequal sizes with class texts, as a features file gives them."""
    from cairn.data.embeddings import Embeddings, Rows

    rng = np.random.default_rng(0)
    d, names = 16, tuple(f"class_{i}" for i in range(6))
    texts = (2.0 * rng.normal(size=d) + 0.7 * rng.normal(size=(6, d))).astype(np.float32)  # a cone, as CLIP's are
    mixing = rng.normal(size=(d, d)) / d**0.5 * np.geomspace(1.0, 0.1, d)

    def rows(counts: Sequence[int]) -> Rows:
        labels = np.repeat(np.arange(6), counts)
        noise = rng.normal(size=(len(labels), d)) @ mixing.T
        return Rows((texts[labels] + 0.6 * noise).astype(np.float32), labels, "made")

    held = Embeddings(dim=d, text=texts, logit_scale=20.0, fingerprint="made", name="made")
    return Dataset(
        "made", names, rows((40, 18, 30, 46, 22, 24)), rows((10, 14, 8, 12, 6, 10)), ("a photo of a {}.",), held
    )


@pytest.fixture
def blurred_dataset(embedded_dataset) -> Dataset:
    """The embedded data set with test images that are often told wrong: where all are right, no measure can be wrong."""
    from cairn.data.embeddings import Rows

    test, rng = embedded_dataset.test, np.random.default_rng(1)
    values = test.values + 2.0 * rng.normal(size=test.values.shape)
    return replace(embedded_dataset, test=Rows(values.astype(np.float32), test.labels, test.name))


@pytest.fixture
def flat(embedded_dataset):
    """The towers of those embeddings: no image tower, class texts by name."""
    from cairn.towers.feature_file import features_towers

    return features_towers(embedded_dataset, "made.safetensors")


@pytest.fixture
def stream(embedded_dataset) -> TaskStream:
    """The embedded data set in three tasks."""
    return task_stream(embedded_dataset, step=2)


@pytest.fixture
def features_file(tmp_path, embedded_dataset):
    """Writes the embedded data set to a file, with changes, and tells where."""
    from cairn.data.embeddings import save_features

    data = embedded_dataset
    whole = {
        "train_features": data.train.values,
        "train_labels": data.train.labels,
        "test_features": data.test.values,
        "test_labels": data.test.labels,
        "class_names": data.classes,
        "text_features": data.embeddings.text,
        "logit_scale": data.embeddings.logit_scale,
    }

    def write(name: str = "made", **changes) -> str:
        save_features(tmp_path / f"{name}.safetensors", **(whole | changes))
        return str(tmp_path / f"{name}.safetensors")

    return write


@pytest.fixture
def features(features_file) -> str:
    """A features file as it should be."""
    return features_file()


@pytest.fixture
def cairn(monkeypatch, tmp_path, capsys):
    """Call the command in an empty folder; returns (exit status, standard output, standard error)."""
    from cairn.cli import app as cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cairn", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture
def small_files():
    """Within it no file grows beyond so many bytes, as on a disk that is full."""

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return limited

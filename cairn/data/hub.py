"""Public data sets through the `datasets` library: from the hub, or from a copy on disk.

Labels are read beforehand, images when they are asked for. `datasets` comes with the extra `hub` and is
imported when a table is opened; a copy that is a plain folder of images does without it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from cairn.data.catalogue import CATALOGUE, HubRow
from cairn.data.decoding import check, decoded, reason
from cairn.data.folders import folder_dataset
from cairn.data.images import Concatenation, Dataset, Images, Subset
from cairn.data.names import class_name
from cairn.data.stream import held_out
from cairn.errors import DataError, UnknownName, counted
from cairn.storage.distribution import extra_remedy

TEST_SHARE = 0.2
"""Of each class's images, where a copy has a single split."""


class HubImages:
    """Rows of one split of a table. An item is a PIL image in RGB, decoded when it is asked for; with `side`, which `reduced`
    sets, JPEGs at a fraction of their size."""

    side: int | None = None

    def __init__(self, rows: Any, column: str, labels: np.ndarray, name: str):
        self.rows = rows
        self.column = column
        self.labels = labels
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        """The image. Raises DataError that names the row if it cannot be decoded."""
        try:
            return decoded(io.BytesIO(self.identity(index)), self.side)
        except Exception as error:  # a decoder fed with damaged bytes may raise anything
            raise DataError(
                f"image {self.describe(index)}: cannot be read ({reason(error)}); repair the copy"
            ) from None

    def check(self, index: int) -> None:
        """Raises what opening the image would raise, at less cost."""
        check(io.BytesIO(self.identity(index)))

    def reduced(self, side: int) -> HubImages:
        """The same images, JPEGs decoded as `decoded` does with that side."""
        same = copy(self)
        same.side = side
        return same

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def identity(self, index: int) -> bytes:
        """The encoded file, as the table has it."""
        stored = self._encoded[int(index)][self.column]
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    @cached_property
    def _encoded(self) -> Any:
        return self.rows.cast_column(self.column, type(self.rows.features[self.column])(decode=False))


PUBLISHED = "published"
"""After a key and a colon: the classes of a data set that published benchmarks keep."""


def hub_dataset(
    key: str, local: str | os.PathLike[str] | None = None, revision: str | None = None, part: str | None = None
) -> Dataset:
    """The catalogue's data set `key`, from the hub (at `revision`) or from the copy at `local`; with `part` "published" the classes
    of it that published benchmarks keep, in their order.

    A copy is a folder written by `save_to_disk`, a folder of parquet files named as on the hub
    (`train-00000-of-00002.parquet`, or `train/0000.parquet`; `datasets` then keeps an Arrow copy in its cache), or a
    folder of images (see `folder_dataset`).
    Raises UnknownName for an unknown key; DataError for a missing copy, split or column, labels without names, and
    a number of classes that is not the data set's.
    """
    if key not in CATALOGUE:
        raise UnknownName("dataset", key, CATALOGUE)
    row = CATALOGUE[key]
    if part not in (None, PUBLISHED):
        raise UnknownName(f"part of {key}", part, (PUBLISHED,))
    if part and row.published is None:
        raise DataError(f"data '{key}:{PUBLISHED}': which classes benchmarks keep is not known here; write {key}")
    dataset = _from_tables(row, _downloaded(row, revision)) if local is None else _local(row, local)
    return _published(row, dataset) if part else dataset


def _local(row: HubRow, local: str | os.PathLike[str]) -> Dataset:
    path = Path(os.path.expanduser(local))
    if not os.path.exists(path):
        raise DataError(f"data '{row.key}={local}': no such folder; give the folder of a local copy")
    tables = _stored(row, path)
    if tables is not None:
        return _from_tables(row, tables)
    plain = folder_dataset(path, split_seed=0, test_share=TEST_SHARE)
    classes = _class_names(row, plain.classes)
    return Dataset(row.key, classes, plain.train, plain.test, row.templates, notices=plain.notices)


def _published(row: HubRow, dataset: Dataset) -> Dataset:
    """The classes that published benchmarks keep, sorted as folders of their names are."""
    number, names = _first(row, dataset) if row.published_names is None else _named(row, dataset, row.published_names())

    def part_of(images: Images) -> Subset:
        labels = number[images.labels]
        rows = np.flatnonzero(labels >= 0)
        return Subset(images, rows, labels[rows])

    return replace(dataset, classes=names, train=part_of(dataset.train), test=part_of(dataset.test))


def _first(row: HubRow, dataset: Dataset) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of each of the data set's classes among those kept, -1 for others, and the names of those kept."""
    names = dataset.classes
    kept = sorted(range(len(names)), key=lambda c: names[c].replace(" ", "_"))[: row.published]
    number = np.full(len(names), -1)
    number[kept] = np.arange(len(kept))
    return number, tuple(names[c] for c in kept)


def _named(row: HubRow, dataset: Dataset, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same, each class kept under the longest of the names that its own begins with."""
    number = np.array([_beginning(name.split(), names) for name in dataset.classes])
    for c in np.setdiff1d(np.arange(len(names)), number):
        raise DataError(
            f"data '{row.key}:{PUBLISHED}': the copy has no class '{names[c]}'; use a whole copy, or write {row.key}"
        )
    return number, names


def _beginning(words: list[str], names: tuple[str, ...]) -> int:
    for n in range(len(words), 0, -1):
        if (name := " ".join(words[:n])) in names:
            return names.index(name)
    return -1


# --- reading tables ---------------------------------------------------------------------------------------------------


def _library(row: HubRow) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise DataError(f"data '{row.key}': needs the datasets library; {extra_remedy('hub')}") from None
    return datasets


def _downloaded(row: HubRow, revision: str | None) -> Mapping[str, Any]:
    datasets = _library(row)
    try:
        return datasets.load_dataset(row.hub_id, row.config, revision=revision, data_files=dict(row.files) or None)
    except Exception as error:  # network, access rights, a copy that moved: the library's errors have no common root
        raise DataError(
            f"data '{row.key}': cannot be read from the hub as '{row.hub_id}' ({_reason(error)}); "
            f"check the connection, or give a local copy: {row.key}=PATH"
        ) from None


def _stored(row: HubRow, path: Path) -> Mapping[str, Any] | None:
    """Tables by split from a copy on disk; None if it holds no tables."""
    saved = (path / "dataset_dict.json").is_file(), (path / "state.json").is_file()
    files: dict[str, list[str]] = {}
    if not any(saved):
        for file in [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")):
            files.setdefault(_split_of(file), []).append(str(file))
        if not files:
            return None
    datasets = _library(row)
    try:
        if any(saved):
            tables = datasets.load_from_disk(str(path))
            return tables if saved[0] else {str(tables.split or "train"): tables}
        return datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # as above
        raise DataError(f"data '{row.key}={path}': damaged copy ({_reason(error)}); copy it again") from None


def _split_of(file: Path) -> str:
    """'train' for train-00000-of-00002.parquet, train.parquet and train/0000.parquet."""
    first = file.stem.split("-")[0]
    return file.parent.name if first.isdecimal() else first


def _from_tables(row: HubRow, tables: Mapping[str, Any]) -> Dataset:
    train_splits, test_split = _chosen_splits(row, list(tables))
    splits = [*train_splits, *([test_split] if test_split else [])]
    raw, codes = _labels(row, [tables[split] for split in splits])
    parts = [_images(row, tables[split], split, labels) for split, labels in zip(splits, codes, strict=True)]
    classes = _class_names(row, raw)
    if test_split is not None:
        train: Images = Concatenation(parts[:-1]) if len(parts) > 2 else parts[0]
        return Dataset(row.key, classes, train, parts[-1], row.templates)
    whole = parts[0]
    for label in np.flatnonzero(np.bincount(whole.labels) == 1):
        raise DataError(
            f"data '{row.key}': class '{classes[label]}' has one image, a split needs two; use the whole copy"
        )
    kept, out = held_out(whole, TEST_SHARE, seed=0)
    return Dataset(
        row.key, classes, Subset(whole, kept, whole.labels[kept]), Subset(whole, out, whole.labels[out]), row.templates
    )


def _chosen_splits(row: HubRow, found: Sequence[str]) -> tuple[list[str], str | None]:
    """Splits to train on, and the one to test on (None: to be cut from the only one)."""
    if not row.test and len(found) == 1:
        return list(found), None
    # a copy of a one-split data set that was cut already keeps its cut
    train_names, test_names = (row.train, row.test) if row.test else (("train",), ("test", "validation", "val"))
    train = [name for name in train_names if name in found]
    test = next((name for name in test_names if name in found and name not in train), None)
    if not train or test is None:
        wanted = f"'{train_names[0]}'" if not train else " or ".join(f"'{name}'" for name in test_names)
        raise DataError(f"data '{row.key}': no split {wanted}; the copy has {', '.join(found)}: use a whole copy")
    return train, test


def _column(row: HubRow, table: Any, accepted: Sequence[str]) -> str:
    for name in accepted:
        if name in table.column_names:
            return name
    raise DataError(
        f"data '{row.key}': no column {' or '.join(map(repr, accepted))}; "
        f"the copy has {', '.join(table.column_names)}: rename its column to '{accepted[0]}'"
    )


def _values(table: Any, column: str) -> np.ndarray:
    return table.select_columns([column]).with_format("arrow")[:].column(0).to_numpy()


def _labels(row: HubRow, tables: Sequence[Any]) -> tuple[list[str], list[np.ndarray]]:
    """Raw class names in natural order, and each table's labels as indices of them.

    The order of a ClassLabel column where the first table has one, else the sorted distinct values of all.
    """
    named: list[tuple[list[str], np.ndarray]] = []
    ordered: list[str] = []
    for table in tables:
        column = _column(row, table, row.label)
        values, feature = _values(table, column), table.features[column]
        if values.dtype.kind in "iu" and hasattr(feature, "names"):
            if len(values) and values.min() < 0:
                raise DataError(f"data '{row.key}': column '{column}' hides its labels (-1); use a copy that has them")
            named.append((list(feature.names), values.astype(np.int64)))
            ordered = ordered or list(feature.names)
        elif values.dtype.kind == "O" and all(isinstance(value, str) for value in values):
            distinct, inverse = np.unique(values.astype(str), return_inverse=True)
            named.append((distinct.tolist(), inverse.astype(np.int64)))
        else:
            raise DataError(
                f"data '{row.key}': column '{column}' holds {feature}, no class names; "
                "use a copy with ClassLabel or strings"
            )
    distinct_names = {name for names, _ in named for name in names}
    classes = ordered + sorted(distinct_names - set(ordered))
    position = {name: i for i, name in enumerate(classes)}
    return classes, [np.array([position[name] for name in names], dtype=np.int64)[codes] for names, codes in named]


def _images(row: HubRow, table: Any, split: str, labels: np.ndarray) -> Images:
    column = _column(row, table, row.image)
    datasets = _library(row)
    rows = table.select_columns([column])
    if not isinstance(rows.features[column], datasets.Image):  # parquet written without the library's own notes
        rows = rows.cast_column(column, datasets.Image())
    images = HubImages(rows, column, labels, f"{row.key}/{split}")
    if row.frames is None or not set(row.frames) <= set(table.column_names):
        return images
    kept = _middle(_values(table, row.frames[0]), _values(table, row.frames[1]))
    return Subset(images, kept, labels[kept])


def _middle(videos: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows of the middle frame of each video, in the table's order."""
    _, video = np.unique(videos.astype(str), return_inverse=True)
    order = np.lexsort((positions, video))
    counts = np.bincount(video)
    starts = np.cumsum(counts) - counts
    return np.sort(order[starts + counts // 2])


def _class_names(row: HubRow, raw: Sequence[str]) -> tuple[str, ...]:
    if len(raw) not in row.classes:
        expected = " or ".join(map(str, row.classes))
        raise DataError(
            f"data '{row.key}': the copy has {counted(len(raw), 'class')}, {row.title} has {expected}; use a whole copy, "
            "or give a folder of some classes as --data PATH"
        )
    names = tuple(class_name(row.clean(name)) for name in raw)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data '{row.key}': two classes are both called '{twice}'; rename one in the copy")
    return names


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__

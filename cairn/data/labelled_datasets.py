"""Data sets of other libraries that hold pictures and their labels: Hugging Face's `datasets`, pandas, and PyTorch.

None of them is imported here: who hands over an object of a library has imported it. Pictures are read when they are asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from cairn.data.in_memory import Deferred, InMemoryImages, Item
from cairn.data.names import listed
from cairn.errors import InvalidInput, counted, one_line

IMAGE, FILE, LABEL = "image", "file_name", "label"
"""Columns that are taken where there are several of a kind, called as in Hugging Face's imagefolder."""

COMPARED = 8
"""Pictures that are read twice, to see whether they stay the same."""


@runtime_checkable
class Indexed(Protocol):
    """Rows by their number, as a PyTorch data set of the map style has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class HasClasses(Protocol):
    """The names that its targets count through, as torchvision's data sets have them."""

    @property
    def classes(self) -> Sequence[str]: ...


def labelled_items(given: object) -> tuple[list[Item], list[str]]:
    """The pictures of a data set, and the class name of each.

    - `datasets.Dataset`: a column of type `Image`, and one of type `ClassLabel` or of texts. Of several, `image` and `label`.
    - `pandas.DataFrame`: columns `file_name` and `label`, or `label` and one other. A file is found from the working directory.
    - Rows `(image, target)` by number, such as torchvision's: a target is a class name, or a number into `classes`.

    Raises InvalidInput, which names the rows, where a label is missing, and for what is none of these.
    """
    if _is(given, "datasets", "Dataset"):
        return _of_hugging_face(cast("Any", given))
    for name in ("DatasetDict", "IterableDatasetDict"):
        if _is(given, "datasets", name):
            parts = listed([repr(str(part)) for part in cast("Iterable[Any]", given)])
            raise InvalidInput(f"labels: a {name} of {parts}; give one of them, such as dataset['train']")
    if _is(given, "datasets", "IterableDataset"):
        raise InvalidInput(
            "labels: a streamed data set; load it without streaming=True, or give images and labels as lists"
        )
    if _is(given, "pandas", "DataFrame"):
        return _of_pandas(cast("Any", given))
    if isinstance(given, Indexed) and not isinstance(given, (str, bytes, Mapping)):
        return _of_rows(given)
    raise InvalidInput(
        f"labels: none given beside images of type {type(given).__name__}; give one class name for each image, or a data set "
        "that has them: datasets.Dataset, pandas.DataFrame, or rows (image, target)"
    )


def _is(given: object, module: str, name: str) -> bool:
    """Whether it is of that class of a library. One that was never imported has no objects."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(given, kind)


# Hugging Face


def _of_hugging_face(dataset: Any) -> tuple[list[Item], list[str]]:
    library: Any = sys.modules["datasets"]
    features: dict[str, Any] = dict(dataset.features)

    def of_type(kind: Any) -> list[str]:
        return [name for name, feature in features.items() if isinstance(feature, kind)]

    texts = [name for name in of_type(library.Value) if features[name].dtype in ("string", "large_string")]
    image = _one_of(of_type(library.Image), IMAGE, "a column of type Image", features)
    labels = of_type(library.ClassLabel)
    if LABEL in features and LABEL not in (*labels, *texts):
        raise InvalidInput(
            f"column '{LABEL}': of type {_type_name(features[LABEL])}; cast it to ClassLabel, or give class names as texts"
        )
    label = (
        LABEL
        if LABEL in texts
        else _one_of(labels or texts, LABEL, "a column of type ClassLabel or of texts", features)
    )
    encoded = dataset.with_format(None).cast_column(image, library.Image(decode=False)).select_columns([image])
    values = dataset.with_format(None)[label][:]
    if label in texts:
        names = _all_labelled(values)
    else:
        called = features[label].names
        names = _all_labelled([called[value] if value is not None and value >= 0 else None for value in values])

    def item(row: int) -> Deferred:
        def read() -> Any:
            stored = encoded[row][image]
            if stored is None:
                raise ValueError("empty")
            if stored["bytes"] is not None:  # decoded as a file is: the same picture, wherever it came from
                return BytesIO(stored["bytes"])
            local = Path(stored["path"])
            return BytesIO(local.read_bytes()) if local.is_file() else dataset.with_format(None)[row][image]

        return Deferred(read, f"row {row}")

    return [item(row) for row in range(len(dataset))], names


def _one_of(found: list[str], usual: str, what: str, columns: Iterable[str]) -> str:
    if usual in found:
        return usual
    has = listed([repr(one_line(str(name))) for name in columns])
    if not found:
        raise InvalidInput(f"data set with columns {has}: has not {what}; add or cast one")
    if len(found) > 1:
        several = listed([repr(one_line(name)) for name in found])
        raise InvalidInput(
            f"data set: {several} are each {what}; rename the one that is meant to '{usual}', or select_columns without the others"
        )
    return found[0]


def _type_name(feature: Any) -> str:
    return one_line(str(getattr(feature, "dtype", None) or type(feature).__name__))


# pandas


def _of_pandas(frame: Any) -> tuple[list[Item], list[str]]:
    columns = list(frame.columns)
    if columns.count(LABEL) != 1 or columns.count(FILE) > 1:
        has = listed([repr(one_line(str(name))) for name in columns])
        raise InvalidInput(
            f"table with columns {has}: {'two columns of one name' if LABEL in columns else 'no column label'}; rename the "
            "columns to 'file_name' and 'label'"
        )
    others = [name for name in columns if name != LABEL]
    if FILE not in others and len(others) != 1:
        has = listed([repr(one_line(str(name))) for name in others]) or "no other column"
        raise InvalidInput(f"table with label and {has}: which are the files? rename that column to 'file_name'")
    files = frame[FILE if FILE in others else others[0]]
    if empty := [row for row, missing in enumerate(files.isna()) if missing]:
        raise InvalidInput(f"{_rows(empty)}: no file; drop them: frame.dropna()")
    labels = [None if missing else value for value, missing in zip(frame[LABEL], frame[LABEL].isna(), strict=True)]
    return list(files), _all_labelled(labels)


# PyTorch


def _of_rows(dataset: Indexed) -> tuple[list[Item], list[str]]:
    classes, targets = _classes(dataset), []
    for row in range(len(dataset)):
        found = dataset[row]
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise InvalidInput(
                f"labels: none given, and row {row} is {type(found).__name__}, not (image, target); give one class name for each "
                "image"
            )
        targets.append(_target(found[1], classes, row))
    names = _all_labelled(targets)
    items: list[Item] = [Deferred(lambda row=row: dataset[row][0], f"row {row}") for row in range(len(dataset))]
    _refuse_random(items)
    return items, names


def _classes(dataset: object) -> list[str] | None:
    """The names of a data set's classes, or of those that it was put together from."""
    if isinstance(dataset, HasClasses):
        return list(dataset.classes)
    if isinstance(dataset, Subset):
        return _classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        first, *others = (_classes(part) for part in dataset.datasets)
        if any(other != first for other in others):
            raise InvalidInput(
                "data sets put together: their classes differ, and so does what a target means; give one at a time"
            )
        return first
    return None


def _target(value: Any, classes: list[str] | None, row: int) -> str | None:
    """The class name, None where there is no label."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise InvalidInput(f"row {row}: target {one_line(repr(value))[:60]}; must be a class name or a class's number")
    if value < 0:
        return None
    if classes is None:
        raise InvalidInput(
            f"row {row}: target {value}, and the data set has no `classes`; give a class name for each image"
        )
    if value >= len(classes):
        raise InvalidInput(
            f"row {row}: target {value}, and the data set has {counted(len(classes), 'class')}; correct it"
        )
    return classes[int(value)]


def _refuse_random(items: Sequence[Item]) -> None:
    """Raises InvalidInput where pictures change from one reading to the next: they could not be known again."""
    rows = np.linspace(0, len(items) - 1, min(len(items), COMPARED)).astype(int)
    images = InMemoryImages([items[row] for row in rows], np.zeros(len(rows), dtype=np.int64))
    if images.content_hashes() != images.content_hashes():
        raise InvalidInput(
            "data set: its pictures differ each time that they are read; give it without random transforms"
        )


def _all_labelled(labels: Sequence[Any]) -> list[str]:
    """Raises InvalidInput for rows without a label."""
    if missing := [row for row, label in enumerate(labels) if label is None]:
        raise InvalidInput(f"{_rows(missing)}: no label; leave them out, or label them")
    return list(labels)


def _rows(rows: Sequence[int]) -> str:
    return f"{counted(len(rows), 'row')} ({listed([str(row) for row in rows], 5)})"

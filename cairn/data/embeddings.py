"""Embeddings computed beforehand, in a safetensors file: for people who hold vectors in a store, not images.

Tensors: `train_features` (n, d), `train_labels` (n,), `test_features` (m, d), `test_labels` (m,) and, if texts were
embedded too, `text_features` (k, d). Where images may show several classes, labels are (n, k) and (m, k), 1 for a class that is
shown and 0 for one that is not. Metadata: see `cairn.data.features_metadata`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cairn.data.features_metadata import FeaturesMetadata
from cairn.data.images import Dataset, Images, LabelSets
from cairn.data.templates import prompt_templates
from cairn.errors import DataError, ResultError, counted, one_line
from cairn.storage.files import sha256_of, write_chunks
from cairn.storage.tensors import CODES, TensorFile, serialized

REQUIRED = ("train_features", "train_labels", "test_features", "test_labels")


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What a features file holds besides its rows. `text` is (k, d) float32 in the classes' natural order, or None.

    `fingerprint` is the first 16 hexadecimal digits of the file's SHA-256; `name` is the model that made the file
    where the metadata names it, else the file's own name.
    """

    dim: int
    text: np.ndarray | None
    logit_scale: float
    fingerprint: str
    name: str


class Rows:
    """Rows of a matrix as items: float32 (d,). `values` is the whole matrix (n, d)."""

    def __init__(self, values: np.ndarray, labels: np.ndarray, name: str):
        self.values = values
        self.labels = labels
        self.name = name

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[index]

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def identity(self, index: int) -> bytes:
        return self.values[index].tobytes()


def features_dataset(path: str | os.PathLike[str]) -> Dataset:
    """The data set in a features file; `Dataset.embeddings` is an `Embeddings`. Rows stay as stored, not normalised.

    Raises DataError for a file that is missing, damaged or incomplete, for metadata that is not as its schema says, for
    shapes and widths that disagree, labels that are no class numbers, rows that are not finite, and a class without rows.
    """
    file = Path(os.path.expanduser(path))
    shown = f"features file '{path}'"
    if not os.path.isfile(file):
        raise DataError(f"{shown}: no such file; give the path of a .safetensors file")
    try:  # mapped, not read: it may be larger than memory
        opened = TensorFile(file)
        metadata, stored = opened.header.metadata, opened.header.tensors
        if missing := [name for name in REQUIRED if name not in stored]:
            raise DataError(f"{shown}: lacks {', '.join(missing)}; it holds {', '.join(sorted(stored)) or 'nothing'}")
        tensors = opened.tensors([name for name in (*REQUIRED, "text_features") if name in stored])
    except ResultError as error:
        raise DataError(f"features file {error}; write it again") from None

    about = FeaturesMetadata.parsed(metadata, shown)
    arrays = _checked(tensors, about.class_names, shown)
    text = arrays.get("text_features")
    dim = arrays["train_features"].shape[1]
    return Dataset(
        name=file.stem,
        classes=tuple(about.class_names),
        train=_labelled(arrays, "train"),
        test=_labelled(arrays, "test"),
        templates=tuple(about.templates),
        embeddings=Embeddings(dim, text, about.logit_scale, sha256_of(file)[:16], about.model or one_line(file.stem)),
    )


def _labelled(arrays: dict[str, np.ndarray], part: str) -> Images:
    features, labels, name = arrays[f"{part}_features"], arrays[f"{part}_labels"], f"{part}_features"
    if labels.ndim == 1:
        return Rows(features, labels, name)
    return LabelSets.of(Rows(features, np.full(len(features), -1), name), labels)


def save_features(
    path: str | os.PathLike[str],
    *,
    train_features: np.ndarray | torch.Tensor,
    train_labels: np.ndarray | torch.Tensor,
    test_features: np.ndarray | torch.Tensor,
    test_labels: np.ndarray | torch.Tensor,
    class_names: Sequence[str],
    text_features: np.ndarray | torch.Tensor | None = None,
    templates: Sequence[str] | str = (),
    logit_scale: float | None = None,
    model: str | None = None,
) -> None:
    """Write a file that `features_dataset` reads, whole or not at all. Features keep their precision.

    Raises DataError, before anything is written, for what `features_dataset` would refuse; ResultError where it cannot be
    written.
    """
    tensors = {
        "train_features": train_features,
        "train_labels": train_labels,
        "test_features": test_features,
        "test_labels": test_labels,
    }
    if text_features is not None:
        tensors["text_features"] = text_features
    tensors = {name: _owned(values) for name, values in tensors.items()}
    metadata = {"class_names": json.dumps(list(class_names), ensure_ascii=False)}
    if isinstance(templates, str) or templates:
        checked = prompt_templates(templates, f"features file '{path}': templates", DataError)
        metadata["templates"] = json.dumps(checked, ensure_ascii=False)
    if logit_scale is not None:
        metadata["logit_scale"] = repr(float(logit_scale))
    if model is not None:
        metadata["model"] = model
    shown = f"features file '{path}'"
    for key, text in metadata.items():
        if text.encode(errors="ignore").decode() != text:
            raise DataError(f"{shown}: '{key}' is not UTF-8: {text}; leave that out")
    for name, values in tensors.items():
        if values.dtype not in CODES:
            raise DataError(f"{shown}: {name} of {_dtype(values)}; store float32, float16 or bfloat16")
    _checked(tensors, FeaturesMetadata.parsed(metadata, shown).class_names, shown)
    write_chunks(Path(os.path.expanduser(path)), serialized(tensors, metadata))


def _owned(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A copy in row order: safetensors refuses tensors that share memory, torch warns of arrays that are read-only."""
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", copy=True).contiguous()
    return torch.from_numpy(np.array(values, order="C"))


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(tensors: dict[str, torch.Tensor], names: Sequence[str], shown: str) -> dict[str, np.ndarray]:
    """The tensors as arrays, features in float32 and labels in int64."""
    arrays = {}
    for part in ("train", "test"):
        features, labels = tensors[f"{part}_features"], tensors[f"{part}_labels"]
        fits = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == len(names))
        if features.ndim != 2 or not fits or len(features) != len(labels):
            raise DataError(
                f"{shown}: {part}_features {_shape(features)} and {part}_labels {_shape(labels)} do not fit; "
                f"they must be (n, d) and (n), or (n, {len(names)}) where rows have several classes"
            )
        if features.shape[1] == 0 or not features.is_floating_point():
            raise DataError(
                f"{shown}: {part}_features {_shape(features)} of {_dtype(features)}; "
                "store rows of floating point numbers"
            )
        sets = labels.ndim == 2
        if labels.is_floating_point() or labels.is_complex() or (labels.dtype == torch.bool and not sets):
            raise DataError(f"{shown}: {part}_labels are {_dtype(labels)}; store whole numbers from 0")
        read = _class_sets if sets else _class_numbers
        arrays[f"{part}_labels"] = read(labels, f"{part}_labels", names, shown)
        arrays[f"{part}_features"] = _finite(features, f"{part}_features", shown)
    train, test = tensors["train_features"], tensors["test_features"]
    if train.shape[1] != test.shape[1]:
        raise DataError(
            f"{shown}: train_features {_shape(train)} and test_features {_shape(test)} differ in width; "
            "embed both with the same model"
        )
    if "text_features" in tensors:
        text, expected = tensors["text_features"], (len(names), train.shape[1])
        if tuple(text.shape) != expected or not text.is_floating_point():
            raise DataError(
                f"{shown}: text_features {_shape(text)} of {_dtype(text)}, but {counted(len(names), 'class name')} and "
                f"{counted(train.shape[1], 'column')} of features; store floating point {expected}"
            )
        arrays["text_features"] = _finite(text, "text_features", shown)
    if arrays["train_labels"].ndim != arrays["test_labels"].ndim:
        raise DataError(f"{shown}: train_labels and test_labels must both be (n), or both (n, k)")
    for part in ("train", "test"):
        labels = arrays[f"{part}_labels"]
        counts = np.bincount(labels, minlength=len(names)) if labels.ndim == 1 else labels.sum(0)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            raise DataError(
                f"{shown}: {counted(len(names), 'class name')}, but class '{names[empty[0]]}' (number {empty[0]}) has no row in "
                f"{part}_features ({counted(len(empty), 'such class')}); add rows or remove the name"
            )
    return arrays


def _class_numbers(labels: torch.Tensor, name: str, names: Sequence[str], shown: str) -> np.ndarray:
    numbers = labels.numpy().astype(np.int64)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        raise DataError(
            f"{shown}: {name} has {numbers[wrong[0]]} in row {wrong[0]} ({counted(len(wrong), 'such row')}), but there "
            f"{'is' if len(names) == 1 else 'are'} {counted(len(names), 'class name')}; labels must be 0 to {len(names) - 1}"
        )
    return numbers


def _class_sets(labels: torch.Tensor, name: str, names: Sequence[str], shown: str) -> np.ndarray:
    values = labels.numpy()
    wrong = np.flatnonzero(((values != 0) & (values != 1)).any(1))
    if len(wrong):
        raise DataError(
            f"{shown}: {name} has other numbers than 0 and 1 in row {wrong[0]} ({counted(len(wrong), 'such row')})"
        )
    return values.astype(bool)


def _finite(features: torch.Tensor, name: str, shown: str) -> np.ndarray:
    values = features.to(torch.float32).numpy()
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise DataError(
            f"{shown}: {name} is not finite in row {wrong[0]} ({counted(len(wrong), 'such row')}); "
            "embed them again or leave them out"
        )
    return values


def _shape(tensor: torch.Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

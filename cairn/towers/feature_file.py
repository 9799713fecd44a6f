"""Towers of a features file: embeddings in place of images, and class texts by name."""

from __future__ import annotations

import os

from cairn.data.embeddings import features_dataset
from cairn.data.images import Dataset
from cairn.errors import ConfigError, TowersError
from cairn.towers.features import FeatureTowers

SUFFIX = ".safetensors"

ROWS = "rows"
"""Names the towers of embeddings that come without a file and without texts."""


def is_features_file(spec: str) -> bool:
    """Whether a text names a features file, where towers or data are asked for."""
    return spec.endswith(SUFFIX)


def features_towers(dataset: Dataset, source: str) -> FeatureTowers:
    """The towers of a data set that holds embeddings; `source` is the path of its file."""
    held = dataset.embeddings
    return FeatureTowers(
        name=held.name,
        dim=held.dim,
        logit_scale=held.logit_scale,
        fingerprint=held.fingerprint,
        names=dataset.classes,
        text=held.text,
        source=os.path.abspath(os.path.expanduser(source)),
    )


def require_no_images_asked(
    data: str, precision: str, decode: str, preprocess: str | None, revision: str | None
) -> None:
    """Raises ConfigError for an option that says what is done with images, where `data` holds embeddings: it would do nothing."""
    asked = {
        "precision": None if precision == "float32" else precision,
        "decode": None if decode == "whole" else decode,
        "preprocess": preprocess,
        "revision": revision,
    }
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(f"{name} '{value}': '{data}' holds embeddings, not images; leave it out")


def open_features_towers(path: str) -> FeatureTowers:
    """Raises DataError for a file that is missing, damaged or none of features."""
    return features_towers(features_dataset(path), path)


def row_towers(width: int) -> FeatureTowers:
    """Towers of rows of so many numbers."""
    return FeatureTowers(name=ROWS, dim=width, logit_scale=100.0, fingerprint=f"{ROWS}-{width}", names=(), text=None)


def row_towers_named(fingerprint: str) -> FeatureTowers:
    """Those of a fingerprint. Raises TowersError for one of other towers."""
    kind, _, width = fingerprint.partition("-")
    if kind != ROWS or not width.isdecimal() or not 0 < len(width) < 8:
        raise TowersError(f"towers '{ROWS}': '{fingerprint}' is not their fingerprint")
    return row_towers(int(width))

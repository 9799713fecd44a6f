"""Towers of a features file: embeddings in place of images, and class texts by name."""

from __future__ import annotations

import os

from cairn.data.embeddings import features_dataset
from cairn.data.images import Dataset
from cairn.towers.features import FeatureTowers

SUFFIX = ".safetensors"


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


def open_features_towers(path: str) -> FeatureTowers:
    """Raises DataError for a file that is missing, damaged or none of features."""
    return features_towers(features_dataset(path), path)

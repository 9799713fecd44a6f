"""What `--data` may name: the drawn world, a features file, a folder, and the data sets of the catalogue."""

from __future__ import annotations

import os
from pathlib import Path

from cairn.data.catalogue import CATALOGUE
from cairn.data.images import Dataset
from cairn.errors import DataError, UnknownName

DRAWN = ("shapes", "attributes")
"""Data sets that are drawn: nothing is read for them."""

MOSAIC = "mosaic"
"""Before `=` and the name of a data set: grids of its pictures."""


def open_dataset(spec: str | os.PathLike[str]) -> Dataset:
    """The data set that `spec` names.

    `shapes` or `shapes:dev` (the drawn world), `attributes` or `attributes:dev` (the same, several classes in an image); a
    catalogue key, read from the hub, or `KEY=PATH`, a local copy of it, `KEY:published` for the classes of it that published
    benchmarks keep; a `.safetensors` file of features; a folder of images,
    with a folder per class or a file that labels them; `mosaic=DATA`, grids of the pictures of any of these. Where a folder is
    called like a key, the key wins: write `./cifar100` for the folder.
    Raises UnknownName for a name that is none of these, DataError for a path that does not exist.
    """
    # Imported where needed: what is not opened is not loaded.
    spec = os.fspath(spec)
    drawn, _, part = spec.partition(":")
    if drawn in DRAWN:
        part = part or "stream"
        if part not in ("stream", "dev"):
            raise UnknownName(f"part of {drawn}", part, ("stream", "dev"))
        from cairn.data.attributes import attributes_dataset
        from cairn.data.shapes import shapes_dataset

        return shapes_dataset(part) if drawn == "shapes" else attributes_dataset(part)
    name, equals, local = spec.partition("=")
    if name == MOSAIC and (local or not os.path.exists(spec)):
        from cairn.data.mosaics import mosaic_dataset

        if not local:
            raise DataError(f"data '{spec}': no data set after '='; write {MOSAIC}=PATH")
        return mosaic_dataset(open_dataset(local))
    key, _, part = name.partition(":")
    if key in CATALOGUE:
        from cairn.data.hub import hub_dataset

        if equals and not local:
            raise DataError(f"data '{spec}': no path after '='; write {name}=PATH, or {name} to read it from the hub")
        return hub_dataset(key, local=local or None, part=part or None)
    # Path's own methods raise for a user that there is not, and for what is too long to be a path
    path = Path(os.path.expanduser(spec))
    exists = os.path.exists(path)
    if path.suffix == ".safetensors":
        from cairn.data.embeddings import features_dataset

        return features_dataset(spec)
    if exists:
        from cairn.data.annotated import annotated_dataset, annotation_files
        from cairn.data.folders import folder_dataset

        files = annotation_files(path) if path.is_dir() else ()
        return annotated_dataset(spec, files) if files else folder_dataset(spec)
    if os.sep in name or "/" in name or name.startswith((".", "~")):
        raise DataError(f"data '{spec}': no such folder or file; check the path")
    raise UnknownName("dataset", name, (*DRAWN, MOSAIC, *CATALOGUE))

"""Labelled pictures that somebody names on the command line, each of one class or of several."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cairn.data.annotated import ANNOTATIONS, annotation_files, listed
from cairn.data.descriptions import FILE_NAME, Descriptions, read_descriptions
from cairn.data.labelled import FILE, LABEL, LABELS, METADATA, labelled_pictures
from cairn.errors import ConfigError, one_line

Part = Literal["train", "test"]


@dataclass(frozen=True)
class GivenPictures:
    """Files, what each is labelled with, and what a user should hear of how they were found."""

    files: list[Path]
    names: list[str]
    """A class name for each; none where there are `sets`."""
    sets: list[list[str]] | None = None
    """A list of them for each."""
    descriptions: Descriptions | None = None
    notices: tuple[str, ...] = ()


def given_pictures(path: Path, part: Part = "train", recursive: bool = False) -> GivenPictures:
    """As `labelled_pictures`; besides a CSV with columns `file_name` and `labels`, several between semicolons, or JSON in COCO's form,
    and a folder with such files, of which `part` is taken if there is one (see `cairn.data.annotated`). Raises as these do."""
    file = _annotations(path, part)
    if file is None:
        found = labelled_pictures(path, part, recursive)
        return GivenPictures(found.files, found.names, None, found.descriptions, found.notices)
    if recursive:
        raise ConfigError(f"--recursive: '{one_line(file)}' says which pictures there are; leave it out")
    root = path if path.is_dir() else path.parent
    said = read_descriptions(root / FILE_NAME) if (root / FILE_NAME).is_file() else None
    found = listed(file, root)
    files = [found.root / name for name in found.names]
    if found.single:
        return GivenPictures(files, [own for (own,) in found.classes], None, said)
    return GivenPictures(files, [], [[*own] for own in found.classes], said)


def _annotations(path: Path, part: Part) -> Path | None:
    """The file that labels pictures as a data set's does: with several classes, or those of `part` apart from the others."""
    if path.is_file():
        return path if _labels_sets(path) else None
    if not path.is_dir():
        return None
    whole = next((file for file in (path / METADATA, path / ANNOTATIONS) if file.is_file()), None)
    if whole is not None:
        return whole if _labels_sets(whole) else None
    files = [file for file in annotation_files(path) if FILE in (held := _columns(file)) and held & {LABEL, LABELS}]
    return files[0 if part == "train" else -1] if files else None


def _labels_sets(file: Path) -> bool:
    """Whether it is JSON, or a CSV with a column `labels` and none `label`."""
    return {FILE, LABELS} <= (held := _columns(file)) and LABEL not in held


def _columns(file: Path) -> set[str]:
    """Those of a CSV; of JSON, which names the same things otherwise, what they would be."""
    if file.suffix.lower() == ".json":
        return {FILE, LABELS}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return {*next(csv.reader(stream), [])}
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()  # which is said when it is read

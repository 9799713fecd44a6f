"""Labelled pictures as people have them: a folder per class, or a CSV of files and labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cairn.data.descriptions import Descriptions
from cairn.data.folders import class_folders
from cairn.data.picture_files import endings
from cairn.errors import ConfigError, DataError, one_line

FILE, LABEL, LABELS = "file_name", "label", "labels"
"""Columns of a CSV, as Hugging Face's imagefolder calls the first; the last has several classes of a picture."""

METADATA = "metadata.csv"


@dataclass(frozen=True)
class LabelledPictures:
    """Files, the class name of each, and what a user should hear of how they were found."""

    files: list[Path]
    names: list[str]
    descriptions: Descriptions | None = None
    notices: tuple[str, ...] = ()


def labelled_pictures(
    path: Path, part: Literal["train", "test"] = "train", recursive: bool = False
) -> LabelledPictures:
    """What a CSV with columns `file_name` and `label` lists, paths relative to it; of a folder what its `metadata.csv` lists,
    or a folder of pictures per class, with `recursive` those in folders inside it as well. Where it has folders `train/` and
    `test/` (or `val/`) with classes in them, those of `part`.

    Raises DataError for what is neither, naming the line of a CSV that is wrong; ConfigError for a CSV with `recursive`.
    """
    table = next((file for file in (path, path / METADATA) if file.is_file()), None)
    if table is not None and table.suffix.lower() in endings():
        raise DataError(
            f"'{one_line(table)}': a picture, which says not of which class; give a folder of pictures per class, or a CSV of "
            "file_name and label"
        )
    if table is not None and recursive:
        raise ConfigError(f"--recursive: '{one_line(table)}' says which pictures there are; leave it out")
    if table is not None:
        return _of_csv(table)
    found = class_folders(path, recursive, part)
    files = [found.images.path(row) for row in range(len(found.images))]
    return LabelledPictures(
        files, [found.classes[label] for label in found.images.labels], found.descriptions, found.notices
    )


def require_cells(row: Mapping[str | None, Any], where: str) -> None:
    """Raises DataError for a line of a CSV with more cells than there are columns: a name would lose what follows its comma."""
    if any(row.get(None) or ()):
        raise DataError(f"{where}: more cells than columns; put what has a comma in it between double quotes")


def require_one(columns: Sequence[str], where: str) -> None:
    """Raises DataError for two columns that say the same, of which one would be passed over."""
    if {LABEL, LABELS} <= {*columns}:
        raise DataError(f"{where}: columns {LABEL} and {LABELS}; leave the one that says what the pictures show")
    for name in (FILE, LABEL, LABELS):
        if (number := list(columns).count(name)) > 1:
            raise DataError(f"{where}: {number} columns called {name}; leave one")


def first_line(columns: Sequence[str], label: str) -> str:
    """What to do about a CSV that lacks columns."""
    for sign, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and FILE in columns[0].split(sign):
            return f"{called} stand between its cells: save it with commas"
    return f"a first line '{FILE},{label}' names them"


def _of_csv(path: Path) -> LabelledPictures:
    files, names, shown = [], [], one_line(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            require_one(rows.fieldnames or (), f"'{shown}'")
            if missing := {FILE, LABEL} - {*(rows.fieldnames or ())}:
                raise DataError(
                    f"'{shown}': no column {' or '.join(sorted(missing))}; {first_line(rows.fieldnames or (), LABEL)}"
                )
            for row in rows:
                where = f"'{shown}', line {rows.line_num}"
                require_cells(row, where)
                if not row[FILE] or not row[LABEL]:
                    raise DataError(f"{where}: a file_name and a label must be there; correct it")
                files.append(path.parent / row[FILE])
                names.append(row[LABEL])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{shown}': not a CSV in UTF-8 ({one_line(str(error))}); save it as one") from None
    if not files:
        raise DataError(f"'{shown}': lists no picture; add lines of file_name and label")
    return LabelledPictures(files, names)

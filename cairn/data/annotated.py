"""Folders whose pictures are labelled by a file beside them: a CSV, or JSON in COCO's form. An image may show several classes.

Read are, for `train` and for `test` (or `val`, `validation`):

    PATH/train/metadata.csv                  as Hugging Face's imagefolder has it; files are relative to it
    PATH/train.csv, PATH/train.json          files are relative to PATH, or to PATH/train or PATH/images
    PATH/annotations/instances_train*.json   as COCO has it: files are in PATH/train*

or one `PATH/metadata.csv` or `PATH/annotations.json` of all, of which a fifth is set aside. A CSV has a column `file_name`, and
`labels` with the classes of each image between semicolons (none: it shows none of them), or `label` with one. A picture may stand
in several lines: it shows all that they say.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import BaseModel, ConfigDict

from cairn.data.descriptions import FILE_NAME, read_descriptions
from cairn.data.folders import TEST_FOLDERS, FolderImages
from cairn.data.images import Dataset, Images, LabelSets, Subset
from cairn.data.label_set_tasks import held_out_sets
from cairn.data.labelled import FILE, LABEL, LABELS, METADATA, first_line, require_cells, require_one
from cairn.data.names import BETWEEN, class_name
from cairn.data.stream import held_out
from cairn.data.templates import DEFAULT
from cairn.errors import DataError, ResultError, one_line
from cairn.storage.files import parsed_json, read_bytes
from cairn.storage.schema import validated

ANNOTATIONS = "annotations.json"

JSON_BYTES = 2**30
"""Longest file of annotations: COCO's own has 450 MB."""

SHARE = 0.2
"""Set aside for testing where nothing says what to test on."""


class ListedImages(FolderImages):
    """Picture files below a root, as a list names them. `labels` may be given later."""

    def __init__(self, root: Path, names: Sequence[str], labels: np.ndarray | None = None):
        super().__init__(root, (), names, np.full(len(names), -1) if labels is None else labels)

    def _below(self, index: int) -> str:
        return self.names[index]


@dataclass(frozen=True)
class Listed:
    """What one file says: pictures below `root`, and the names of the classes that each shows."""

    root: Path
    names: list[str]
    classes: list[tuple[str, ...]]
    single: bool
    """Whether every picture shows exactly one, by the form of the file."""
    order: tuple[str, ...] = ()
    """All classes, where the file has them in an order of its own."""


class _Image(BaseModel):
    id: int
    file_name: str


class _Annotation(BaseModel):
    image_id: int
    category_id: int


class _Category(BaseModel):
    id: int
    name: str


class _Coco(BaseModel):
    """What is read of COCO's form; boxes and outlines are passed over."""

    model_config = ConfigDict(extra="ignore")

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def annotation_files(root: Path) -> tuple[Path, ...]:
    """The files that label the pictures below a folder: of training and of test, of all, or none."""
    train = _file_of(root, ("train",))
    test = _file_of(root, TEST_FOLDERS)
    if train and test:
        return train, test
    if found := [file for file in (train, test) if file]:
        missing = "test" if train else "train"
        raise DataError(f"data '{one_line(root)}': has '{one_line(found[0])}' and none for {missing}; add one")
    whole = [file for file in (root / METADATA, root / ANNOTATIONS) if _labels_pictures(file)]
    return tuple(whole[:1])


def _file_of(root: Path, names: Iterable[str]) -> Path | None:
    for name in names:
        own = [root / name / METADATA, root / f"{name}.csv", root / f"{name}.json"]
        coco = sorted((root / "annotations").glob(f"instances_{name}*.json"))
        if len(coco) > 1:
            raise DataError(
                f"data '{one_line(root)}': several annotations of {name}: {coco[0].name}, {coco[1].name}; leave one"
            )
        for file in (*own, *coco):
            if _labels_pictures(file):
                return file
    return None


def _labels_pictures(file: Path) -> bool:
    """Whether there is such a file. `metadata.csv` may say other things of pictures that lie in folders of their classes."""
    if file.name != METADATA or not file.is_file():
        return file.is_file()
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            columns = {*next(csv.reader(stream), [])}
    except (OSError, UnicodeDecodeError, csv.Error):
        return True  # which is said when it is read
    return FILE in columns and not columns.isdisjoint((LABEL, LABELS))


def annotated_dataset(path: str | os.PathLike[str], files: Sequence[Path]) -> Dataset:
    """The data set that `annotation_files` found. No picture is opened.

    Raises DataError for a file that is none, naming its line; for a picture outside its folder; for a class
    that one side lacks.
    """
    root = Path(os.path.expanduser(path))
    read = [listed(file, root) for file in files]
    single, shown = all(part.single for part in read), one_line(path)
    named = sorted({name for part in read for own in part.classes for name in own})
    order = next((part.order for part in read if part.order), ())
    classes = tuple(order) if set(order) >= set(named) else tuple(named)
    parts = [_labelled(part, classes, single) for part in read]
    train, test = parts if len(parts) == 2 else _cut(parts[0], shown, classes)
    said = read_descriptions(root / FILE_NAME) if (root / FILE_NAME).is_file() else None
    return Dataset(one_line(root.resolve().name), classes, train, test, DEFAULT, descriptions=said)


def listed(file: Path, root: Path) -> Listed:
    """What a CSV or COCO's JSON says of pictures below a root, or beside it. Raises DataError, naming what is wrong in it."""
    return _of_csv(file, root) if file.suffix.lower() == ".csv" else _of_coco(file, root)


def _labelled(part: Listed, classes: Sequence[str], single: bool) -> Images:
    number = {name: c for c, name in enumerate(classes)}
    if single:
        labels = np.array([number[own[0]] for own in part.classes], dtype=np.int64)
        return ListedImages(part.root, part.names, labels)
    targets = np.zeros((len(part.names), len(classes)), dtype=bool)
    for row, own in enumerate(part.classes):
        targets[row, [number[name] for name in own]] = True
    return LabelSets.of(ListedImages(part.root, part.names), targets)


def _cut(images: Images, shown: str, classes: Sequence[str]) -> list[Images]:
    if isinstance(images, LabelSets):
        kept, out = held_out_sets(images, SHARE, classes)
        return [images.taken(kept), images.taken(out)]
    for label in np.flatnonzero(np.bincount(images.labels) == 1).tolist():
        raise DataError(f"class '{classes[label]}' in '{shown}': has one image, a split needs two; add some")
    return [Subset(images, rows, images.labels[rows]) for rows in held_out(images, SHARE, 0)]


def _of_csv(file: Path, root: Path) -> Listed:
    names, classes, shown = [], [], one_line(file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            require_one(rows.fieldnames or (), f"'{shown}'")
            columns = {*(rows.fieldnames or ())}
            column = next((name for name in (LABELS, LABEL) if name in columns), None)
            if FILE not in columns or column is None:
                raise DataError(f"'{shown}': no column {FILE} or {LABELS}; {first_line(rows.fieldnames or (), LABELS)}")
            for row in rows:
                where, given = f"'{shown}', line {rows.line_num}", row[column]
                require_cells(row, where)
                if given is None:
                    raise DataError(f"{where}: no cell for {column}; end it with a comma if the picture shows none")
                own = given.split(BETWEEN) if column == LABELS else [given]
                if column == LABELS:
                    own = [name for name in own if name.strip()]
                names.append(_inside(row[FILE] or "", where))
                classes.append(tuple(dict.fromkeys(_named(name, where) for name in own)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{shown}': not a CSV in UTF-8 ({one_line(str(error))}); save it as one") from None
    shows: dict[str, tuple[str, ...]] = {}
    for name, own in zip(names, classes, strict=True):
        shows[name] = tuple(dict.fromkeys((*shows.get(name, ()), *own)))
    single = column == LABEL and all(len(own) == 1 for own in shows.values())
    return _checked(Listed(_folder(file, root, names), list(shows), list(shows.values()), single), shown)


def _of_coco(file: Path, root: Path) -> Listed:
    shown = one_line(file)
    try:
        held = validated(_Coco, parsed_json(read_bytes(file, JSON_BYTES)), f"'{shown}'")
    except (ResultError, ValueError, RecursionError) as error:
        raise DataError(f"'{shown}': not annotations in COCO's form ({one_line(str(error))}); write it again") from None
    for what, ids in (("images", held.images), ("categories", held.categories)):
        if len(numbers := {one.id for one in ids}) < len(ids):
            twice = next(number for number in numbers if sum(one.id == number for one in ids) > 1)
            raise DataError(f"'{shown}': two {what} have id {twice}; give each its own")
    names = [_inside(image.file_name, f"'{shown}', image {image.id}") for image in held.images]
    categories = sorted(held.categories, key=lambda category: category.id)
    named = {category.id: _named(category.name, f"'{shown}', category {category.id}") for category in categories}
    shows: dict[int, dict[str, None]] = {image.id: {} for image in held.images}
    for i, annotation in enumerate(held.annotations):
        if annotation.image_id not in shows or annotation.category_id not in named:
            what = "image_id" if annotation.image_id not in shows else "category_id"
            raise DataError(
                f"'{shown}', annotation {i}: {what} {getattr(annotation, what)} is not in the file; correct it"
            )
        shows[annotation.image_id][named[annotation.category_id]] = None
    classes = [tuple(shows[image.id]) for image in held.images]
    return _checked(Listed(_folder(file, root, names), names, classes, False, tuple(named.values())), shown)


def _named(name: str, where: str) -> str:
    try:
        return class_name(name)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _inside(name: str, where: str) -> str:
    """The file's name, below its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{where}: file_name '{one_line(name)}'; give it relative to the folder of the pictures, and inside it"
        )
    return path.as_posix()


def _folder(file: Path, root: Path, names: Sequence[str]) -> Path:
    """Where the pictures lie that a file lists: the first place that has the first of them."""
    stem = file.stem.removeprefix("instances_")
    places = [file.parent, root / stem, root / "images" / stem, root / "images", root]
    return next((place for place in places if names and (place / names[0]).is_file()), file.parent)


def _checked(listed: Listed, shown: str) -> Listed:
    if not listed.names:
        raise DataError(f"'{shown}': lists no picture; add some")
    if len({*listed.names}) < len(listed.names):
        twice = next(name for name, times in Counter(listed.names).items() if times > 1)
        raise DataError(f"'{shown}': two images have file_name '{one_line(twice)}'; give each its own")
    if not (listed.root / listed.names[0]).is_file():
        raise DataError(
            f"'{shown}': picture '{one_line(listed.names[0])}' is not in '{one_line(listed.root)}'; copy it there"
        )
    return listed

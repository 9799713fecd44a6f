"""Folders of images: `train/<class>/*` with `test/` or `val/`, or `<class>/*` with a seeded split.

The folder's listing is all that is read beforehand. A file is opened when its image is asked for, or by `unreadable`,
which looks for damage. What becomes of odd files is in docs/hard-inputs.md.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cairn.data.decoding import check, decoded, reason
from cairn.data.descriptions import FILE_NAME, Descriptions, read_descriptions
from cairn.data.images import Checked, Dataset, Images, Subset, Unlabelled, source_of
from cairn.data.names import class_name, listed
from cairn.data.picture_files import (
    FOLDER,
    STRAY,
    PassedOver,
    endings,
    list_folder,
    no_picture,
    passed_over,
    pictures_below,
    pictures_in_tree,
)
from cairn.data.stream import held_out
from cairn.data.templates import DEFAULT
from cairn.errors import ConfigError, DataError, counted, one_line

TEST_FOLDERS = ("test", "val", "validation")
"""Where test images may lie beside `train/`; the first that exists is taken."""


class FolderImages:
    """Image files below one root, labelled by their folder. An item is a PIL image in RGB, upright.

    `folders[label]` is the class's folder and `names[i]` the file in it, both relative: a million files cost a
    million short strings. With `side`, which `reduced` sets, JPEGs are decoded at a fraction of their size.
    """

    side: int | None = None

    def __init__(self, root: Path, folders: Sequence[str], names: Sequence[str], labels: np.ndarray):
        self.root = root
        self.folders = tuple(folders)
        self.names = names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        """The image. Raises DataError that names the file if it cannot be decoded."""
        try:
            return decoded(self._file(index), self.side)
        except Exception as error:  # a decoder fed with damaged bytes may raise anything
            raise DataError(
                f"image '{one_line(self.path(index))}': cannot be read ({reason(error)}); replace or remove the file"
            ) from None

    def check(self, index: int) -> None:
        """Raises what opening the image would raise, at less cost."""
        check(self._file(index))

    def reduced(self, side: int) -> FolderImages:
        """The same images, JPEGs decoded as `decoded` does with that side."""
        same = copy(self)
        same.side = side
        return same

    def describe(self, index: int) -> str:
        """The path below the data set's root, with forward slashes and on one line: the same on every machine."""
        return one_line(self._below(index))

    def identity(self, index: int) -> bytes:
        """The path below the root, with the file's size and the time it was last written. Raises DataError if it is gone."""
        try:
            found = self.path(index).stat()
        except OSError as error:
            raise DataError(
                f"image '{one_line(self.path(index))}': {error.strerror}; replace or remove the file"
            ) from None
        return os.fsencode(f"{self._below(index)}\0{found.st_size}\0{found.st_mtime_ns}")

    def path(self, index: int) -> Path:
        return self.root / self._below(index)

    def _below(self, index: int) -> str:
        return f"{self.folders[self.labels[index]]}/{self.names[index]}"

    def _file(self, index: int) -> Path:
        """The path of what is a file: to open a named pipe would be to wait for ever."""
        path = self.path(index)
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")
        return path


def folder_dataset(path: str | os.PathLike[str], split_seed: int = 0, test_share: float = 0.2) -> Dataset:
    """The images below `path`, one class per folder, classes and files sorted by name.

    Where there are folders in `train/`, these are the classes and test images come from `test/` or `val/`. Else the folders of `path`
    are the classes, also one that is called `train`, and `test_share` of each class's images, at least one on either side,
    are set aside by `split_seed`.
    Which files are taken is in `cairn.data.picture_files`; links are followed; nothing is opened. The data set's notices say
    what was passed over.
    Raises DataError for a missing folder, no class, an empty class, a class that one side lacks, a name that is none, two
    folders of one class, and a link in place of a class that leads nowhere.
    """
    if not 0 < test_share < 1:
        raise ConfigError(f"test_share {test_share}: must be above 0 and below 1")
    root, shown = Path(os.path.expanduser(path)), one_line(path)
    if not os.path.isdir(root):  # unlike Path.is_dir, no error where one may not look
        raise DataError(
            f"data '{shown}': {_no_folder(root)}; give a folder with train/<class>/ and test/<class>/, or <class>/"
        )
    there = list_folder(root)
    parts = [name for name in ("train", *TEST_FOLDERS) if name in there.folders and _holds_classes(root / name)]
    test_folder = next((name for name in parts if name != "train"), None)
    if "train" in parts and test_folder is None:
        raise DataError(
            f"data '{shown}': has train/ but neither test/ nor val/ with a folder per class; add one, or move the classes up"
        )
    if parts and "train" not in parts:
        raise DataError(f"data '{shown}': has {parts[0]}/ but no train/; add it, or move the classes up")

    notices = []
    if test_folder is None:
        everything, classes, passed = _images(root, "", _classes(root))
        for label in np.flatnonzero(np.bincount(everything.labels) == 1):
            raise DataError(f"class '{classes[label]}' in '{shown}': has one image, a split needs two; add some")
        kept, out = held_out(everything, test_share, split_seed)
        train: Images = Subset(everything, kept, everything.labels[kept])
        test: Images = Subset(everything, out, everything.labels[out])
    else:
        trained, tested = _classes(root / "train"), _classes(root / test_folder)
        for here, other, lone in (
            (test_folder, "train", sorted(set(tested) - set(trained))),
            ("train", test_folder, sorted(set(trained) - set(tested))),
        ):
            if lone:
                raise DataError(
                    f"class '{lone[0]}' in '{one_line(root / here)}': '{other}' lacks it ({counted(len(lone), 'such class')}); "
                    f"add images to {other}/{lone[0]} or remove {here}/{lone[0]}"
                )
        train, classes, passed = _images(root, "train/", trained)
        test, _, more = _images(root, f"{test_folder}/", tested)
        passed = {**passed, **more}
        notices += _unused(there.folders, ("train", test_folder))
    file = root / FILE_NAME
    said = read_descriptions(file) if file.is_file() else None
    notices += passed_over(passed)
    name = one_line(root.resolve().name)
    return Dataset(name, classes, train, test, DEFAULT, descriptions=said, notices=tuple(notices))


def _no_folder(path: Path) -> str:
    return "is a file, not a folder" if os.path.isfile(path) else "no such folder"


def named_unreadable(images: Images, reasons: Mapping[int, str]) -> str:
    """What `unreadable` found, as a message has it: how many, the first 20 and the reason of each."""
    named = [f"{one_line(images.describe(row))} ({why})" for row, why in reasons.items()]
    return f"{counted(len(named), 'image')} that cannot be read: {listed(named, 20)}"


@dataclass(frozen=True)
class ClassFolders:
    """All images of a folder that has a folder per class, what it says of the classes, and what a user should hear of it."""

    images: FolderImages
    classes: tuple[str, ...]
    descriptions: Descriptions | None
    notices: tuple[str, ...]


def class_folders(
    path: str | os.PathLike[str], recursive: bool = False, part: Literal["train", "test"] = "train"
) -> ClassFolders:
    """All images in `path/<class>/`, or where there are folders in `train/` those in `path/train/<class>/`, for `test` those beside it
    in `test/` or `val/`, if they are there; with `recursive` those in folders inside a class too, but for linked ones. Raises
    DataError as `folder_dataset`."""
    root, shown = Path(os.path.expanduser(path)), one_line(path)
    if not os.path.isdir(root):
        raise DataError(f"pictures '{shown}': {_no_folder(root)}; give one that has a folder of pictures per class")
    there, prefix, notices = list_folder(root), "", []
    parts = [name for name in ("train", *TEST_FOLDERS) if name in there.folders and _holds_classes(root / name)]
    if "train" in parts:
        own = next((name for name in parts if name != "train"), "train") if part == "test" else "train"
        prefix = f"{own}/"
        if part == "test" and own == "train":
            notices.append(f"'{shown}' has train/ and no test/ or val/: the pictures of train/ are taken")
        notices += _unused(there.folders, parts)
    images, classes, passed = _images(root, prefix, _classes(root / prefix), recursive)
    file = root / FILE_NAME
    said = read_descriptions(file) if file.is_file() else None
    return ClassFolders(images, classes, said, (*notices, *passed_over(passed)))


def _unused(folders: Sequence[str], parts: Sequence[str]) -> list[str]:
    """A notice of folders beside those of training and test images, if there are any."""
    more = [f"{one_line(name)}/" for name in folders if name not in parts]
    return [f"not used, beside {' and '.join(f'{name}/' for name in parts)}: {listed(more)}"] if more else []


def loose_pictures(path: str | os.PathLike[str]) -> tuple[Unlabelled, tuple[str, ...]]:
    """Those of `loose_files`, as images without labels."""
    root = Path(os.path.expanduser(path))
    found, notices = loose_files(root)
    names = [file.relative_to(root).as_posix() for file in found]
    images = FolderImages(root.parent, [root.name], names, np.zeros(len(names), dtype=np.int64))
    return Unlabelled(images), notices


def loose_files(path: str | os.PathLike[str]) -> tuple[list[Path], tuple[str, ...]]:
    """Every picture in a folder and the folders in it, whatever they are called, with what a user should hear of it. Raises
    DataError for a folder without any."""
    root = Path(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise DataError(f"pictures without labels '{one_line(path)}': {_no_folder(root)}; give one that has pictures")
    found, passed = pictures_below(root)
    return found, tuple(passed_over(passed))


def _holds_classes(folder: Path) -> bool:
    """Whether a folder called train or test is a part of a data set. One with files and no folders is a class of that name."""
    there = list_folder(folder)
    return bool(there.folders) or not (there.pictures or there.others)


def _classes(folder: Path) -> dict[str, str]:
    """The folders of the classes by the classes' names, sorted. Raises DataError if there is none, or two of one class."""
    there = list_folder(folder)
    for name in there.dangling:
        if os.path.splitext(name)[1].lower() not in endings():  # a class must not go missing in silence
            raise DataError(f"link '{one_line(folder / name)}': leads nowhere; repair or remove it")
    if not there.folders:
        raise DataError(f"data '{one_line(folder)}': no class found; make one folder of images per class in it")
    found: dict[str, str] = {}
    for own in there.folders:
        name = class_name(own)
        if name in found:
            raise DataError(
                f"folders {found[name]!a} and {own!a} in '{one_line(folder)}': both are class '{name}'; put their images "
                "into one of the two"
            )
        found[name] = own
    return dict(sorted(found.items()))


def _images(
    root: Path, prefix: str, classes: Mapping[str, str], recursive: bool = False
) -> tuple[FolderImages, tuple[str, ...], PassedOver]:
    """All images of the classes in `root/prefix`, class by class; the classes' names; and what was passed over."""
    names: list[str] = []
    counts = []
    passed = {str(root / prefix): Counter({STRAY: len(list_folder(root / prefix).pictures)})}
    for name, own in classes.items():
        folder = root / prefix / own
        pictures, others = _inside(folder, prefix + own, recursive)
        if not pictures:
            raise DataError(
                f"class '{name}': no image in '{one_line(folder)}'; add some (.jpg, .png, ...) or remove the folder"
                f"{no_picture(others)}"
            )
        passed |= others
        names += pictures
        counts.append(len(pictures))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return FolderImages(root, [prefix + own for own in classes.values()], names, labels), tuple(classes), passed


def _inside(folder: Path, shown: str, recursive: bool) -> tuple[list[str], dict[str, Counter[str]]]:
    """A class's pictures, relative to its folder, and what was passed over there."""
    if recursive:
        found, passed = pictures_in_tree(folder)
        return [file.relative_to(folder).as_posix() for file in found], dict(passed)
    there = list_folder(folder)
    return there.pictures, {shown: there.others + Counter({FOLDER: len(there.folders)})}


def unreadable(images: Images, whole: bool = False) -> dict[int, str]:
    """Which images cannot be opened, in order, and why. Every file is read (see `check`; with `whole`, decoded), several at
    a time.

    To be called before a long training, so that all offenders are known at once. Looks through `Subset` and
    `Concatenation`; collections that are not `Checked` are left alone.
    """

    def damaged(start: int) -> dict[int, str]:
        found = {}
        for index in range(start, min(start + block, len(images))):
            source, position = source_of(images, index)
            if isinstance(source, Checked):
                try:
                    source.check(position)
                    if whole:
                        source[position]
                except Exception as error:  # as in FolderImages
                    found[index] = reason(error)
        return found

    block = 32  # one future per file would cost more than a small file's check
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=8) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error here, and said once
        parts = pool.map(damaged, range(0, len(images), block))
        return {index: why for part in parts for index, why in part.items()}

"""Folders of images: `train/<class>/*` with `test/` or `val/`, or `<class>/*` with a seeded split.

The folder's listing is all that is read beforehand. A file is opened when its image is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cairn.data.descriptions import FILE_NAME, read_descriptions
from cairn.data.images import Concatenation, Dataset, Images, Subset
from cairn.data.stream import held_out
from cairn.errors import ConfigError, DataError

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
"""Endings of the files that count as images, lower case; every other file is passed over."""

TEST_FOLDERS = ("test", "val", "validation")
"""Where test images may lie beside `train/`; the first that exists is taken."""

TEMPLATES = ("a photo of a {}.",)


class FolderImages:
    """Image files below one root, labelled by their folder. An item is a PIL image in RGB, upright.

    `folders[label]` is the class's folder and `names[i]` the file in it, both relative: a million files cost a
    million short strings.
    """

    def __init__(self, root: Path, folders: Sequence[str], names: Sequence[str], labels: np.ndarray):
        self.root = root
        self.folders = tuple(folders)
        self.names = names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        """The image. Raises DataError that names the file if it cannot be decoded."""
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return rgb(image)
        except Exception as error:  # a decoder fed with damaged bytes may raise anything
            raise DataError(f"image '{path}': cannot be read ({_reason(error)}); replace or remove the file") from None

    def describe(self, index: int) -> str:
        """The path below the data set's root, with forward slashes: the same on every machine."""
        return f"{self.folders[self.labels[index]]}/{self.names[index]}"

    def identity(self, index: int) -> bytes:
        """The path below the root, with the file's size and the time it was last written. Raises DataError if it is gone."""
        try:
            found = self.path(index).stat()
        except OSError as error:
            raise DataError(f"image '{self.path(index)}': {error.strerror}; replace or remove the file") from None
        return os.fsencode(f"{self.describe(index)}\0{found.st_size}\0{found.st_mtime_ns}")

    def path(self, index: int) -> Path:
        return self.root / self.folders[self.labels[index]] / self.names[index]

    def header_is_sound(self, index: int) -> bool:
        """Whether the file opens and passes Pillow's check; pixels are not decoded."""
        try:
            with Image.open(self.path(index)) as image:
                image.verify()
        except Exception:  # as above
            return False
        return True


def rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, turned as its EXIF orientation says; of an animation, the current (first) frame.

    Transparent parts lie on white, 16-bit greys keep their high byte, floats in [0, 1] become 0..255 (other floats
    and integers beyond 16 bits are stretched over their range).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255
    elif mode != "F" and low >= 0 and high <= 65535:  # older Pillow opens a 16-bit PNG in mode "I"
        scaled = values // 256
    else:
        scaled = (values - low) * (255 / max(high - low, 1e-12))
    return scaled.astype(np.uint8)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def folder_dataset(path: str | Path, split_seed: int = 0, test_share: float = 0.2) -> Dataset:
    """The images below `path`, one class per folder, classes and files sorted by name.

    With `train/`, test images come from `test/` or `val/`. Without it, the folders of `path` are the classes and
    `test_share` of each class's images, at least one on either side, are set aside by `split_seed`.
    Hidden files and files that are no images (see EXTENSIONS) are passed over; nothing is opened.
    Raises DataError for a missing folder, no class, an empty class, and a class that one side lacks.
    """
    if not 0 < test_share < 1:
        raise ConfigError(f"test_share {test_share}: must be above 0 and below 1")
    root = Path(path).expanduser()
    if not root.is_dir():
        problem = "is a file, not a folder" if root.is_file() else "no such folder"
        raise DataError(f"data '{path}': {problem}; give a folder with train/<class>/ and test/<class>/, or <class>/")
    folders = _subfolders(root)
    test_folder = next((name for name in TEST_FOLDERS if name in folders), None)
    if "train" in folders and test_folder is None:
        raise DataError(f"data '{path}': has train/ but neither test/ nor val/; add one, or move the classes up")
    if "train" not in folders and test_folder is not None:
        raise DataError(f"data '{path}': has {test_folder}/ but no train/; add it, or move the classes up")

    if test_folder is None:
        classes = folders
        _require_classes(classes, root)
        everything = _images(root, "", classes)
        for label in np.flatnonzero(np.bincount(everything.labels) == 1):
            raise DataError(f"class '{classes[label]}' in '{root}': has one image, a split needs two; add some")
        kept, out = held_out(everything, test_share, split_seed)
        train: Images = Subset(everything, kept, everything.labels[kept])
        test: Images = Subset(everything, out, everything.labels[out])
    else:
        classes = _subfolders(root / "train")
        _require_classes(classes, root / "train")
        tested = _subfolders(root / test_folder)
        for here, there, lone in (
            (test_folder, "train", sorted(set(tested) - set(classes))),
            ("train", test_folder, sorted(set(classes) - set(tested))),
        ):
            if lone:
                raise DataError(
                    f"class '{lone[0]}' in '{root / here}': '{there}' lacks it ({len(lone)} such class(es)); "
                    f"add images to {there}/{lone[0]} or remove {here}/{lone[0]}"
                )
        train, test = _images(root, "train/", classes), _images(root, f"{test_folder}/", classes)
    file = root / FILE_NAME
    said = read_descriptions(file) if file.is_file() else None
    return Dataset(root.resolve().name, tuple(classes), train, test, TEMPLATES, descriptions=said)


def unreadable(images: Images) -> list[str]:
    """Descriptions of the files whose header or checksum is damaged, in order; pixels are not decoded.

    To be called before a long training, so that all offenders are known at once. Looks through `Subset` and
    `Concatenation`; collections that hold no files are left alone.
    """

    def damaged(start: int) -> list[str]:
        found = []
        for index in range(start, min(start + block, len(images))):
            source, position = _source(images, index)
            if isinstance(source, FolderImages) and not source.header_is_sound(position):
                found.append(source.describe(position))
        return found

    block = 1000  # one future per file would cost more than the check
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [name for part in pool.map(damaged, range(0, len(images), block)) for name in part]


def _source(images: Images, index: int) -> tuple[Images, int]:
    while isinstance(images, Subset | Concatenation):
        if isinstance(images, Subset):
            images, index = images.source, int(images.indices[index])
        else:
            images, index = images._place(index)
    return images, index


def _subfolders(folder: Path) -> list[str]:
    with _scan(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _require_classes(classes: list[str], folder: Path) -> None:
    if not classes:
        raise DataError(f"data '{folder}': no class found; make one folder of images per class in it")


def _images(root: Path, prefix: str, classes: Sequence[str]) -> FolderImages:
    """All images of the classes in `root/prefix`, class by class."""
    names: list[str] = []
    counts = []
    for name in classes:
        folder = root / prefix / name
        with _scan(folder) as entries:
            # a directory entry knows its kind: no file is touched, and a broken link fails when it is opened
            found = sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and os.path.splitext(entry.name)[1].lower() in EXTENSIONS
                and not entry.is_dir()
            )
        if not found:
            raise DataError(f"class '{name}': no image in '{folder}'; add some (.jpg, .png, ...) or remove the folder")
        names += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return FolderImages(root, [prefix + name for name in classes], names, labels)


def _scan(folder: Path):
    try:
        return os.scandir(folder)
    except OSError as error:
        raise DataError(f"folder '{folder}': cannot be listed ({error.strerror}); check its permissions") from None

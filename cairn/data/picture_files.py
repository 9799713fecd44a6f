"""Which files of a folder are pictures, and which are passed over: one answer for every command.

Nothing is opened: a file counts by its ending. What it holds is found out when it is read (see `cairn.data.decoding`).
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from cairn.data.names import listed
from cairn.errors import DataError, counted, one_line

ENDINGS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
"""Lower case. Others that may be added are in OPTIONAL."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What a file may hold, whatever its ending. Pillow knows more, among them PostScript, which it has run by Ghostscript."""

OPTIONAL = {
    "AVIF": (frozenset((".avif", ".avifs")), "a Pillow with AVIF: pip install -U pillow"),
    "HEIF": (frozenset((".heic", ".heif", ".hif")), "pillow-heif: pip install pillow-heif"),
}
"""Formats that are read where the library that decodes them is installed: their endings, and what they need."""

FOLDER, LINKED_FOLDER, STRAY = "folder", "linked folder", "picture beside the class folders"
NO_ENDING = "file without an ending"

_JUNK = frozenset(("__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini"))
"""What operating systems leave in folders, lower case. Hidden files and folders (`._*`, `.ipynb_checkpoints`) are as well."""

_OWN = re.compile(r"(learner|work|run)-[0-9]{6,}\.json|events\.jsonl")
"""What every folder has that `cairn learn` or `cairn run` writes."""

PassedOver = Mapping[str, Counter[str]]
"""How many files of each kind were passed over, by the folder that they are in."""


@functools.cache
def optional_formats() -> tuple[str, ...]:
    """Those of OPTIONAL that can be read here. The first call makes pillow-heif known to Pillow."""
    found = ["AVIF"] if features.check("avif") else []
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return tuple(found)
    register_heif_opener()
    return (*found, "HEIF")


def readable_formats() -> tuple[str, ...]:
    return (*FORMATS, *optional_formats())


@functools.cache
def endings() -> frozenset[str]:
    """Endings of the files that count as pictures here, lower case."""
    return ENDINGS.union(*(OPTIONAL[name][0] for name in optional_formats()))


@dataclass
class Listing:
    """What is in a folder, by name, sorted. `dangling` are links that lead nowhere; one that ends like a picture is in
    `pictures` too, and fails when it is opened."""

    pictures: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """Files that are not taken for pictures, by kind."""


def list_folder(folder: Path) -> Listing:
    """Without what is hidden, an operating system's own or cairn's. Raises DataError for a folder that cannot be listed."""
    found, taken = Listing(), endings()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:  # an entry knows its kind: no file is touched
                if entry.name.startswith(".") or entry.name.lower() in _JUNK:
                    continue
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                if dangling:
                    found.dangling.append(entry.name)
                ending = os.path.splitext(entry.name)[1].lower()
                if not dangling and entry.is_dir():
                    if not _is_cairns_own(entry.path):
                        found.folders.append(entry.name)
                elif ending in taken:
                    found.pictures.append(entry.name)
                else:
                    found.others[one_line(ending[:16]) or NO_ENDING] += 1
    except OSError as error:
        raise DataError(
            f"folder '{one_line(folder)}': cannot be listed ({error.strerror}); check its permissions"
        ) from None
    for names in (found.pictures, found.folders, found.dangling):
        names.sort()
    return found


def _is_cairns_own(folder: str) -> bool:
    """Whether a folder without pictures holds a learner or a run, finished or not."""
    try:
        with os.scandir(folder) as entries:
            names = []
            for entry in entries:
                if os.path.splitext(entry.name)[1].lower() in endings():  # of a class mostly the first
                    return False
                names.append(entry.name)
    except OSError:
        return False  # which is said when its pictures are listed
    return any(_OWN.fullmatch(name) for name in names)


def pictures_below(folder: Path) -> tuple[list[Path], PassedOver]:
    """Those of `pictures_in_tree`. Raises DataError if there is none."""
    found, passed = pictures_in_tree(folder)
    if not found:
        raise DataError(
            f"folder '{one_line(folder)}': no picture in it (.jpg, .png, ...); give one that has some{no_picture(passed)}"
        )
    return found, passed


def pictures_in_tree(folder: Path) -> tuple[list[Path], PassedOver]:
    """Every picture in a folder and the folders in it, sorted, without following links to folders."""
    found: list[Path] = []
    passed: dict[str, Counter[str]] = {}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        listing = list_folder(here)
        found += [here / name for name in listing.pictures]
        inside = [here / name for name in listing.folders]
        linked = [path for path in inside if path.is_symlink()]
        waiting += [path for path in inside if not path.is_symlink()]
        passed[str(here)] = listing.others + Counter({LINKED_FOLDER: len(linked)})
    return sorted(found), passed


def no_picture(passed: PassedOver) -> str:
    """What is there in place of pictures, as the rest of a message; nothing for an empty folder."""
    return "".join(f"; {notice}" for notice in passed_over(passed))


def passed_over(passed: PassedOver) -> list[str]:
    """One notice of the files that were passed over: how many of which kind in each folder, and how to take them."""
    parts = []
    for folder, kinds in sorted(passed.items()):
        if counts := [_counted(kind, number) for kind, number in kinds.most_common() if number]:
            parts.append(f"{listed(counts, 5)} in '{one_line(folder)}'")
    if not parts:
        return []
    advice = _advice({kind for kinds in passed.values() for kind, number in kinds.items() if number})
    return [f"passed over: {listed(parts, 20, '; ')}{'. To take them: ' if advice else ''}{'; '.join(advice)}"]


def _counted(kind: str, number: int) -> str:
    """'3 .heic', '1 linked folder', '2 files without an ending'."""
    if kind.startswith("."):
        return f"{number} {kind}"
    noun, _, rest = (kind, "", "") if kind == LINKED_FOLDER else kind.partition(" ")
    return " ".join(filter(None, (counted(number, noun), rest)))


def _advice(kinds: set[str]) -> list[str]:
    """How files of these kinds can be taken."""
    found = []
    for name, (own, needs) in OPTIONAL.items():
        if name not in optional_formats() and own & kinds:
            found.append(f"{', '.join(sorted(own & kinds))} needs {needs}")
    if NO_ENDING in kinds:
        found.append("give a picture an ending that says what it is, such as .jpg or .png")
    if FOLDER in kinds:
        found.append(
            "move pictures in folders inside a class up into the class's own folder (learn and evaluate: --recursive)"
        )
    if LINKED_FOLDER in kinds:
        found.append("name a linked folder in the call as well")
    if STRAY in kinds:
        found.append("move a picture beside the class folders into that of its class")
    return found

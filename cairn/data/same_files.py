"""Image files of a stream that are the very same, byte for byte: test images that are learned, images of two classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cairn.data.folders import FolderImages
from cairn.data.images import Concatenation, Images, source_of
from cairn.data.stream import TaskStream
from cairn.errors import counted

ENDING = 4096
"""Bytes at the end of files of one size that tell them apart, mostly, before all of them are read."""

BLOCK = 32
"""Files that a thread takes at once: one future per file would cost more than a small file."""


def repeats(stream: TaskStream) -> list[str]:
    """What a user should hear of files that are in a stream twice: how many of the test images are learned, and how many
    training images are of two classes. Of images that are no files in a folder nothing is known."""
    trains, tests = [task.train for task in stream.tasks], stream.tests
    first = [source_of(images, 0)[0] for images in (*trains, *tests) if len(images)]
    if not any(isinstance(source, FolderImages) for source in first):
        return []
    everything, learned = Concatenation([*trains, *tests]), sum(map(len, trains))
    tested, doubtful = [], []
    for rows in same_files(everything):
        own, other = [row for row in rows if row < learned], [row for row in rows if row >= learned]
        tested += [(row, own[0]) for row in other if own]
        if len({int(everything.labels[row]) for row in own}) > 1 and not stream.label_sets:
            doubtful += [(own[0], next(row for row in own if everything.labels[row] != everything.labels[own[0]]))]
    found = []
    if tested:
        found.append(
            f"{len(tested)} of {counted(len(everything) - learned, 'test image')} are learned, byte for byte "
            f"({_pair(everything, sorted(tested))}): their figures say nothing of new images; keep each on one side"
        )
    if doubtful:
        found.append(
            f"the same file in two classes, learned as both: {counted(len(doubtful), 'image')} "
            f"({_pair(everything, doubtful)}); leave each in the class that is right"
        )
    return found


def _pair(images: Images, rows: Sequence[tuple[int, int]]) -> str:
    return f"{' is '.join(map(images.describe, rows[0]))}{', ...' if len(rows) > 1 else ''}"


def same_files(images: Images) -> list[list[int]]:
    """Rows of the same bytes, two or more each, in order of the first. Only files of equal size are opened, and only those that end
    alike are read whole. Images that are no files in a folder, and files that are gone, are the same as none."""
    rows: dict[Path, list[int]] = {}
    for row in range(len(images)):
        source, position = source_of(images, row)
        if isinstance(source, FolderImages):
            rows.setdefault(source.path(position), []).append(row)
    groups = [list(rows)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for key in (_size, _ending, _content):
            paths = [path for group in groups for path in group]
            blocks = [paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK)]
            keys = iter([one for part in pool.map(partial(_keys, key), blocks) for one in part])
            groups = [part for group in groups for part in _alike(group, [next(keys) for _ in group])]
    several = {path for group in groups for path in group}
    groups += [[path] for path, own in rows.items() if len(own) > 1 and path not in several]
    return sorted(sorted(row for path in group for row in rows[path]) for group in groups)


def _alike(paths: Sequence[Path], keys: Sequence[Hashable]) -> list[list[Path]]:
    """Those of one key, where it has several."""
    found: dict[Hashable, list[Path]] = {}
    for path, key in zip(paths, keys, strict=True):
        if key is not None:
            found.setdefault(key, []).append(path)
    return [group for group in found.values() if len(group) > 1]


def _keys(key: Callable[[Path], Hashable], paths: Sequence[Path]) -> list[Hashable]:
    """Of each file, None for one that cannot be read."""
    found: list[Hashable] = []
    for path in paths:
        try:
            found.append(key(path))
        except OSError:
            found.append(None)  # which is said when all images are looked through
    return found


def _size(path: Path) -> int:
    return path.stat().st_size


def _ending(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(ENDING, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read()


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()

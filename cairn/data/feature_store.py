"""Embeddings on disk: what a frozen tower made of an image is kept, so that the tower is asked once.

A set is one file of n images: `ids` (n, 16 bytes each), `image` (n, d) float32 and, where patches were asked for,
`patches` (n, p, d). Sets are found by the images in them, whatever order, task or limit they came in. A file is written
beside its place and renamed, so that a reader sees all of it or nothing; two writers of one set write the same.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch

from cairn.data.images import Images
from cairn.errors import CairnError, ConfigError, ResultError
from cairn.storage.files import atomic_write, make_folder
from cairn.storage.tensors import Layout, TensorFile, TensorWriter

LIMIT_BYTES = 20 * 10**9

ELSEWHERE = "set CAIRN_CACHE to another folder, or leave --cache out"

FORMAT = "cairn features 1"
"""Counts up when opened images change on their way to the tower, or the file's layout does: old sets are then passed over."""

ID_BYTES = 16
ABANDONED = 86_400
"""Seconds after which an unfinished file is nobody's."""

Kind = Literal["image", "native", "value"]
"""What was asked: embeddings alone, or those and the patches' under one attention of the last block."""

HOLDERS: dict[str, tuple[str, ...]] = {
    "image": ("image", "native", "value", "native-float16", "value-float16"),
}
"""Where the rows of a kind may lie besides its own folder: beside patches, the image's embedding is the same."""

_RANKS = ({"ids": 2, "image": 2}, {"ids": 2, "image": 2, "patches": 3})

_DTYPES = {torch.uint8, torch.float16, torch.float32}

Batch = tuple[np.ndarray, np.ndarray | None]
"""Rows of images in order: embeddings, and patches if they were asked for."""


class Damaged(CairnError):
    """A file that is not what its name promises."""


def image_ids(images: Images) -> np.ndarray:
    """16 bytes for each image, (n,) S16: a hash of its identity."""
    rows = (hashlib.blake2b(images.identity(i), digest_size=ID_BYTES).digest() for i in range(len(images)))
    return np.frombuffer(b"".join(rows), dtype=f"S{ID_BYTES}")


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """One file, mapped: pages are read when their rows are."""

    path: Path
    ids: np.ndarray
    image: np.ndarray
    patches: np.ndarray | None
    about: Mapping[str, str]

    @classmethod
    def opened(cls, path: Path, name: str) -> FeatureSet:
        """Raises Damaged unless layout, sizes and the identities' hash, the `name`, are what they must be; OSError."""
        try:
            file = TensorFile(path)
        except ResultError as error:
            raise Damaged(str(error)) from None
        layouts = {key: layout for key, (layout, _) in file.header.tensors.items()}
        shapes = [layout.shape for layout in layouts.values()]
        ranks, about = {key: len(layout.shape) for key, layout in layouts.items()}, file.header.metadata
        if about.get("format") != FORMAT or ranks not in _RANKS or len({shape[0] for shape in shapes}) > 1:
            raise Damaged(f"'{path}': {about.get('format')} of {', '.join(layouts)}, not rows of the same images")
        if any(min(shape) < 1 for shape in shapes) or {layout.dtype for layout in layouts.values()} - _DTYPES:
            raise Damaged(f"'{path}': rows of no numbers, or of another type than they are written in")
        ids = np.array(file.array("ids"))
        if ids.dtype != np.uint8 or ids.shape[1:] != (ID_BYTES,) or _name(ids) != name:
            raise Damaged(f"'{path}': other images than its name says")
        patches = file.array("patches") if "patches" in file else None
        return cls(path, ids.view(f"S{ID_BYTES}")[:, 0], file.array("image"), patches, about)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The row of each image, -1 where it is not here."""
        order = np.argsort(self.ids)
        at = order[np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)]
        return np.where(self.ids[at] == ids, at, -1)


class Rows(NamedTuple):
    """Where the rows of a collection lie: in which set, and where in it. `found` were there before."""

    sets: list[FeatureSet]
    which: np.ndarray
    where: np.ndarray
    found: int

    def image(self, indices: np.ndarray) -> np.ndarray:
        return self._taken(indices, "image")

    def patches(self, indices: np.ndarray) -> np.ndarray:
        return self._taken(indices, "patches")

    def _taken(self, indices: np.ndarray, part: str) -> np.ndarray:
        which, where = self.which[indices], self.where[indices]
        first = getattr(self.sets[which[0]], part)
        taken = np.empty((len(indices), *first.shape[1:]), first.dtype)
        for number in np.unique(which):
            here = which == number
            taken[here] = getattr(self.sets[number], part)[where[here]]
        return taken


class Listed(NamedTuple):
    """All sets of one data set, one pair of towers and one kind."""

    data: str
    towers: str
    kind: str
    rows: int
    bytes: int
    used: float
    """Seconds since the epoch."""


class FeatureStore:
    """Sets below `folder`, at most `limit` bytes of them: the least recently used go first.

    `patches` is the precision in which patches are kept, float32 or float16; the image's own embedding is float32.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = LIMIT_BYTES, patches: str = "float32"):
        if patches not in ("float32", "float16"):
            raise ConfigError(f"CAIRN_CACHE_PATCHES '{patches}': must be float32 or float16")
        self.folder, self.limit, self.patches = Path(folder), limit, patches
        self._open: dict[Path, FeatureSet] = {}

    @classmethod
    def configured(cls, environment: Mapping[str, str] = os.environ) -> FeatureStore:
        """The store that CAIRN_CACHE, CAIRN_CACHE_BYTES and CAIRN_CACHE_PATCHES describe. Raises ConfigError."""
        home = environment.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(environment.get("CAIRN_CACHE") or Path(home) / "cairn").expanduser()
        limit = environment.get("CAIRN_CACHE_BYTES") or str(LIMIT_BYTES)
        if not limit.isdecimal():
            raise ConfigError(f"CAIRN_CACHE_BYTES '{limit}': must be a whole number of bytes, such as {LIMIT_BYTES}")
        return cls(folder, int(limit), environment.get("CAIRN_CACHE_PATCHES") or "float32")

    def rows(
        self,
        maker: str,
        kind: Kind,
        ids: np.ndarray,
        computed: Callable[[np.ndarray], Iterator[Batch]],
        about: Mapping[str, str],
    ) -> Rows:
        """The rows of images `ids` as `maker` made them; those that no set holds are computed and written first.

        `maker` names the tower and its arithmetic. `computed` is given the positions in `ids` that are missing, each
        image once, and yields their batches in that order. Raises ResultError if the store cannot be written.
        """
        own = kind if kind == "image" or self.patches == "float32" else f"{kind}-{self.patches}"
        which, where = np.full(len(ids), -1), np.full(len(ids), -1)
        sets: list[FeatureSet] = []

        def fill(found: FeatureSet) -> None:
            at = found.find(ids)
            here = (which < 0) & (at >= 0)
            if here.any():
                which[here], where[here] = len(sets), at[here]
                sets.append(found)

        for name in HOLDERS.get(kind, (own,)):
            for held in self._sets(maker, name):
                if (which < 0).any():
                    fill(held)
        for used in sets:
            with suppress(OSError):  # gone by now, or a store that may only be read: the rows are mapped
                os.utime(used.path)
        missing = np.flatnonzero(which < 0)
        if len(missing):
            _, first = np.unique(ids[missing], return_index=True)
            rows = missing[np.sort(first)]
            fill(self._written(maker, own, ids[rows], computed(rows), about))
        return Rows(sets, which, where, len(ids) - len(missing))

    # files

    @property
    def _features(self) -> Path:
        return self.folder / "features"

    def _sets(self, maker: str, name: str) -> Iterator[FeatureSet]:
        """The sound sets of a folder; a damaged file is removed, so that it is made again."""
        for path in sorted((self._features / maker / name).glob(_PATTERN)):
            if path not in self._open:
                try:
                    self._open[path] = FeatureSet.opened(path, path.stem)
                except Damaged:
                    with suppress(OSError):
                        path.unlink()
                    continue
                except OSError:  # removed by another process, or not ours to read
                    continue
            yield self._open[path]

    def _written(
        self, maker: str, name: str, ids: np.ndarray, batches: Iterator[Batch], about: Mapping[str, str]
    ) -> FeatureSet:
        """A new set. One that is larger than the limit serves as long as it is open, and is kept no longer."""
        place = self._features / maker / name
        raw = ids.view("u1").reshape(-1, ID_BYTES)
        target = place / f"{_name(raw)}.safetensors"
        make_folder(place, ELSEWHERE)
        try:
            with atomic_write(target, ELSEWHERE) as temporary:
                with temporary.open("wb") as file:
                    size = _write(file, raw, batches, {**about, "kind": name, "format": FORMAT}, self.patches)
                made = FeatureSet.opened(temporary, target.stem)
                if size > self.limit:
                    raise _TooLarge(made)
                self._make_room(size)
        except _TooLarge as refused:
            return refused.made
        self._open[target] = replace(made, path=target)
        return self._open[target]

    def _make_room(self, needed: int) -> None:
        """Remove the sets that were used longest ago until `needed` bytes fit; mapped rows stay readable."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        total = needed + sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Every set. Unfinished files that nobody has written to for a day are removed."""
        for path in self._features.glob("*/*/*.part"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - ABANDONED:
                    path.unlink()
        found = []
        for path in self._features.glob(f"*/*/{_PATTERN}"):
            with suppress(OSError):
                found.append((path, path.stat()))
        return found

    # for people

    def listed(self) -> list[Listed]:
        """What the store holds, the last used first."""
        groups: dict[tuple[str, str, str], list[tuple[int, int, float]]] = {}
        for path, stat in self._files():
            try:
                held = FeatureSet.opened(path, path.stem)
                data, towers, kind = (held.about.get(part, "?") for part in ("data", "towers", "kind"))
                key = data, towers, kind
                rows = len(held.ids)
            except (Damaged, OSError):
                key, rows = ("?", "damaged", path.parent.name), 0
            groups.setdefault(key, []).append((rows, stat.st_size, stat.st_mtime))
        entries = [
            Listed(*key, sum(f[0] for f in files), sum(f[1] for f in files), max(f[2] for f in files))
            for key, files in groups.items()
        ]
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove every set, and nothing else; how many bytes that freed. A run that has one mapped goes on."""
        freed = 0
        for path, stat in self._files():
            path.unlink(missing_ok=True)
            freed += stat.st_size
        for folder in sorted(self._features.glob("*/*")) + sorted(self._features.glob("*")) + [self._features]:
            with suppress(OSError):  # not empty: another process is writing there
                folder.rmdir()
        return freed


class _TooLarge(Exception):
    """For the place that the store has."""

    def __init__(self, made: FeatureSet):
        super().__init__()
        self.made = made


_PATTERN = "[0-9a-f]" * 32 + ".safetensors"


def _name(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def _write(file: BinaryIO, ids: np.ndarray, batches: Iterable[Batch], about: Mapping[str, str], precision: str) -> int:
    """A safetensors file, batch by batch, and its bytes: what the first batch is like tells the layout."""
    writer = None
    for image, patches in batches:
        parts = {"image": image.astype("<f4", copy=False)}
        if patches is not None:
            parts["patches"] = patches.astype("<f2" if precision == "float16" else "<f4", copy=False)
        if writer is None:
            layouts = {key: Layout.of(part.dtype, (len(ids), *part.shape[1:])) for key, part in parts.items()}
            writer = TensorWriter(file, {"ids": Layout.of(ids.dtype, ids.shape), **layouts}, about)
            writer.append("ids", ids)
        for key, part in parts.items():
            writer.append(key, part)
    if writer is None:
        raise ValueError(f"no rows of {len(ids)} images")
    writer.close()
    return writer.size

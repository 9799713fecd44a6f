"""Embeddings on disk: what a frozen tower made of an image is kept, so that the tower is asked once.

A set is one file of n images: `ids` (n, 16 bytes each), `image` (n, d) float32 and, where patches were asked for,
`patches` (n, p, d). Sets are found by the images in them, whatever order, task or limit they came in. A file is written
beside its place and renamed, so that a reader sees all of it or nothing; two writers of one set write the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cairn.data.images import Images
from cairn.errors import CairnError, ConfigError
from cairn.storage.files import atomic_write, make_folder, safetensors_header

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

_DTYPES = {"U8": np.dtype("u1"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}

Batch = tuple[np.ndarray, np.ndarray | None]
"""Rows of images in order: embeddings, and patches if they were asked for."""


class Damaged(CairnError):
    """A file that is not what its name promises."""


def image_ids(images: Images) -> np.ndarray:
    """16 bytes for each image, (n,) S16: a hash of its identity."""
    rows = (hashlib.blake2b(images.identity(i), digest_size=ID_BYTES).digest() for i in range(len(images)))
    return np.frombuffer(b"".join(rows), dtype=f"S{ID_BYTES}")


def _part(entry: dict) -> tuple[np.dtype, tuple[int, ...], int, int]:
    start, stop = map(operator.index, entry["data_offsets"])
    return _DTYPES[entry["dtype"]], tuple(map(operator.index, entry["shape"])), start, stop


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
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise Damaged(f"'{path}': a header of {length} bytes in {size}")
            text = file.read(length)
        try:
            header = json.loads(text)
            about = dict(header.pop("__metadata__"))
            parts = {key: _part(entry) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"'{path}': no header of rows: {error}") from None
        end = 0
        for key, (dtype, shape, start, stop) in sorted(parts.items(), key=lambda part: part[1][2]):
            if start != end or min(shape, default=0) < 1 or stop - start != dtype.itemsize * math.prod(shape):
                raise Damaged(f"'{path}': '{key}' of shape {shape} from byte {start} to {stop}")
            end = stop
        if 8 + length + end != size or about.get("format") != FORMAT:
            raise Damaged(f"'{path}': {size} bytes of {8 + length + end}, {about.get('format')}")
        lengths = {shape[0] for _, shape, _, _ in parts.values()}
        ranks = {key: len(shape) for key, (_, shape, _, _) in parts.items()}
        if ranks not in _RANKS or len(lengths) > 1:
            raise Damaged(f"'{path}': holds {', '.join(parts)}, not rows of the same images")
        rows = {
            key: np.memmap(path, dtype, "r", 8 + length + start, shape)
            for key, (dtype, shape, start, _) in parts.items()
        }
        ids = np.array(rows["ids"])
        if ids.dtype != np.uint8 or ids.shape[1:] != (ID_BYTES,) or _name(ids) != name:
            raise Damaged(f"'{path}': other images than its name says")
        return cls(path, ids.view(f"S{ID_BYTES}")[:, 0], rows["image"], rows.get("patches"), about)

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

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES, patches: str = "float32"):
        if patches not in ("float32", "float16"):
            raise ConfigError(f"CAIRN_CACHE_PATCHES '{patches}': must be float32 or float16")
        self.folder, self.limit, self.patches = folder, limit, patches
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
                    _write(file, raw, batches, {**about, "kind": name, "format": FORMAT}, self.patches)
                    size = file.tell()
                made = FeatureSet.opened(temporary, target.stem)
                if size > self.limit:
                    raise _TooLarge
                self._make_room(size)
        except _TooLarge:
            return made
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
                key = tuple(held.about.get(part, "?") for part in ("data", "towers", "kind"))
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


_PATTERN = "[0-9a-f]" * 32 + ".safetensors"


def _name(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def _write(file, ids: np.ndarray, batches: Iterable[Batch], about: Mapping[str, str], precision: str) -> None:
    """A safetensors file, batch by batch: what the first one is like tells the layout."""
    starts: list[int] = []
    done = 0
    for image, patches in batches:
        parts = [image.astype("<f4", copy=False)]
        if patches is not None:
            parts.append(patches.astype("<f2" if precision == "float16" else "<f4", copy=False))
        if not starts:
            shapes = [ids.shape, *((len(ids), *part.shape[1:]) for part in parts)]
            starts = _begin(file, [ids.dtype, *(part.dtype for part in parts)], shapes, about)
            file.write(ids.tobytes())
        for start, part in zip(starts[1:], parts, strict=True):
            file.seek(start + done * part[0].nbytes)
            file.write(np.ascontiguousarray(part))
        done += len(image)
    if done != len(ids):
        raise ValueError(f"{done} rows of {len(ids)} images")
    file.seek(0, os.SEEK_END)


def _begin(file, dtypes: list[np.dtype], shapes: list[tuple[int, ...]], about: Mapping[str, str]) -> list[int]:
    """Write the header; where each tensor starts."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
    keys = ("ids", "image", "patches")[: len(sizes)]
    header = safetensors_header(zip(keys, (codes[dtype] for dtype in dtypes), shapes, sizes, strict=True), about)
    file.write(header)
    return [len(header) + sum(sizes[:number]) for number in range(len(sizes))]

"""Which pictures were learned, known by their content: a hash for each, from which no picture can be made."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cairn.data.images import Images
from cairn.errors import counted, one_line

BYTES = 32
"""Of a SHA-256."""

SHOWN = 5
"""Images named in a notice."""


def content_hash(item: Image.Image | np.ndarray) -> bytes:
    """SHA-256 of a decoded picture (mode, size, pixels) or of a row of numbers as float32.

    A copy, another name or time, and another file with the very same pixels give the same hash; a picture that was resized or
    compressed anew gives another.
    """
    if isinstance(item, Image.Image):
        return hashlib.sha256(f"{item.mode} {item.width}x{item.height}\0".encode() + item.tobytes()).digest()
    return hashlib.sha256(b"row\0" + np.asarray(item, dtype=np.float32).tobytes()).digest()


class Found(NamedTuple):
    """What is known of pictures that are to be learned, as rows."""

    fresh: list[int]
    """Those that were not learned as their class yet, each once."""
    repeated: list[int]
    """Those that were, and further copies of a fresh one in the same class."""
    relabelled: list[tuple[int, int]]
    """Fresh ones that were learned, or are to be learned, as another class as well: the row and that class."""

    def notices(self, images: Images, names: Sequence[str], again: bool) -> Iterator[str]:
        """What is to be said of it; `names` are those of the classes, `again` says that the repeated ones are learned."""
        if self.repeated:
            why = "already learned as the same class, or given twice"
            count = f"{len(self.repeated)} of {counted(len(images), 'image')}"
            if again:
                yield f"learned once more: {count}, {why}"
            else:
                yield f"left out: {count}, {why}; again=True, on the command line --again, learns them once more"
        if self.relabelled:
            shown = ", ".join(
                f"{one_line(images.describe(row))} as '{names[images.labels[row]]}', also learned as '{names[other]}'"
                for row, other in self.relabelled[:SHOWN]
            )
            more = ", ..." if len(self.relabelled) > SHOWN else ""
            yield (
                f"learned under a second class: {counted(len(self.relabelled), 'image')}, {shown}{more}; under the other "
                "one they stay too; if that one is wrong, relabel them"
            )


class LearnedPictures:
    """Hashes of the pictures that were learned, each with the numbers of the classes that it was learned as: one that was learned
    twice as a class has it twice."""

    def __init__(self, classes: Mapping[bytes, tuple[int, ...]] | None = None):
        self._classes = dict(classes or {})

    def __len__(self) -> int:
        """Pairs of a picture and a class, each as often as it was learned."""
        return sum(map(len, self._classes.values()))

    def compare(self, hashes: Sequence[bytes], labels: np.ndarray) -> Found:
        found, met = Found([], [], []), dict(self._classes)
        for row, (value, c) in enumerate(zip(hashes, map(int, labels), strict=True)):
            before = met.get(value, ())
            if c in before:
                found.repeated.append(row)
                continue
            found.fresh.append(row)
            found.relabelled.extend((row, other) for other in sorted({*before}))
            met[value] = (*before, c)
        return found

    def with_more(self, hashes: Sequence[bytes], labels: np.ndarray) -> LearnedPictures:
        classes = dict(self._classes)
        for value, c in zip(hashes, map(int, labels), strict=True):
            classes[value] = (*classes.get(value, ()), c)
        return LearnedPictures(classes)

    def learned_as(self, value: bytes) -> tuple[int, ...]:
        """The numbers of the classes that a picture of this hash was learned as, each as often as that was."""
        return self._classes.get(value, ())

    def number(self, c: int) -> int:
        """How many pictures are known of class number `c`, each as often as it was learned."""
        return sum(own.count(c) for own in self._classes.values())

    def of_both(self, c: int, other: int) -> list[bytes]:
        """Hashes of the pictures that were learned as class c and as class `other`."""
        return [value for value, own in self._classes.items() if {c, other} <= {*own}]

    def without_pictures(self, pairs: Collection[tuple[bytes, int]]) -> LearnedPictures:
        """Less these pictures as these classes, however often they were learned as such."""
        left = {value: tuple(c for c in own if (value, c) not in pairs) for value, own in self._classes.items()}
        return LearnedPictures({value: own for value, own in left.items() if own})

    def merged(self, c: int, other: int) -> LearnedPictures:
        """With those of class `other` as class c < other; later classes one number lower."""

        def number(k: int) -> int:
            return c if k == other else k - (k > other)

        return LearnedPictures({value: tuple(map(number, own)) for value, own in self._classes.items()})

    def without_class(self, c: int) -> LearnedPictures:
        """Less the pictures of class number `c`; later classes one number lower."""
        left = {value: tuple(k - (k > c) for k in own if k != c) for value, own in self._classes.items()}
        return LearnedPictures({value: own for value, own in left.items() if own})

    def state_dict(self) -> dict[str, Tensor]:
        """`hashes` (n, 32) of uint8 and `classes` (n,) of int64, in order of the hashes."""
        pairs = [(value, c) for value, own in sorted(self._classes.items()) for c in sorted(own)]
        hashes = np.frombuffer(b"".join(value for value, _ in pairs), dtype=np.uint8).reshape(-1, BYTES)
        return {
            "hashes": torch.from_numpy(hashes.copy()),
            "classes": torch.tensor([c for _, c in pairs], dtype=torch.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], classes: int) -> LearnedPictures:
        """Raises ValueError for a state that is none of so many classes."""
        if state.keys() != {"hashes", "classes"}:
            raise ValueError(f"holds {', '.join(state) or 'nothing'} in place of hashes and classes")
        hashes, numbers = state["hashes"], state["classes"]
        n = numbers.numel()
        if (
            hashes.dtype != torch.uint8
            or numbers.dtype != torch.int64
            or hashes.shape != (n, BYTES)
            or numbers.shape != (n,)
        ):
            raise ValueError("shapes or types are not those of hashes and their classes")
        if n and not (int(numbers.min()) >= 0 and int(numbers.max()) < classes):
            raise ValueError("a class number is out of range")
        return cls().with_more([row.tobytes() for row in hashes.numpy()], numbers.tolist())

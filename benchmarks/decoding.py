"""From a JPEG to what a tower takes: images per second and core, whole and at a fraction of the size, with Pillow and with others.

    python benchmarks/run.py --only decoding --out results/benchmarks --into docs

Drawn JPEGs, in memory, are decoded and resized to 224 x 224 on one core with one thread: by Pillow whole, as is the default; by Pillow
reduced (`decode=reduced`); and where they are installed, by simplejpeg (TurboJPEG), whole and reduced alike, and by torchvision, which
also resizes. Nothing is faster than to read all of a JPEG's bytes without making more of it than an eighth, which is the limit.

How far the others are from Pillow's whole picture is told of pixels at 224 and of embeddings by `tiny`, at its own 56, for which a
JPEG of 500 x 375 is decoded at a half; for 224 no fraction of it has twice that side, and reduced is whole.

Two threads and two processes beside one tell whether decoding holds Python's lock.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from measure import Row, in_turns, machine_line, surroundings
from PIL import Image
from predicting import on_cores
from torch import Tensor
from torch.nn.functional import normalize

from cairn.data.decoding import decoded
from cairn.data.loading import usable_cores
from cairn.storage.versions import versions
from cairn.towers.catalogue import load_towers
from cairn.towers.preprocessing import Preprocessing

SIZES = {
    "full": {"pictures": ((500, 375, 48), (4000, 3000, 4)), "to": 224, "repeats": 5},
    "quick": {"pictures": ((500, 375, 16), (4000, 3000, 2)), "to": 224, "repeats": 3},
    "tiny": {"pictures": ((300, 240, 2),), "to": 56, "repeats": 1, "processes": False},
}
PLAIN, REDUCED, LIMIT = "Pillow, whole", "Pillow, reduced", "all bytes read, an eighth made"
TARGET = 3.0
"""Least ratio asked for of pictures that are decoded at a quarter."""

Way = Callable[[bytes, int], Tensor]
"""The bytes of a JPEG and the tower's side, to what the tower takes: uint8 (3, side, side)."""


def drawn(width: int, height: int, number: int) -> list[bytes]:
    """JPEGs of soft colours, sharp edges and grain: about as large, and as long to decode, as photographs of that size."""
    rng, files = np.random.default_rng(width), []
    for _ in range(number):
        picture = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
            (width, height), Image.BICUBIC
        )
        for _ in range(30):
            left, top = (int(rng.integers(0, side * 7 // 8)) for side in (width, height))
            box = (left, top, left + max(2, width // 9), top + max(2, height // 7))
            picture.paste(tuple(rng.integers(0, 256, 3).tolist()), box)
        grainy = np.asarray(picture, dtype=np.float32) + rng.normal(0, 6, (height, width, 1)).astype(np.float32)
        file = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def whole(file: bytes, side: int) -> Tensor:
    return Preprocessing(size=side).prepare(decoded(io.BytesIO(file)))


def reduced(file: bytes, side: int) -> Tensor:
    how = Preprocessing(size=side, decode="reduced")
    return how.prepare(decoded(io.BytesIO(file), how.decoded_side))


def limit(file: bytes, side: int) -> Tensor:
    return torch.from_numpy(np.array(decoded(io.BytesIO(file), 1)))


def turbo(file: bytes, side: int, at_least: int) -> Tensor:
    """By simplejpeg, to no less than so many times the side."""
    import simplejpeg

    least = at_least * side
    return Preprocessing(size=side).prepare(
        simplejpeg.decode_jpeg(file, "RGB", min_height=least, min_width=least, fastdct=False)
    )


def torchvisions(file: bytes, side: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

    image = decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return center_crop(resize(image, [side], InterpolationMode.BICUBIC, antialias=True), [side, side])


@cache
def installed(name: str) -> bool:
    """Whether it can be imported: torchvision's wheel for CUDA cannot, beside a torch for processors."""
    try:
        import_module(name)
    except (ImportError, RuntimeError):
        return False
    return True


def ways() -> dict[str, Way]:
    """What is here, by name."""
    found: dict[str, Way] = {PLAIN: whole, REDUCED: reduced}
    if installed("simplejpeg"):
        found |= {"simplejpeg, whole": partial(turbo, at_least=0), "simplejpeg, reduced": partial(turbo, at_least=2)}
    if installed("torchvision"):
        found |= {"torchvision, whole": torchvisions}
    return found


def all_of(way: Way, files: Sequence[bytes], side: int) -> int:
    return len([way(file, side) for file in files])


def shared_out(pool: Executor, parts: int, way: Way, files: Sequence[bytes], side: int) -> int:
    """As many parts as there are workers, so that little is handed about."""
    return sum(pool.map(all_of, [way] * parts, [files[i::parts] for i in range(parts)], [side] * parts))


@contextmanager
def pools(processes: bool) -> Iterator[dict[str, Executor]]:
    """Two of either kind, which have begun."""
    with ExitStack() as held:
        found: dict[str, Executor] = {"threads": held.enter_context(ThreadPoolExecutor(2))}
        if processes:
            found["processes"] = held.enter_context(ProcessPoolExecutor(2, get_context("spawn")))
        yield found


def paces(files: Sequence[bytes], side: int, repeats: int) -> dict[str, float]:
    """Images per second of every way, and of the limit, by one thread on one core."""
    every = ways() | {LIMIT: limit}
    with on_cores(1):
        taken = in_turns({name: partial(all_of, way, files, side) for name, way in every.items()}, repeats)
    return {name: len(files) / one.seconds for name, one in taken.items()}


def side_by_side(files: Sequence[bytes], side: int, repeats: int, processes: bool) -> dict[str, dict[str, float]]:
    """How many times as many images two threads, or two processes, prepare as one thread does."""
    found = {}
    with pools(processes) as workers:
        for name, way in ((PLAIN, whole), (REDUCED, reduced)):
            calls = {"one": partial(all_of, way, files, side)}
            calls |= {kind: partial(shared_out, pool, 2, way, files, side) for kind, pool in workers.items()}
            taken = in_turns(calls, repeats)
            found[name] = {kind: taken["one"].seconds / taken[kind].seconds for kind in workers}
    return found


def agreement(files: Sequence[bytes], side: int) -> dict[str, dict[str, float]]:
    """How far every way is from Pillow's whole pictures: steps of 255, and the least cosine of embeddings by `tiny`."""
    towers = load_towers("tiny", device="cpu")
    own = towers.prepare(np.zeros((8, 8, 3), np.uint8)).shape[-1]

    def seen(way: Way) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([way(file, side) for file in files]).double()
        return pixels, normalize(towers.image(towers.pixels(torch.stack([way(file, own) for file in files]))), dim=1)

    expected, embedded = seen(whole)
    found = {}
    for name, way in ways().items():
        pixels, z = seen(way)
        off = (pixels - expected).abs()
        cosine = (z * embedded).sum(1).min().clamp_max(1)
        found[name] = {"largest": off.max().item(), "mean": off.mean().item(), "cosine": cosine.item()}
    return found


def measured(
    pictures: tuple[tuple[int, int, int], ...], to: int, repeats: int, processes: bool = True
) -> dict[str, Any]:
    found = {}
    for width, height, number in pictures:
        files = drawn(width, height, number)
        found[f"{width} x {height}"] = {
            "files": number,
            "file_bytes": sum(map(len, files)) / number,
            "images_per_second": paces(files, to, repeats),
            "agreement": agreement(files, to),
            "together": side_by_side(files, to, repeats, processes),
        }
    return {"to": to, "cores": usable_cores(), "pictures": found} | surroundings() | {"versions": _versions()}


def _versions() -> dict[str, str]:
    """With those of what decodes: they, too, decide what is measured."""
    from importlib.metadata import version

    from PIL import features

    others = {name: version(name) for name in ("simplejpeg", "torchvision") if installed(name)}
    own = {"POT": version("POT"), "Pillow": version("Pillow"), "libjpeg-turbo": str(features.version("libjpeg_turbo"))}
    return versions() | own | others


def rows(report: dict[str, Any]) -> list[Row]:
    found = []
    for size, one in report["pictures"].items():
        pace, off, large = one["images_per_second"], one["agreement"][REDUCED], size.startswith("4000")
        found.append(
            Row(
                item=f"a JPEG of {size} decoded and resized to {report['to']}, one core",
                plain=PLAIN,
                plain_amount=1 / pace[PLAIN],
                ours=REDUCED,
                amount=1 / pace[REDUCED],
                target=TARGET if large else None,
                equal=f"{_difference(off)}; {100 * pace[REDUCED] / pace[LIMIT]:.0f} % of the limit",
            )
        )
    return found


def table(report: dict[str, Any]) -> str:
    lines = [
        f"| JPEG | decoded and resized to {report['to']} by | images/s, one core | times Pillow, whole | of the limit | "
        "beside Pillow, whole: pixels, embeddings | two threads | two processes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, one in report["pictures"].items():
        pace = one["images_per_second"]
        for name, rate in pace.items():
            together = [one["together"].get(name, {}).get(kind) for kind in ("threads", "processes")]
            cells = [
                size,
                name,
                f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
                f"{rate / pace[PLAIN]:.2f}",
                f"{100 * rate / pace[LIMIT]:.0f} %",
                "" if name in (PLAIN, LIMIT) else _difference(one["agreement"][name]),
                *("" if times is None else f"x {times:.2f}" for times in together),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    used = [f"{name} {report['versions'][name]}" for name in DECODERS if name in report["versions"]]
    return "\n".join([*lines, "", machine_line(report), f"{', '.join(used)}."])


DECODERS = ("Pillow", "libjpeg-turbo", "simplejpeg", "torchvision")


def _difference(off: dict[str, float]) -> str:
    return f"at most {off['largest']:.0f} of 255, {off['mean']:.2f} on average; cosine {off['cosine']:.4f} or more"

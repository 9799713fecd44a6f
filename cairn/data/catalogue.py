"""The field's data sets on the hub: one row each.

A row states how a public copy is laid out. `verified` is True where the hub id, the splits and the columns were seen
on the copy's card or viewer (2026, stored pages: the copies themselves were not downloaded); where it is False, the
comment above the row says which part is a guess. A local copy (`KEY=PATH`) may use any of the accepted column names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from cairn.data.names import packaged, spaced

SETTING_A_TEMPLATE = "a good photo of a {}."
"""The one template of RAPF's protocol; the rows hold those of PROOF's and ENGINE's."""


# --- class names ------------------------------------------------------------------------------------------------------


def bird_name(raw: str) -> str:
    """'001.Black_footed_Albatross' -> 'Black footed Albatross'."""
    return spaced(re.sub(r"^\d+\.", "", raw))


def action_name(raw: str) -> str:
    """'ApplyEyeMakeup' -> 'Apply Eye Makeup'."""
    return spaced(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", raw))


def scene_name(raw: str) -> str:
    """'/a/apse/indoor' -> 'apse indoor'."""
    return spaced(re.sub(r"^/?[a-z]/", "", raw).replace("/", " "))


def wordnet_name(raw: str) -> str:
    """'n01443537' -> 'goldfish', by the names that ImageNet-R is published with; anything else is only spaced."""
    return _imagenet_r_names().get(raw) or spaced(raw)


@functools.cache
def _imagenet_r_names() -> dict[str, str]:
    return dict(line.split("\t") for line in packaged("imagenet-r.txt"))


def sun_names() -> tuple[str, ...]:
    """The 300 classes of SUN397 that benchmarks keep: its scenes' first names in alphabetical order, up to 'ski slope'. `church
    indoor` and `church outdoor` are one class, and so on: together 91,049 images, as many as PROOF's 72,870 and 18,179."""
    return packaged("sun300.txt")


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubRow:
    """How one public data set is read.

    `image` and `label` are accepted column names, the first found is taken. `train` splits are joined (those the copy
    has); of `test` the first found is taken. An empty `test` says that the copy has one split, cut 80/20 per class
    with seed 0; a copy that brings train and test of its own keeps them. `classes` are the accepted numbers of
    classes: all, and the part that published benchmarks keep. That part is `published` classes, the first by folder
    name, or those that `published_names` gives, each of all classes that begin with its words. `templates` are in setting B's order.
    `protocols` are the usual (base, step). `files` limits what is downloaded. `frames` names the columns of a video and of the
    frame's position in it: the middle frame of each video is kept.
    """

    key: str
    title: str
    hub_id: str
    classes: tuple[int, ...]
    templates: tuple[str, ...]
    protocols: tuple[tuple[int, int], ...]
    verified: bool
    config: str | None = None
    image: tuple[str, ...] = ("image", "img")
    label: tuple[str, ...] = ("label",)
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test", "validation", "val")
    clean: Callable[[str], str] = spaced
    files: tuple[tuple[str, str], ...] = ()
    frames: tuple[str, str] | None = None
    published: int | None = None
    published_names: Callable[[], tuple[str, ...]] | None = None
    note: str = ""


_PHOTO = (
    "photo",
    "blurry photo",
    "black and white photo",
    "low contrast photo",
    "high contrast photo",
    "bad photo",
    "good photo",
)
_CIFAR_TEMPLATES = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {photo} of {article} {{}}." for photo in _PHOTO),
        f"a photo of {article} small {{}}.",
        f"a photo of {article} big {{}}.",
    )
)
_ACTION_TEMPLATES = tuple(
    f"a {kind} of {article} person {verb}{{}}."
    for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for article in ("a", "the")
    for kind in ("photo", "video", "example", "demonstration")
)
_RENDITION_TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip
_CAR_TEMPLATES = (
    "a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.",
    "a photo of my clean {}.", "a photo of my new {}.", "a photo of my old {}.",
)  # fmt: skip

_ROWS = (
    HubRow(
        key="cifar100",
        title="CIFAR-100",
        hub_id="uoft-cs/cifar100",
        classes=(100,),
        image=("img", "image"),
        label=("fine_label", "label"),
        templates=_CIFAR_TEMPLATES,
        protocols=((0, 10), (50, 10)),
        verified=True,
    ),
    HubRow(
        key="imagenet-r",
        title="ImageNet-R",
        hub_id="axiong/imagenet-r",
        config="test",
        classes=(200,),
        # by WordNet id, so that the natural order is the field's: folders sorted by id
        label=("wnid", "label"),
        train=("test",),
        test=(),
        clean=wordnet_name,
        templates=_RENDITION_TEMPLATES,
        protocols=((0, 20), (100, 20)),
        verified=True,
        note="published as one split of 30,000 images; cut 80/20 per class here (published cuts differ)",
    ),
    HubRow(
        key="cub200",
        title="CUB-200-2011",
        hub_id="bentrevett/caltech-ucsd-birds-200-2011",
        classes=(200,),
        clean=bird_name,
        templates=("a photo of a {}, a type of bird.",),
        protocols=((0, 20), (100, 20)),
        verified=True,
    ),
    HubRow(
        key="ucf101",
        title="UCF-101",
        hub_id="flwrlabs/ucf101",
        classes=(101, 100),
        clean=action_name,
        templates=_ACTION_TEMPLATES,
        protocols=((0, 10), (50, 10)),
        frames=("clip_id", "frame"),
        published=100,
        verified=True,
        note="videos: the field classifies the middle frame. The hub copy holds every frame (2.5 million rows), of "
        "which the middle one of each clip is kept; a local copy may hold just those, one image per video. Published "
        "benchmarks keep 100 of the 101 classes: `ucf101:published`",
    ),
    # Splits were seen on the copy's viewer (3,333 rows each); its column names were not.
    HubRow(
        key="aircraft",
        title="FGVC-Aircraft",
        hub_id="Donghyun99/FGVC-Aircraft",
        classes=(100,),
        label=("variant", "label"),
        train=("train", "val", "validation"),
        test=("test",),
        templates=("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
        protocols=((0, 10), (50, 10)),
        verified=False,
        note="labels are the 100 variants; trained on train and validation together",
    ),
    HubRow(
        key="cars",
        title="Stanford Cars",
        hub_id="tanganke/stanford_cars",
        classes=(196, 100),
        templates=_CAR_TEMPLATES,
        protocols=((0, 10), (50, 10)),
        files=(("train", "data/train-*"), ("test", "data/test-*")),  # the copy also holds seven corrupted test splits
        verified=True,
        published=100,
        note="published benchmarks keep 100 of the 196 classes: `cars:published`",
    ),
    HubRow(
        key="food101",
        title="Food-101",
        hub_id="ethz/food101",
        classes=(101, 100),
        templates=("a photo of {}, a type of food.",),
        test=("validation", "test", "val"),
        protocols=((0, 10), (50, 10)),
        verified=True,
        published=100,
        note="the hub copy calls the test split 'validation'; published benchmarks keep 100 of the 101 classes: `food101:published`",
    ),
    HubRow(
        key="sun397",
        title="SUN397",
        hub_id="tanganke/sun397",
        classes=(397, 300),
        clean=scene_name,
        templates=("a photo of a {}.", "a photo of the {}."),
        protocols=((0, 30), (150, 30)),
        verified=True,
        published=300,
        published_names=sun_names,
        note="published benchmarks keep 300 classes, scenes of one name as one: `sun397:published`",
    ),
    # Hub id and licence were seen on the copy's card, which is gated; splits and columns were not.
    HubRow(
        key="objectnet",
        title="ObjectNet",
        hub_id="timm/objectnet",
        classes=(313, 200),
        train=("test",),
        test=(),
        templates=_RENDITION_TEMPLATES,
        protocols=((0, 20), (100, 20)),
        published=200,
        verified=False,
        note="its licence forbids tuning the parameters of any model on it, which class-incremental benchmarks do "
        "all the same: ask its authors before training. One split, cut 80/20 per class here; published benchmarks "
        "keep 200 of the 313 classes: `objectnet:published`",
    ),
)

CATALOGUE: dict[str, HubRow] = {row.key: row for row in _ROWS}

"""From an opened image to what an image tower takes, without torchvision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from cairn.data.decoding import picture_of
from cairn.errors import ConfigError, TowersError
from cairn.storage.schema import Record, first_problem
from cairn.towers.protocol import Towers
from cairn.types import Pixels

FILES = ("processor_config.json", "preprocessor_config.json")
"""Where transformers keeps an image processor: version 5 in the first, under `image_processor`, which then counts."""

LONGEST = 16
"""Aspect ratio past which an image is cut before it is resized."""

TWICE = 2
"""Of a reduced JPEG, pixels along a side for each that the resize makes: as many as it needs to filter by itself."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By Pillow's numbers, which the files hold."""


def _per_channel(value: Any) -> Any:
    """A number stands for all three channels."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) * 3 if isinstance(value, int | float) and not isinstance(value, bool) else value


Channels = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Means: TypeAlias = Annotated[Channels, BeforeValidator(_per_channel)]
Deviations: TypeAlias = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_per_channel)]


class Preprocessing(BaseModel):
    """Resize, crop, rescale, normalise.

    `mode` says how an image becomes a square of `size` pixels: `crop` (CLIP's) brings the shorter side to `edge` and cuts
    out the centre; `squash` brings both sides to `edge`, ignoring the aspect ratio, and cuts out the centre; `pad` brings
    the longer side to `size` and fills up what is missing with `fill`; `keep` cuts out the centre of the image as it is.
    Where there is less than is cut out, the rest is black. `edge` is `size` where it is None.

    Then, per channel, pixels = (bytes * rescale - mean) / std.

    `decode` says how JPEG files are opened before that: `whole`, or `reduced` to the smallest fraction of their size, to an eighth,
    that leaves the resize at least TWICE as many pixels along either side as it makes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mean: Channels = CLIP_MEAN
    std: Channels = CLIP_STD
    mode: Literal["crop", "squash", "pad", "keep"] = "crop"
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    edge: int | None = None
    rescale: float = 1 / 255
    fill: int = 0
    decode: Literal["whole", "reduced"] = "whole"

    def identity(self) -> str:
        """What a fingerprint covers. Later fields count where they are not neutral, so that older fingerprints hold."""
        later = ("edge", "rescale", "fill", "decode")
        return self.model_dump_json(exclude={key for key in later if getattr(self, key) == self._neutral(key)})

    def with_mode(self, mode: Literal["crop", "squash"] | None) -> Preprocessing:
        """With another way to a square than the checkpoint's; None leaves it as it is. Raises ConfigError for what is no way to."""
        if mode not in (None, "crop", "squash"):
            raise ConfigError(f"preprocess '{mode}': must be crop or squash")
        if mode in (None, self.mode):
            return self
        return self.model_copy(update={"mode": mode, "edge": None})

    def with_decoding(self, decode: Literal["whole", "reduced"]) -> Preprocessing:
        """With JPEG files decoded so. Raises ConfigError for what is no way to, and where images are not resized."""
        if decode not in ("whole", "reduced"):
            raise ConfigError(f"decode '{decode}': must be whole or reduced")
        if decode == "reduced" and self.mode == "keep":
            raise ConfigError(
                "decode 'reduced': by its checkpoint, images are cut out without being resized; leave it out, or choose how they "
                "are resized with preprocess"
            )
        return self if decode == self.decode else self.model_copy(update={"decode": decode})

    @property
    def decoded_side(self) -> int | None:
        """Pixels that a decoded JPEG has along either side, at least, unless the file has fewer; None: all that there are."""
        return None if self.decode == "whole" else TWICE * max(self.size, self.edge or 0)

    @classmethod
    def _neutral(cls, key: str) -> Any:
        return cls.model_fields[key].default

    def prepare(self, item: Any) -> Tensor:
        """uint8 (3, size, size) of what `picture_of` takes."""
        image = picture_of(item)
        if image.size != (self.size, self.size) or self.edge is not None:
            image = self._square(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _square(self, image: Image.Image) -> Image.Image:
        filter_, edge = Image.Resampling[self.resample.upper()], self.edge or self.size
        if self.mode == "squash":
            image = image.resize((edge, edge), filter_)
        elif self.mode == "pad":
            longest = max(image.size)
            width, height = (max(1, round(side * self.size / longest)) for side in image.size)
            image = image.resize((width, height), filter_)
            padded = Image.new("RGB", (self.size, self.size), (self.fill,) * 3)
            padded.paste(image, ((self.size - image.width) // 2, (self.size - image.height) // 2))
            return padded
        elif self.mode == "crop":
            image = _shortened(image)
            short = min(image.size)
            width, height = (int(edge * side / short) for side in image.size)
            image = image.resize((width, height), filter_)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def pixels(self, prepared: Tensor) -> Pixels:
        """Normalised float32 (n, 3, size, size) of a uint8 stack."""
        mean = torch.tensor(self.mean, device=prepared.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=prepared.device).view(3, 1, 1)
        return (prepared.float() / (1 / self.rescale) - mean) / std


@runtime_checkable
class Preprocesses(Protocol):
    """Towers that say how an image becomes pixels."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """None without an image tower."""
        ...


def preprocessing_of(towers: Towers) -> Preprocessing | None:
    """How an image becomes pixels; None where the towers have no image side, or do not say."""
    return towers.preprocessing if isinstance(towers, Preprocesses) else None


def asked_mode(towers: Towers) -> Literal["crop", "squash"] | None:
    """With which `preprocess` towers of that name are loaded to be these; None where the checkpoint's own way is the only one."""
    how = preprocessing_of(towers)
    return how.mode if how is not None and how.mode in ("crop", "squash") else None


def decoded_side(towers: Towers) -> int | None:
    """With how many pixels along either side, at least, JPEG files are decoded for these towers; None: whole."""
    how = preprocessing_of(towers)
    return None if how is None else how.decoded_side


def _shortened(image: Image.Image) -> Image.Image:
    """Of a thread of an image only the middle is seen: without this, 1 x 20,000 would first become 4.5 million long."""
    width, height = image.size
    longest = LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    cut = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((*cut, width - cut[0], height - cut[1]))


# What checkpoints say of it.


class _ImageProcessor(Record):
    """The fields of transformers' `CLIPImageProcessor`."""

    image_processor_type: Literal["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"] | None = None
    feature_extractor_type: Literal["CLIPFeatureExtractor"] | None = None
    do_resize: bool = True
    size: int | dict[str, int] | None = None
    default_to_square: Literal[False] = False
    resample: Annotated[int, Field(ge=0, lt=len(_FILTERS))] = 3
    do_center_crop: bool = True
    crop_size: int | dict[str, int] | None = None
    do_rescale: bool = True
    rescale_factor: Positive = 1 / 255
    do_normalize: bool = True
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD
    do_pad: Literal[False] = False
    data_format: Literal["channels_first"] = "channels_first"


_WITHOUT_EFFECT = {"do_convert_rgb", "processor_class", "auto_map", "_valid_processor_keys", "transformers_version"}
"""Images come as RGB, and no code of a checkpoint is run."""

_NEEDED = {"resample", "rescale_factor", "image_mean", "image_std"}


_ResizeMode: TypeAlias = Literal["shortest", "squash", "longest"]
_MODES: dict[_ResizeMode, Literal["crop", "squash", "pad"]] = {"shortest": "crop", "squash": "squash", "longest": "pad"}


class _PreprocessCfg(Record):
    """The fields of open_clip's `preprocess_cfg`; `size` gives way to the image tower's, as it does there."""

    size: Any = None
    mode: Literal["RGB"] = "RGB"
    mean: Means = CLIP_MEAN
    std: Deviations = CLIP_STD
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: _ResizeMode = "shortest"
    fill_color: Annotated[int, Field(ge=0, le=255)] = 0


def processor_preprocessing(folder: Path, size: int) -> Preprocessing:
    """What `processor_config.json` or `preprocessor_config.json` says, for an image tower that takes `size` x `size`;
    CLIP's own constants where there is neither.

    Raises TowersError naming the field that is not understood, or does not lead to such a square.
    """
    for name in FILES:
        path = folder / name
        if path.is_file():
            stored = _table(path)
            if name == FILES[0]:
                stored = stored.get("image_processor")
            if stored is not None:
                where = f"'{path}'"
                return _of_processor(_checked(_ImageProcessor, _without_nulls(stored), where), size, where)
    return Preprocessing(size=size)


def open_clip_preprocessing(stored: Any, size: int, where: str) -> Preprocessing:
    """What open_clip's `preprocess_cfg` says. Raises TowersError naming the field that is not understood."""
    if isinstance(stored, Mapping):
        stored = {key: value for key, value in stored.items() if value is not None}
    said = _checked(_PreprocessCfg, stored, where)
    return Preprocessing(
        size=size,
        mean=said.mean,
        std=said.std,
        fill=said.fill_color,
        mode=_MODES[said.resize_mode],
        resample="bilinear" if said.interpolation == "bilinear" else "bicubic",  # random: in training alone
    )


def _of_processor(said: _ImageProcessor, size: int, where: str) -> Preprocessing:
    def refused(field: str, why: str) -> TowersError:
        return TowersError(f"{where}: {field}: {why}; correct the file")

    mode, edge = ("crop", size) if said.size is None else _resize(said.size)
    if mode is None:
        raise refused(f"size {said.size}", "only a shortest_edge, or height and width that are equal, are understood")
    if not said.do_resize:
        mode, edge = "keep", size
    if said.do_center_crop:
        crop = size if said.crop_size is None else _side(said.crop_size)
        if crop != size:
            raise refused(f"crop_size {said.crop_size}", f"the image tower takes {size} x {size}")
    elif mode != "squash":
        raise refused(
            "do_center_crop false", f"images would not become squares, and the image tower takes {size} x {size}"
        )
    elif edge != size:
        raise refused(f"size {said.size}", f"is not cut, and the image tower takes {size} x {size}")
    return Preprocessing(
        size=size,
        mode=mode,
        edge=None if edge == size else edge,
        resample=_FILTERS[said.resample],
        rescale=said.rescale_factor if said.do_rescale else 1.0,
        mean=said.image_mean if said.do_normalize else (0.0, 0.0, 0.0),
        std=said.image_std if said.do_normalize else (1.0, 1.0, 1.0),
    )


def _resize(size: int | dict[str, int]) -> tuple[Literal["crop", "squash"] | None, int]:
    """How an image is resized, and the side; None where it is in no way that is known here."""
    if isinstance(size, int) or size.keys() == {"shortest_edge"}:
        edge = size if isinstance(size, int) else size["shortest_edge"]
        return "crop" if edge > 0 else None, edge
    edge = _side(size)
    return "squash" if edge > 0 else None, edge


def _side(size: int | dict[str, int]) -> int:
    """The side of a square, 0 for what is none."""
    if isinstance(size, int):
        return size
    return size["height"] if size.keys() == {"height", "width"} and size["height"] == size["width"] else 0


def _table(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise TowersError(f"'{path}': not JSON: {str(error).splitlines()[0]}; copy it again") from None
    if not isinstance(stored, dict):
        raise TowersError(f"'{path}': not a table; copy it again")
    return stored


def _without_nulls(stored: Any) -> Any:
    """As transformers reads null: a step is not done, another field is not said. Numbers that a step needs stay, and are
    refused."""
    if not isinstance(stored, Mapping):
        return stored
    steps = {key: False for key, value in stored.items() if value is None and key.startswith("do_")}
    said = {key: value for key, value in stored.items() if value is not None or key in _NEEDED}
    return {key: value for key, value in (said | steps).items() if key not in _WITHOUT_EFFECT}


def _checked(schema: type[Record], stored: Any, where: str) -> Any:
    if not isinstance(stored, Mapping):
        raise TowersError(f"{where}: not a table; correct the file")
    try:
        return schema.model_validate_json(json.dumps(stored))
    except ValidationError as error:
        raise TowersError(f"{where}: {first_problem(error)}; correct the file") from None

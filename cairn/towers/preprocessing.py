"""From an opened image to what an image tower takes, without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from cairn.errors import TowersError
from cairn.types import Pixels

FILES = ("preprocessor_config.json",)

LONGEST = 16
"""Aspect ratio past which an image is cut before it is resized."""

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class Preprocessing(BaseModel):
    """Resize, crop, normalise.

    `crop` is CLIP's: the shorter side to `size`, then the centre. `squash` ignores the aspect ratio (setting B of the
    field's protocol). `mean` and `std` are per channel, on values in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    mode: Literal["crop", "squash"] = "crop"
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic"] = "bicubic"

    @classmethod
    def from_folder(cls, folder: Path, size: int) -> Preprocessing:
        """What `preprocessor_config.json` says; CLIP's own constants where there is no such file."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return cls(size=size)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            mean, std = stored.get("image_mean"), stored.get("image_std")
            known = {"mean": mean, "std": std, "resample": _RESAMPLE.get(stored.get("resample", 3))}
            return cls(size=size, **{key: value for key, value in known.items() if value is not None})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TowersError(f"'{path}': not a preprocessor config: {str(error).splitlines()[0]}") from None

    def prepare(self, item: Any) -> Tensor:
        """uint8 (3, size, size) of a PIL image or a uint8 array (h, w, 3)."""
        image = item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.size != (self.size, self.size):
            image = self._resized(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _resized(self, image: Image.Image) -> Image.Image:
        filter_ = Image.Resampling[self.resample.upper()]
        if self.mode == "squash":
            return image.resize((self.size, self.size), filter_)
        width, height = image.size
        short = min(width, height)
        if max(width, height) > LONGEST * short:
            # Of a thread of an image only the middle is seen: without this, 1 x 20,000 would first become 4.5 million long
            cut = max(0, width - LONGEST * short) // 2, max(0, height - LONGEST * short) // 2
            image = image.crop((*cut, width - cut[0], height - cut[1]))
            width, height = image.size
        width, height = int(self.size * width / short), int(self.size * height / short)
        image = image.resize((width, height), filter_)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def pixels(self, prepared: Tensor) -> Pixels:
        """Normalised float32 (n, 3, size, size) of a uint8 stack."""
        mean = torch.tensor(self.mean, device=prepared.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=prepared.device).view(3, 1, 1)
        return (prepared.float() / 255 - mean) / std

"""Towers for people who hold embeddings: no image tower at all, class texts looked up by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from cairn.errors import TowersError
from cairn.types import Attention, Features, Pixels, Precision


class FeatureTowers:
    """`Towers` over precomputed embeddings. What other towers call pixels is the embedding itself, (n, d).

    `text` holds a row per name of `names`, or is None where the file has no text embeddings. `source` is the file's path.
    """

    has_images = False
    device = torch.device("cpu")
    precision: Precision = "float32"
    revision: str | None = None
    notices: tuple[str, ...] = ()
    preprocessing = text_tower = None

    def __init__(
        self,
        *,
        name: str,
        dim: int,
        logit_scale: float,
        fingerprint: str,
        names: Sequence[str],
        text: np.ndarray | None,
        source: str | None = None,
    ):
        self.name, self.dim, self.logit_scale, self.fingerprint = name, dim, logit_scale, fingerprint
        self.hidden_dim = dim
        self.has_text, self.source = text is not None, source or name
        self.passes = {"images": 0, "text_tokens": 0}
        self._row = {name: i for i, name in enumerate(names)}
        self._text = None if text is None else normalize(torch.tensor(text, dtype=torch.float32), dim=-1)

    def prepare(self, item: Any) -> Tensor:
        return torch.as_tensor(item, dtype=torch.float32)

    def pixels(self, prepared: Tensor) -> Pixels:
        return prepared

    def image(self, pixels: Pixels) -> Features:
        return pixels

    def image_and_hidden(self, pixels: Pixels) -> tuple[Features, Float[Tensor, "n w"]]:
        return pixels, pixels

    def patches(self, pixels: Pixels) -> Float[Tensor, "n p d"]:
        return self.image_and_patches(pixels)[1]

    def image_and_patches(
        self, pixels: Pixels, attention: Attention = "native"
    ) -> tuple[Features, Float[Tensor, "n p d"]]:
        raise TowersError(f"towers '{self.name}': a features file has no patches; give an image folder and --towers")

    def text(self, prompts: Sequence[str]) -> Float[Tensor, "m d"]:
        raise TowersError(f"towers '{self.name}': a features file has no text tower; give an image folder and --towers")

    def tokens(self, text: str) -> list[int]:
        return self.text([text]).long().tolist()

    def word_tokens(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ d"]]:
        return list(self.text(prompts))

    def class_texts(self, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        """The stored rows; the templates were chosen when the file was made. Raises TowersError for a class without."""
        if self._text is None:
            raise TowersError(
                f"towers '{self.name}': the features file has no text_features, which this needs; add them"
            )
        for name in names:
            if name not in self._row:
                raise TowersError(
                    f"towers '{self.name}': the features file has no text of class '{name}'; add one, or take a method that uses "
                    "no class texts"
                )
        return self._text[[self._row[name] for name in names]]

    def vision(self) -> nn.Module:
        return nn.Identity()

    def vision_and_patches(self) -> nn.Module:
        raise TowersError(f"towers '{self.name}': embeddings have no patches; take image towers")

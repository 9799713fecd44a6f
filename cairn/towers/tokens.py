"""Prompt tokens at the input of the image tower: rows of their own that stand behind the class token.

Source: Jia et al., Visual Prompt Tuning (2022), section 3.2, the shallow form.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class WithTokens(nn.Module):
    """What `embeddings` makes of an image, (n, 1 + patches, w), with the p tokens between the class token and the patches. Without
    tokens it is what it was."""

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        self.embeddings = embeddings
        self.tokens: nn.Parameter | None = None

    def forward(self, pixel_values: Tensor, **options: Any) -> Float[Tensor, "n t w"]:
        x = self.embeddings(pixel_values, **options)
        if self.tokens is None or not len(self.tokens):
            return x
        P = self.tokens.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], P, x[:, 1:]], 1)


def first_patch(vision_model: nn.Module) -> int:
    """The row at which patches begin: behind the class token and the prompt tokens."""
    embeddings = vision_model.get_submodule("embeddings")
    return 1 + (len(embeddings.tokens) if isinstance(embeddings, WithTokens) and embeddings.tokens is not None else 0)

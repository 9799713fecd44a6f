"""The shapes that cross module borders. Letters: n rows, d width, k classes, m prompts, p patches, t tasks."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Pixels: TypeAlias = Float[Tensor, "n ..."]
"""What an image tower takes: (n, 3, h, w), or (n, d) where the embeddings were computed beforehand."""

Features: TypeAlias = Float[Tensor, "n d"]
Labels: TypeAlias = Int[Tensor, " n"]
"""Class ids in order of arrival, 0..k-1."""

Scores: TypeAlias = Float[Tensor, "n k"]
"""One column per class seen; higher is likelier."""

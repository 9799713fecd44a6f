"""Cosines and scores. Letters: n rows, k classes, d width; s the scale on cosines."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize


def unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """x / |x|, row by row; a row of zeros stays zero."""
    return normalize(x, dim=-1)


def cosines(x: Float[Tensor, "n d"], t: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
    """cos(x_i, t_c) in [-1, 1]."""
    return unit(x) @ unit(t).T


class CosineScores(nn.Module):
    """s cos(x, w_c) as a module, in float32: see `cairn.maths.score_modules`."""

    matrix: Tensor

    def __init__(self, matrix: Float[Tensor, "k d"], s: float):
        super().__init__()
        self.register_buffer("matrix", s * matrix.detach().cpu().float())

    def forward(self, x: Tensor) -> Tensor:
        return unit(x) @ self.matrix.T


def representative_and_diverse(z: Float[Tensor, "n d"], representative: int, diverse: int) -> list[int]:
    """Row numbers that stand for a set: those nearest to its mean, then each time the row farthest from all chosen.

    By cosine, on unit rows: first the `representative` rows of largest cos(z_i, mean); then, `diverse` times, the row
    whose largest cosine to a chosen row is smallest. The list is a function of z alone.
    All rows, nearest first, where there are no more than are asked for.

    Source: SPA's guide images [P]; farthest-point traversal after Gonzalez 1985.
    """
    z = unit(z.double())
    near = (z @ z.mean(0)).argsort(descending=True, stable=True).tolist()
    chosen = near[:representative]
    closest = (z @ z[chosen].T).amax(1) if chosen else z @ z.mean(0)
    for _ in range(min(diverse, len(z) - len(chosen))):
        closest[chosen] = float("inf")
        chosen.append(int(closest.argmin()))
        closest = closest.maximum(z @ z[chosen[-1]])
    return chosen

"""Losses of images that show several classes, by independent binary decisions.

Letters: u scores (n x k), log-odds of "image i shows class c"; Y what is shown (n x k), 0 or 1; n_c images that show class c, N
images in all; phi(v) = 2 (1 - sigma(v))^2 softplus(-v), twice the focal loss of a positive.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus


def balanced_weights(
    Y: Float[Tensor, "n k"], counts: Float[Tensor, " k"], floor: float, slope: float, middle: float
) -> Float[Tensor, "n k"]:
    """w_ic = floor + sigma(slope (r_ic - middle)), r_ic = (1 / n_c) / sum_j (Y_ij / n_j): how often image i would be drawn for the
    sake of class c, over how often it is drawn at all. An image that shows nothing weighs floor + 1.

    Source: Wu et al., Distribution-Balanced Loss (2020), equations 3 to 5.
    """
    drawn = (Y / counts).sum(1, keepdim=True)
    r = torch.where(drawn > 0, 1 / counts / drawn.clamp(min=1e-12), torch.inf)
    return floor + (slope * (r - middle)).sigmoid()


def prior_shift(counts: Float[Tensor, " k"], images: int, strength: float, scale: float) -> Float[Tensor, " k"]:
    """nu_c = -strength log(N / n_c - 1) / scale, what a class's score is given for being rare; N / n_c - 1 is at least 1 / N.

    Source: Wu et al. (2020), equation 8.
    """
    return -strength * (images / counts - 1).clamp(min=1 / images).log() / scale


def balanced_focal(
    u: Float[Tensor, "n k"],
    Y: Float[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    shift: Float[Tensor, " k"],
    scale: float,
) -> Float[Tensor, ""]:
    """mean_ic w_ic [Y_ic phi(u'_ic) + (1 - Y_ic) phi(-scale u'_ic) / scale], u' = u + nu.

    Source: Wu et al. (2020), equation 9, in its focal form.
    """
    v = u + shift
    return (weights * (Y * _focal(v) + (1 - Y) * _focal(-scale * v) / scale)).mean()


def _focal(v: Tensor) -> Tensor:
    return 2 * (1 - v.sigmoid()).square() * softplus(-v)

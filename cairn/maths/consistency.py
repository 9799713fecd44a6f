"""Consistency of what two views of an unlabelled image give: losses on features and logits, and disturbances of features.

Source: MCCL (arXiv 2503.17914) and its published code, and UniMatch (Yang et al. 2023), on which it builds. Letters: w and s unit
rows of the weak and of the strong view, one under the other; q their class probabilities.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cairn.maths.similarity import unit

STEEPNESS = 5.0
"""Of the ramp, in the published code."""


def pseudo_labels(logits: Float[Tensor, "n k"], threshold: float) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The likeliest class of each row, and whether its probability is at least `threshold`."""
    confidence, found = logits.softmax(1).max(1)
    return found, confidence >= threshold


def trusted_cross_entropy(
    logits: Float[Tensor, "n k"], pseudo: Int[Tensor, " n"], trusted: Bool[Tensor, " n"]
) -> Float[Tensor, ""]:
    """sum over trusted rows i of -log softmax(logits_i)_{pseudo_i}, divided by the number of all rows."""
    return (cross_entropy(logits, pseudo, reduction="none") * trusted).mean()


def point_to_point(w: Float[Tensor, "n d"], s: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """1 - mean_i cos(w_i, s_i), unit rows: strong features towards the weak ones of the same place."""
    return 1 - (w * s).sum(1).mean()


def compactness(
    w: Float[Tensor, "n d"],
    s: Float[Tensor, "n d"],
    pseudo: Int[Tensor, " n"],
    trusted: Bool[Tensor, " n"],
    prototypes: Float[Tensor, "k d"],
    near: int,
    far: int,
) -> Float[Tensor, ""]:
    """1 - mean over classes c, and over strong rows j of c, of max_i cos(w_i, s_j): each towards the nearest weak row to be trusted.

    i are the `near` trusted weak rows of class c with the largest cosine with prototype c, j the `far` strong rows of class c
    (that of their weak row) with the smallest. A class without a trusted row is passed over; with none at all it is 0.

    Source: prototype-based compactness of MCCL. Its code takes the largest cosine over the strong rows for each weak one and
    divides by the number of strong ones, which makes the term nearly constant; this is what the text says.
    """
    found = []
    for c in pseudo[trusted].unique():
        own, sure = pseudo == c, (pseudo == c) & trusted
        i = (w[sure] @ prototypes[c]).topk(min(near, int(sure.sum()))).indices
        j = (s[own].detach() @ prototypes[c]).topk(min(far, int(own.sum())), largest=False).indices
        found.append((s[own][j] @ w[sure][i].T).amax(1).mean())
    return 1 - torch.stack(found).mean() if found else s.new_zeros(())


def strength(w: Float[Tensor, "n d"], s: Float[Tensor, "n d"], images: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """rho = 3 (a + 1) / 20 in [0, .3], a the mean cosine of w and s over the rows of an image: the more alike the two views are, the
    more they are disturbed. `images` numbers the image of each row."""
    cosines = (w * s).sum(1)
    sums = cosines.new_zeros(int(images.max()) + 1).index_add(0, images, cosines)
    return 3 * (sums / images.bincount())[images].add(1).clamp(0, 2) / 20


def with_noise(e: Float[Tensor, "n d"], rho: Float[Tensor, " n"], draws: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """unit(e (1 + u)), u uniform in [-rho, rho] for every entry; `draws` are uniform in [0, 1)."""
    return unit(e * (1 + rho[:, None] * (2 * draws - 1)))


def masked(
    e: Float[Tensor, "n d"], activity: Float[Tensor, "n a"], rho: Float[Tensor, " n"], draws: Float[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """unit(e) without what is most active: entries with activity >= max(activity) v are 0, v uniform in 1 - rho +- .1. `activity` has
    a number for each entry, or one for the row, of which then all or nothing is left out."""
    v = 1 - rho + 0.1 * (2 * draws - 1)
    return unit(e * (activity < activity.amax(1, keepdim=True) * v[:, None]))


def dropped(e: Float[Tensor, "n d"], share: float, draws: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """unit(e) with that share of the entries 0; `draws` are uniform in [0, 1)."""
    return unit(e * (draws >= share))


def ramp(progress: float) -> float:
    """exp(-5 (1 - t)^2)^2, t in [0, 1] the share of training that is done: e^-10 at first, 1 at the end."""
    return math.exp(-STEEPNESS * (1 - progress) ** 2) ** 2

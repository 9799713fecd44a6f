"""Average precision, by which a ranking of images for each class is judged.

For one class, with the images in falling order of score,

AP = sum_j (R_j - R_(j-1)) P_j

over the different scores: R_j is the share of the class's images, and P_j the share that they are, among those of at least the
j-th score. Source: Salton and McGill, Introduction to Modern Information Retrieval (1983), section 5.2, without interpolation,
images of one score taken together, as scikit-learn has it. mAP is the mean over classes that have an image.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def average_precision(scores: Float[Tensor, "n k"], targets: Bool[Tensor, "n k"]) -> list[float | None]:
    """AP of each class, in [0, 1]; None for one that no image shows. Scores may be any numbers but NaN."""
    if not len(scores):
        return [None] * scores.shape[1]
    found: list[float | None] = []
    for column, shows in zip(scores.double().cpu().T, targets.cpu().T, strict=True):
        order = column.argsort(descending=True)
        ranked, right = column[order], shows[order].double().cumsum(0)
        last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # of its score
        taken, hits = torch.arange(1, len(ranked) + 1, dtype=torch.float64)[last], right[last]
        gained = torch.diff(hits, prepend=hits.new_zeros(1))
        found.append(float((gained * hits / taken).sum() / hits[-1]) if hits[-1] > 0 else None)
    return found

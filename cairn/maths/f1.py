"""F1 of what is said of images that may show several classes.

Letters: n images, k classes; Y what they show and S what they are said to show, both (n, k) of bool.

    F1_c = 2 |S_c and Y_c| / (|S_c| + |Y_c|)
    macro = mean of F1_c over the classes that an image shows
    micro = 2 sum_c |S_c and Y_c| / sum_c (|S_c| + |Y_c|)

Source: van Rijsbergen, Information Retrieval (1979), chapter 7, with precision and recall of one weight; macro and micro as
scikit-learn has them.
"""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def f1_by_class(said: Bool[Tensor, "n k"], shown: Bool[Tensor, "n k"]) -> list[float | None]:
    """F1 of each class; None for one that no image shows."""
    hits, either = (said & shown).sum(0).tolist(), (said.sum(0) + shown.sum(0)).tolist()
    return [
        2 * right / both if some else None
        for right, both, some in zip(hits, either, shown.any(0).tolist(), strict=True)
    ]


def macro_f1(said: Bool[Tensor, "n k"], shown: Bool[Tensor, "n k"]) -> float | None:
    """None where no image shows any."""
    known = [value for value in f1_by_class(said, shown) if value is not None]
    return sum(known) / len(known) if known else None


def micro_f1(said: Bool[Tensor, "n k"], shown: Bool[Tensor, "n k"]) -> float | None:
    """None where nothing is said and nothing is shown."""
    both = int(said.sum() + shown.sum())
    return 2 * int((said & shown).sum()) / both if both else None

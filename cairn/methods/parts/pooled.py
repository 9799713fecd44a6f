"""Several classifiers of the same images and the weights that their scores are added up with, found on images held out.

score_c = sum_j w_j f_jc, w_j > 0: a pool of classifiers j that is linear in their logarithms. The weights minimise the
cross entropy on rows that none of them was fitted on, so a classifier that is of no use to the others gets next to none.

Source: logarithmic opinion pools (Genest and Zidek 1986), weights by held-out likelihood as in stacking (Wolpert 1992).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from cairn.types import Labels, Scores


def pooled(weights: Float[Tensor, " j"], scores: Sequence[Float[Tensor, "n k"]]) -> Scores:
    """sum_j w_j f_j."""
    return reduce(torch.add, (weight * f for weight, f in zip(weights.tolist(), scores, strict=True)))


def pool_weights(scores: Sequence[Float[Tensor, "n k"]], y: Labels) -> Float[Tensor, " j"]:
    """w = exp(v), v minimising sum_i -log softmax(sum_j w_j f_j(x_i))_{y_i} + |v - v0|^2 / 2, in float64.

    v0 gives all classifiers scores of the same spread, 1 in all; with few rows, or none, that is about what comes out.
    """
    f = torch.stack([part.double() for part in scores])
    spread = torch.stack([part.std(1).mean() if len(part) and part.shape[1] > 1 else part.new_ones(()) for part in f])
    v0 = -(spread.clamp(min=1e-12) * len(f)).log()
    if not len(y):
        return v0.exp()
    v = v0.clone().requires_grad_()
    search = torch.optim.LBFGS([v], max_iter=100, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        search.zero_grad()
        total = cross_entropy(torch.einsum("j,jnk->nk", v.exp(), f), y, reduction="sum") + ((v - v0) ** 2).sum() / 2
        total.backward()
        return total

    search.step(value)
    return v.detach().exp()


def best_pool(
    scores: Sequence[Float[Tensor, "n k"]], y: Labels, choices: Sequence[Sequence[int]]
) -> Float[Tensor, " j"]:
    """`pool_weights` of some of the classifiers, 0 for the others: of the choices the first, or a later one that tells more of the
    rows right, by more than two deviations of chance: of m rows that one of two tells right, the difference has sqrt(m) if both
    are as good. Likelihood alone does not tell: scores of a regression are no logits, and what is sure may mend their loss and
    spoil their order."""
    best = right = None
    for choice in choices:
        weights = torch.zeros(len(scores), dtype=torch.float64)
        weights[list(choice)] = pool_weights([scores[j] for j in choice], y)
        told = pooled(weights, scores).argmax(1) == y
        if right is None or int(told.sum() - right.sum()) > 2 * math.sqrt(int((told ^ right).sum())):
            best, right = weights, told
    assert best is not None
    return best

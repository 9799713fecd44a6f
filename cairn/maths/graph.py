"""A graph over classes whose texts are alike, and what travels along it.

Letters: T unit texts (k x d); A weights of the graph (k x k), rows summing to 1; F features of the classes (k x d).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import leaky_relu

from cairn.maths.similarity import unit

SLOPE = 0.2
"""Of the leaky rectifier between layers. Source: SCPNet (Ding et al. 2023)."""


def text_graph(T: Float[Tensor, "k d"], share: float, neighbours: int) -> Float[Tensor, "k k"]:
    """A = (1 - q) I + q D^-1 S, q the `share` that a class takes from its neighbours.

    S_cc' = cos(t_c - t, t_c' - t), t the mean text: as they are, texts of CLIP lie so close together that every class would be
    everybody's neighbour. S keeps the so many largest positive entries of each row and no diagonal; D are its row sums. A class
    without a neighbour keeps itself alone.
    Source: SCPNet (Ding et al. 2023) for the form; texts in place of label counts: CAPNET (2025) [P]; centred: ours [I].
    """
    k = len(T)
    eye = torch.eye(k, dtype=T.dtype, device=T.device)
    if k < 2:
        return eye
    z = unit(T - T.mean(0))
    S = (z @ z.T).fill_diagonal_(0).clamp(min=0)
    least = S.topk(min(neighbours, k - 1), dim=1).values[:, -1:] if neighbours else S.max() + 1
    S = torch.where(least <= S, S, 0)
    total = S.sum(1, keepdim=True)
    return torch.where(total > 0, (1 - share) * eye + share * S / total.clamp(min=1e-12), eye)


def propagated(
    A: Float[Tensor, "k k"], F: Float[Tensor, "k d"], weights: Sequence[Float[Tensor, "_ _"]]
) -> Float[Tensor, "k e"]:
    """H_l = lrelu(A H_(l-1) W_l) from H_0 = F, the last layer without the rectifier.

    Source: Kipf and Welling, Semi-Supervised Classification with Graph Convolutional Networks (2017), equation 2.
    """
    H = F
    for number, W in enumerate(weights, start=1):
        H = A @ H @ W
        if number < len(weights):
            H = leaky_relu(H, SLOPE)
    return H

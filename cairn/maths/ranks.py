"""How many directions a task is given: how hard it is, a mask that nests, and where a product may be cut.

Letters: R directions at most, r_1 < ... < r_q = R the ranks to choose from, h in [0, 1] how hard the task is; l, p logits and
weights of the ranks, tau temperature; S an R x R matrix of a task, sigma its singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cairn.maths.similarity import unit


def candidate_ranks(largest: int) -> Int[Tensor, " q"]:
    """1, 2, 4, ... below `largest`, and `largest`."""
    powers = [2**i for i in range(largest.bit_length()) if 2**i < largest]
    return torch.tensor([*powers, largest])


def hardness(scores: Float[Tensor, "n k"], new: Float[Tensor, "j d"], old: Float[Tensor, "i d"]) -> float:
    """h = 1/2 mean_i H(softmax(scores_i)) / log k + 1/2 novelty, in [0, 1]: how unsure the task's images are before anything is
    trained, and how far its classes are from those before.

    novelty = (1 - mean_c max_c' t_c . t_c') / (1 - mean_{a != b} t_a . t_b), at most 1: c among the `new` texts, c' among the
    `old`, a and b among all. 1 where there is no old class, 0 where there is no new one.
    Source: that the rank follows how complex a task is, FM-LoRA (2025) [P]; this measure is ours [I].
    """
    k = scores.shape[1]
    log_p = scores.double().log_softmax(1)
    unsure = -(log_p.exp() * log_p).sum(1).mean().item() / math.log(k) if k > 1 else 0.0
    return 0.5 * min(1.0, max(0.0, unsure)) + 0.5 * _novelty(new, old)


def _novelty(new: Float[Tensor, "j d"], old: Float[Tensor, "i d"]) -> float:
    if not len(new) or not len(old):
        return float(len(new) > 0)
    new, old = unit(new.double()), unit(old.double())
    every = torch.cat([old, new])
    k = len(every)
    alike = ((every @ every.T).sum() - k) / (k * (k - 1))
    gap, spread = 1 - (new @ old.T).amax(1).mean(), 1 - alike
    return (gap / spread.clamp(min=1e-12)).clamp(0, 1).item()


def rank_prior(ranks: Int[Tensor, " q"], h: float, spread: float) -> Float[Tensor, " q"]:
    """-(r_j / R - h)^2 / (2 spread^2): the logits of the ranks before anything is trained [I]."""
    return -((ranks / ranks[-1] - h) ** 2) / (2 * spread**2)


def gumbel_softmax(logits: Float[Tensor, " q"], noise: Float[Tensor, " q"], tau: float) -> Float[Tensor, " q"]:
    """softmax((l + g) / tau): nearly one of them, each as often as softmax(l) has it, and with a gradient.

    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax (2017), section 2.
    """
    return ((logits + noise) / tau).softmax(0)


def gumbel(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """-log(-log u), u uniform."""
    tiny = torch.finfo(torch.float32).tiny
    u = torch.rand(shape, generator=rng).clamp(min=tiny)
    return -torch.log((-torch.log(u)).clamp(min=tiny))


def straight_through(weights: Float[Tensor, " q"]) -> Float[Tensor, " q"]:
    """1 for the largest weight and 0 for the others, with the gradient of the weights."""
    hard = torch.zeros_like(weights).scatter(0, weights.argmax(keepdim=True), 1.0)
    return hard + weights - weights.detach()


def nested_mask(weights: Float[Tensor, " q"], ranks: Int[Tensor, " q"]) -> Float[Tensor, " R"]:
    """m_i = sum_j p_j [i <= r_j], i = 1..R: falls with i, and sums to the mean rank sum_j p_j r_j."""
    i = torch.arange(1, int(ranks[-1]) + 1, device=weights.device)
    return (weights[:, None] * (i <= ranks[:, None].to(weights.device))).sum(0)


def energy_rank(products: Sequence[Float[Tensor, "_ _"]], share: float) -> int:
    """The least r with sum_l sum_{i <= r} sigma_li^2 >= share sum_l |S_l|^2, of the products S_l of several layers; 0 if all
    are zero."""
    squares = pad_sequence([torch.linalg.svdvals(S.double()) ** 2 for S in products]).sum(1)
    if not squares.sum() > 0:
        return 0
    kept = squares.cumsum(0) / squares.sum()
    return int((kept < share - 1e-12).sum()) + 1


def cut(S: Float[Tensor, "a b"], rank: int) -> Float[Tensor, "a b"]:
    """The matrix of that rank which is nearest to S."""
    left, sigma, right = torch.linalg.svd(S.double(), full_matrices=False)
    return ((left[:, :rank] * sigma[:rank]) @ right[:rank]).to(S.dtype)

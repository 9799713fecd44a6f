"""Temperature scaling: how sure a softmax over scores should be, chosen by rows that the scores were not learned from.

Letters: s scores (n x k), y labels; m_i = max_c s_ic - mean_c s_ic, how far row i's best class stands out; q in [0, 1];
p_i = softmax(b s_i / m_i^q) probabilities, b = 1 / T the inverse temperature; B a grid of b.

    L(b) = sum_i -log p_{i, y_i}

q = 0 is one temperature for all rows. Scores of a regression and log densities stand out much more in some rows than in
others, and one temperature is then too sure of the former and not sure enough of the latter; with q > 0 a row has T m_i^q.
L is convex in b, and neither b > 0 nor q changes which class has the largest score. L on the grid is all that is needed of
rows to choose b, so rows that come in several lots are added up without being kept. Where every row is classified correctly
L falls for ever, which n rows do not justify: b goes no further than where L is that of n rows of probability (n + 1) /
(n + 2), the share to expect after n successes in n trials.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. That the temperature depends on the row is
adaptive temperature scaling (Joy et al. 2023), there learned by a network; m^q, the grid and the bound, which is Laplace's
rule of succession, are ours.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

DECADES, PER_DECADE = 4, 20
INVERSE_TEMPERATURES: Float[Tensor, " g"] = torch.logspace(
    -DECADES, DECADES, 2 * DECADES * PER_DECADE + 1, dtype=torch.float64
)
"""B: from 1e-4 to 1e4, each 12 % above the one before."""


def evened(s: Float[Tensor, "n k"], q: float) -> Float[Tensor, "n k"]:
    """(s - max_c s) / m^q of each row, in float64; 0 where all scores of a row are equal."""
    s = s.double()
    s = s - s.amax(1, keepdim=True)
    return s / (-s.mean(1, keepdim=True)).clamp_min(torch.finfo(s.dtype).tiny) ** q


def loss_curve(s: Float[Tensor, "n k"], y: Int[Tensor, " n"], q: float = 0.0) -> Float[Tensor, " g"]:
    """L on the grid, in float64. With a single class it is zero."""
    s = evened(s, q)
    whole = torch.stack([torch.logsumexp(b * s, 1).sum() for b in INVERSE_TEMPERATURES])
    return whole - INVERSE_TEMPERATURES * s.gather(1, y[:, None]).sum()


def least_loss(n: int) -> float:
    """n log((n + 2) / (n + 1)), below which L says more than n rows can."""
    return n * math.log((n + 2) / (n + 1))


def best_temperature(values: Float[Tensor, " g"], least: float = 0.0) -> float:
    """T of the smallest of these values on the grid, such as L, but for those below `least`. 1 where no T is better than
    another.

    Between the smallest value and its neighbours it is that of the parabola through the three in log b; where values fall
    below `least`, that at which they first do, linearly in log b.
    """
    if values.max() - values.min() <= 1e-12 * max(1.0, values.abs().max().item()):
        return 1.0
    i = int(values.argmin())
    b = INVERSE_TEMPERATURES[i].log()
    step = INVERSE_TEMPERATURES[1].log() - INVERSE_TEMPERATURES[0].log()
    if values[i] < least:
        i = int((values < least).nonzero()[0])
        before, here = values[max(i - 1, 0)].item(), values[i].item()
        b = INVERSE_TEMPERATURES[i].log() - (step * (least - here) / (before - here) if before > here else 0.0)
    elif 0 < i < len(values) - 1:
        before, here, after = values[i - 1 : i + 2].tolist()
        b = b + 0.5 * step * (before - after) / (before - 2 * here + after)
    return 1 / b.exp().item()


def log_probabilities(s: Float[Tensor, "n k"], temperature: float, q: float = 0.0) -> Float[Tensor, "n k"]:
    """log softmax(s / (T m^q)), in float64."""
    return torch.log_softmax(evened(s, q) / temperature, 1)

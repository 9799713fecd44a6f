"""How far stated probabilities are from what happens. No tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_EXACTLY = 500
"""Images of a bin whose distribution is computed; of more it is normal."""


def calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Expected calibration error, sum_b (n_b / n) |mean confidence of b - share of b that is correct|, in [0, 1].

    Confidence is the largest probability of an image; bin b of equal width holds those in ((b - 1) / bins, b / bins], the
    first one 0 too. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    gaps = [0.0] * bins
    for p, right in zip(confidence, correct, strict=True):
        gaps[_bin(p, bins)] += p - right
    return sum(map(abs, gaps)) / len(confidence)


def calibration_error_by_chance(confidence: Sequence[float], bins: int = 15) -> float:
    """What `calibration_error` is on average where the confidences are perfect, in [0, 1]: image i is classified correctly with
    probability p_i, the images apart from one another,

        E = 1 / n sum_b E |S_b - sum_{i in b} p_i|      S_b the number of images of bin b that are: a Poisson binomial,

    for a large bin sqrt(2 / pi sum_i p_i (1 - p_i)), as if S_b were normal. It falls as 1 / sqrt(n): an error of a few hundred
    images is mostly this.
    """
    held: list[list[float]] = [[] for _ in range(bins)]
    for p in confidence:
        held[_bin(p, bins)].append(min(1.0, p))
    return sum(map(_mean_deviation, held)) / len(confidence)


def _bin(p: float, bins: int) -> int:
    return min(bins, max(1, math.ceil(p * bins))) - 1


def _mean_deviation(p: Sequence[float]) -> float:
    """E |S - E S| of a sum S of independent 0s and 1s, which are 1 with these probabilities."""
    if len(p) > MOST_EXACTLY:
        return math.sqrt(2 / math.pi * sum(one * (1 - one) for one in p))
    chances = np.ones(1)
    for one in p:
        chances = np.convolve(chances, (1 - one, one))
    return float(chances @ np.abs(np.arange(len(chances)) - sum(p)))


def negative_log_likelihood(log_probability: Sequence[float]) -> float:
    """Mean of -log p over images, p the probability of the true class; in nats."""
    return -sum(log_probability) / len(log_probability)

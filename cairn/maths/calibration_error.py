"""How far stated probabilities are from what happens. No tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence


def calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Expected calibration error, sum_b (n_b / n) |mean confidence of b - share of b that is correct|, in [0, 1].

    Confidence is the largest probability of an image; bin b of equal width holds those in ((b - 1) / bins, b / bins], the
    first one 0 too. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    gaps = [0.0] * bins
    for p, right in zip(confidence, correct, strict=True):
        gaps[min(bins, max(1, math.ceil(p * bins))) - 1] += p - right
    return sum(map(abs, gaps)) / len(confidence)


def negative_log_likelihood(log_probability: Sequence[float]) -> float:
    """Mean of -log p over images, p the probability of the true class; in nats."""
    return -sum(log_probability) / len(log_probability)

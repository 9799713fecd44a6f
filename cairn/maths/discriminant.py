"""Linear discriminant analysis in closed form. Letters: mu_c class means (k x d), S their common covariance, n samples."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def linear_discriminant(
    means: Float[Tensor, "k d"], S: Float[Tensor, "d d"], n: float | int
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Weights and biases of D_c(x) = x . P mu_c - mu_c . P mu_c / 2 - log k, with P = d (n S + tr(S) I)^-1, in float64.

    P is an estimate of the precision that exists for n < d too. As d / n is left in it, D is the logarithm of a posterior
    with equal priors up to a factor and, where rows are compared by length, the prior has a say in how alike they are.

    Source: the estimator of Kubokawa and Srivastava 2008, J. Multivariate Analysis 99(9), as classifiers on embeddings of
    CLIP use it (Wang et al. 2024, A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation). S is the biased
    covariance (divided by n), the paper's has n - 1.
    """
    mu, S = means.double(), S.double()
    k, d = mu.shape
    P_mu = d * torch.linalg.solve(n * S + S.trace() * torch.eye(d, dtype=S.dtype), mu.T)
    return P_mu, -(mu.T * P_mu).sum(0) / 2 - math.log(k)

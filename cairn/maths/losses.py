"""Losses of the two stages, in float32. Letters: z unit images (n x d), T unit class texts (k x d), y labels, s scale."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def class_cross_entropy(
    z: Float[Tensor, "n d"], T: Float[Tensor, "k d"], y: Int[Tensor, " n"], s: float
) -> Float[Tensor, ""]:
    """CE(s z T^T, y), the loss of both stages: an image against the class texts.

    Source: both stages of DMC [P: abstract]; Radford et al., CLIP (2021), section 2.3 for the form.
    """
    return cross_entropy(s * z @ T.T, y)


def text_anchor_contrast(
    z: Float[Tensor, "n d"], T: Float[Tensor, "k d"], y: Int[Tensor, " n"], s: float
) -> Float[Tensor, ""]:
    """A class text against the *images* of the batch: mean over rows i of -log softmax_j(s t_{y_i} . z_j)_i.

    Each text stands once per image of its class, so several images of a class share its probability.
    Source: TPPT-V [K]; the even weight of a class's images is ours.
    """
    present, which = torch.unique(y, return_inverse=True)
    log_share = (s * T[present] @ z.T).log_softmax(dim=1)
    return -log_share[which, torch.arange(len(z), device=z.device)].mean()


def batch_contrast(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Each row of `a` against the rows of the batch: mean over i of -log softmax_j(a_i . b_j)_i.

    Rows of one class count as each other's negatives, as in CLIP's own training.
    Source: Radford et al., CLIP (2021), section 2.3; one half of its symmetric loss.
    """
    return cross_entropy(a @ b.T, torch.arange(len(a), device=a.device))


def supervised_contrast(h: Float[Tensor, "n d"], y: Int[Tensor, " n"], temperature: float) -> Float[Tensor, ""]:
    """Mean over rows i of -1/|P(i)| sum_{p in P(i)} log(exp(h_i . h_p / tau) / sum_{j != i} exp(h_i . h_j / tau)), P(i) the other
    rows with the label of i; over those rows that have any, 0 without one.

    Source: Khosla et al., Supervised Contrastive Learning (2020), equation 2 (the sum outside of the logarithm).
    """
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    log_share = (h @ h.T / temperature).masked_fill(itself, torch.finfo(h.dtype).min).log_softmax(1)
    alike = (y[:, None] == y) & ~itself
    positives = alike.sum(1)
    per_row = log_share.masked_fill(~alike, 0.0).sum(1) / positives.clamp(min=1)
    return -per_row.sum() / (positives > 0).sum().clamp(min=1)


def normalised_cross_entropy(
    H: Float[Tensor, "n k"], y: Int[Tensor, " n"], temperature: float, groups: Int[Tensor, " k"] | None = None
) -> Float[Tensor, ""]:
    """Mean over rows i of -log softmax(H_i / (temperature N_i))_{y_i}, so that logits cannot win by growing.

    N_i is the mean over the groups of classes (the tasks) of the length of H_i in each; with one group, or None, |H_i|.
    Source: classifier alignment of SLCA (Zhang et al. 2023) and its published code, after the logit normalisation of Wei et
    al. 2022.
    """
    if groups is None:
        groups = torch.zeros(H.shape[1], dtype=torch.int64)
    own = [H[:, groups == g].norm(dim=1, keepdim=True) for g in groups.unique()]
    return cross_entropy(H / (temperature * torch.cat(own, 1).mean(1, keepdim=True).clamp(min=1e-12)), y)


def mean_squared_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean over rows i of |a_i - b_i|^2."""
    return ((a - b) ** 2).sum(1).mean()


def mean_squared_cosine(T_new: Float[Tensor, "j d"], T_old: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    """Mean over pairs of (t_a . t_b)^2, a new, b old, unit rows: 0 where every new text is orthogonal to every old one.

    Source: the separability term of STAR-Prompt [K].
    """
    return ((T_new @ T_old.T) ** 2).mean()


def distillation(logits: Float[Tensor, "n k"], former: Float[Tensor, "n k"], temperature: float) -> Float[Tensor, ""]:
    """tau^2 mean_i KL(softmax(former_i / tau) || softmax(logits_i / tau)): what was answered formerly is to be answered still.

    Source: Li and Hoiem, Learning without Forgetting (2016); the factor tau^2 of Hinton et al. (2015), with which gradients keep
    their size whatever tau.
    """
    log_share, formerly = ((rows / temperature).log_softmax(1) for rows in (logits, former))
    return temperature**2 * kl_div(log_share, formerly, reduction="batchmean", log_target=True)

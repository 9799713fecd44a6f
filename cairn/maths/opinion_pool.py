"""A logarithmic opinion pool: several scores of the same classes joined by weights that are learned task after task.

Letters: E_e(i, c) score of class c by expert e for image i; phi_e logarithm of its weight; n_c images that class c was learned
from; theta what is taken off a class for them; psi = (phi, theta), p numbers. Probabilities are

    p(c | i) = softmax_c [sum_e exp(phi_e) E_e(i, c) - theta log n_c]

and after each task psi minimises -sum_i w_i log p(y_i | i) + (psi - psi_0)^T H (psi - psi_0) / 2 over the task's images, scored as
if they had not been learned from. Then psi_0 := psi and H := a H + J, J the Gauss-Newton matrix of the sum: a Laplace
approximation of the losses of all tasks, so that no image has to be kept. a <= 1 is for scores among fewer classes, which tell
less.

Classes of unequal counts: a mean of few images is further from everything, a regression gives a class the more the more images
it has, and both vary in how much. theta takes out what is left of this in the joined scores, by as much as images left out say.
All classes count as equally likely, whatever their counts: an image of class y weighs in proportion to 1 / n_y, and all weigh
together as many as they are worth, (sum_i 1/n_i)^2 / sum_i 1/n_i^2, n_i = n_{y_i} (Kish's effective sample size):

    w_i = 1/n_i sum_j 1/n_j / sum_j 1/n_j^2

Of classes of equal counts w = 1 and theta has no effect.

An image that is left out leaves its own class n_y - 1 images while log n_c stays as it is: with n_y - 1 the offset itself would
tell the label, as the one class that has one less. The score of its class is then too low by what one image more would add, to a
Gaussian d/2 (1/(n - 1 + kappa) - 1/(n + kappa)), and theta too high; a correction by this moved theta and accuracies little, and
not towards those of fresh images.

Sources: Genest and Zidek 1986, Combining Probability Distributions; for the recursion the online Laplace approximation
(Spiegelhalter and Lauritzen 1990); -theta log n_c is the logit adjustment of Menon et al. 2021 (Long-tail Learning via Logit
Adjustment), there by a theta chosen by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_STEPS = 100
LONGEST = 2.0
"""Of a step of psi."""

THETA, THETA_STRENGTH = 0.5, 3.0
"""Before anything is known; on shapes:dev, drawn worlds and training images kept apart it came to between .2 and 2."""


@dataclass(frozen=True)
class OpinionPool:
    """psi, H, and the sum of losses so far, those of earlier tasks weighed by their a. Immutable."""

    psi: Float[Tensor, " p"]
    H: Float[Tensor, "p p"]
    loss: float = 0.0

    @classmethod
    def starting(cls, weights: Sequence[float], strength: float, loss: float = 0.0) -> OpinionPool:
        """H = strength I around the weights, and the prior of theta."""
        phi = torch.tensor(weights, dtype=torch.float64).log()
        return cls(*_with_theta(phi, strength * torch.eye(len(phi), dtype=torch.float64)), loss)

    @property
    def weights(self) -> Float[Tensor, " e"]:
        return self.psi[:-1].exp()

    def offsets(self, counts: Int[Tensor, " k"], by_counts: bool = False) -> Float[Tensor, " k"]:
        """-theta log n_c, or (1 - theta) log n_c where classes are as likely as they have images: Bayes' rule."""
        return (self.psi[-1] - (1 if by_counts else 0)) * _rarity(counts)

    def joined(
        self, scores: Float[Tensor, "n k e"], counts: Int[Tensor, " k"], by_counts: bool = False
    ) -> Float[Tensor, "n k"]:
        """sum_e exp(phi_e) E_e with the offsets."""
        return scores @ self.weights + self.offsets(counts, by_counts)

    def fitted(
        self,
        scores: Float[Tensor, "n k e"],
        labels: Int[Tensor, " n"],
        counts: Int[Tensor, " k"],
        ageing: float = 1.0,
        counted: Bool[Tensor, " n"] | None = None,
    ) -> OpinionPool:
        """After a task whose images have these scores; `ageing` is a. To `loss` are added those of the images that are
        `counted`, all by default."""
        E = torch.cat([scores.double(), _rarity(counts)[None, :, None].expand(len(scores), -1, 1)], 2)
        E = E - E[torch.arange(len(E)), labels][:, None]
        w, H = _balancing(counts[labels]), ageing * self.H
        psi, damping = self.psi, 1e-6
        value, gradient, J = self._expanded(E, w, psi, H)
        for _ in range(MOST_STEPS):
            while True:
                step = torch.linalg.solve(H + J + damping * torch.eye(len(psi), dtype=H.dtype), gradient)
                tried = psi - step.clamp(-LONGEST, LONGEST)
                new = self._expanded(E, w, tried, H)
                if new[0] <= value or damping > 1e9:
                    break
                damping = max(10 * damping, 1e-3)
            gained = value - new[0]
            if gained < 0:
                break
            psi, (value, gradient, J), damping = tried, new, damping / 10
            if gained < 1e-10 * (1 + abs(value)):
                break
        losses = w * torch.logsumexp(E @ torch.cat([psi[:-1].exp(), psi[-1:]]), 1)
        loss = losses.sum().item() if counted is None else losses[counted].sum().item()
        return OpinionPool(psi, H + J, ageing * self.loss + loss)

    def _expanded(self, E: Tensor, w: Tensor, psi: Tensor, H: Tensor) -> tuple[float, Tensor, Tensor]:
        """The objective, its gradient, and the Gauss-Newton matrix of the losses. E, with the column of theta, is 0 where the
        label is."""
        phi, theta = psi[:-1].exp(), psi[-1:]
        logits, J = E @ torch.cat([phi, theta]), E * torch.cat([phi, torch.ones_like(theta)])
        p, gap = torch.softmax(logits, 1), psi - self.psi
        mean = torch.einsum("nk,nke->ne", p, J)
        second = torch.einsum("n,nk,nke,nkf->ef", w, p, J, J) - mean.T @ (w[:, None] * mean)
        value = w @ torch.logsumexp(logits, 1) + gap @ H @ gap / 2
        return value.item(), w @ mean + H @ gap, second

    def state_dict(self) -> dict[str, Tensor]:
        return {"psi": self.psi, "H": self.H, "loss": torch.tensor(self.loss, dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> OpinionPool:
        """Of before there was a theta too."""
        psi, H = (state["psi"], state["H"]) if "psi" in state else _with_theta(state["phi"], state["H"])
        return cls(psi, H, float(state["loss"]))


def _with_theta(phi: Float[Tensor, " e"], H: Float[Tensor, "e e"]) -> tuple[Float[Tensor, " p"], Float[Tensor, "p p"]]:
    """psi and its precision, of which theta has its prior."""
    return torch.cat([phi, phi.new_tensor([THETA])]), torch.block_diag(H, H.new_tensor([[THETA_STRENGTH]]))


def _rarity(counts: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """-log n_c; a class of which no image is left counts as one of one image."""
    return -counts.clamp(min=1).double().log()


def _balancing(n: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """w_i."""
    r = 1 / n.double()
    return r * r.sum() / r.square().sum()

"""A logarithmic opinion pool: several scores of the same classes joined by weights that are learned task after task.

Letters: E_e(i, c) score of class c by expert e for image i; phi_e logarithm of its weight. Probabilities are

    p(c | i) = softmax_c sum_e exp(phi_e) E_e(i, c)

and after each task phi minimises -sum_i log p(y_i | i) + (phi - phi_0)^T H (phi - phi_0) / 2 over the task's images, scored as if they
had not been learned from. Then phi_0 := phi and H := a H + J, J the Gauss-Newton matrix of the sum: a Laplace approximation
of the losses of all tasks, so that no image has to be kept. a <= 1 is for scores among fewer classes, which tell less.

Sources: Genest and Zidek 1986, Combining Probability Distributions; for the recursion the online Laplace approximation
(Spiegelhalter and Lauritzen 1990).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_STEPS = 100
LONGEST = 2.0
"""Of a step of phi."""


@dataclass(frozen=True)
class OpinionPool:
    """phi, H, and the sum of losses so far, those of earlier tasks weighed by their a. Immutable."""

    phi: Float[Tensor, " e"]
    H: Float[Tensor, "e e"]
    loss: float = 0.0

    @classmethod
    def starting(cls, weights: Sequence[float], strength: float, loss: float = 0.0) -> OpinionPool:
        """H = strength I around the weights."""
        phi = torch.tensor(weights, dtype=torch.float64).log()
        return cls(phi, strength * torch.eye(len(phi), dtype=torch.float64), loss)

    @property
    def weights(self) -> Float[Tensor, " e"]:
        return self.phi.exp()

    def joined(self, scores: Float[Tensor, "n k e"]) -> Float[Tensor, "n k"]:
        """sum_e exp(phi_e) E_e."""
        return scores @ self.weights

    def fitted(
        self,
        scores: Float[Tensor, "n k e"],
        labels: Int[Tensor, " n"],
        ageing: float = 1.0,
        counted: Bool[Tensor, " n"] | None = None,
    ) -> OpinionPool:
        """After a task whose images have these scores; `ageing` is a. To `loss` are added those of the images that are
        `counted`, all by default."""
        E = scores.double()
        E = E - E[torch.arange(len(E)), labels][:, None]
        H = ageing * self.H
        phi, damping = self.phi, 1e-6
        value, gradient, J = self._expanded(E, phi, H)
        for _ in range(MOST_STEPS):
            while True:
                step = torch.linalg.solve(H + J + damping * torch.eye(len(phi), dtype=H.dtype), gradient)
                tried = phi - step.clamp(-LONGEST, LONGEST)
                new = self._expanded(E, tried, H)
                if new[0] <= value or damping > 1e9:
                    break
                damping = max(10 * damping, 1e-3)
            gained = value - new[0]
            if gained < 0:
                break
            phi, (value, gradient, J), damping = tried, new, damping / 10
            if gained < 1e-10 * (1 + abs(value)):
                break
        losses = torch.logsumexp((E * phi.exp()).sum(2), 1)
        loss = losses.sum().item() if counted is None else losses[counted].sum().item()
        return OpinionPool(phi, H + J, ageing * self.loss + loss)

    def _expanded(self, E: Tensor, phi: Tensor, H: Tensor) -> tuple[float, Tensor, Tensor]:
        """The objective, its gradient, and the Gauss-Newton matrix of the losses. E is 0 where the label is."""
        J = E * phi.exp()
        logits = J.sum(2)
        p, gap = torch.softmax(logits, 1), phi - self.phi
        mean = torch.einsum("nk,nke->ne", p, J)
        second = torch.einsum("nk,nke,nkf->ef", p, J, J) - mean.T @ mean
        value = torch.logsumexp(logits, 1).sum() + gap @ H @ gap / 2
        return value.item(), mean.sum(0) + H @ gap, second

    def state_dict(self) -> dict[str, Tensor]:
        return {"phi": self.phi, "H": self.H, "loss": torch.tensor(self.loss, dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> OpinionPool:
        return cls(state["phi"], state["H"], float(state["loss"]))

"""Embeddings of single images, a few per class: those whose mean stays nearest to that of the class."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cairn.maths.rows import without
from cairn.types import Features, Labels


class Exemplars:
    """Rows of single images, class by class. Immutable: `add` and `without` return others."""

    def __init__(self, rows: Float[Tensor, "m d"], sizes: Int[Tensor, " k"]):
        self.rows, self.sizes = rows, sizes

    @classmethod
    def empty(cls, dim: int) -> Exemplars:
        return cls(torch.zeros(0, dim), torch.zeros(0, dtype=torch.int64))

    @property
    def labels(self) -> Labels:
        """The class of each row."""
        return torch.arange(len(self.sizes)).repeat_interleave(self.sizes)

    @property
    def bytes(self) -> int:
        return self.rows.nbytes + self.sizes.nbytes

    def add(self, rows: Features, labels: Labels, means: Float[Tensor, "k d"], per_class: int) -> Exemplars:
        """With `per_class` rows of each class among `labels`, herded towards its mean out of those held and the new ones."""
        held = list(self.rows.split(self.sizes.tolist())) + [rows[:0]] * (len(means) - len(self.sizes))
        for c in labels.unique().tolist():
            choice = torch.cat([held[c], rows[labels == c]])
            held[c] = choice[herded(choice, means[c], per_class)]
        return Exemplars(torch.cat(held), torch.tensor([len(own) for own in held], dtype=torch.int64))

    def without(self, c: int) -> Exemplars:
        kept = self.labels != c
        return Exemplars(self.rows[kept], without(self.sizes, c))

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "sizes": self.sizes}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Exemplars:
        return cls(state["rows"], state["sizes"])


def herded(rows: Float[Tensor, "n d"], mean: Float[Tensor, " d"], number: int) -> list[int]:
    """Numbers of the rows chosen one after the other, each so that the mean of those chosen is nearest to `mean`.

    i_m = argmin_i |mean - (sum_{j<m} rows_{i_j} + rows_i) / m|, without repetition; all rows where there are no more.
    Source: Rebuffi et al., iCaRL (2017), algorithm 4.
    """
    rows, mean = rows.double(), mean.double()
    chosen: list[int] = []
    total, free = torch.zeros_like(mean), torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for m in range(1, min(number, len(rows)) + 1):
        chosen.append(int(((mean - (total + rows) / m).norm(dim=1) + free).argmin()))
        total, free[chosen[-1]] = total + rows[chosen[-1]], float("inf")
    return chosen

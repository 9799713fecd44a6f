"""Linear layers with a delta between bases that all tasks share: W + U C V, C one small matrix whatever the number of tasks.

Source: FM-LoRA (2025), arXiv 2504.08823, for low-rank bases shared by all tasks and small matrices of each task between them
[P]; that C is the sum over the tasks is our reading of "no growth" [I].

Letters: W weight (o x i); U (o x R) and V (R x i) bases, orthonormal at first; C (R x R) the finished tasks; M (R x r), N (r x R)
those of the task that is being learned, m in [0, 1]^r how far each of its directions is open.
"""

from __future__ import annotations

import copy
import re

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cairn.errors import ConfigError


class Factored(nn.Module):
    """x -> x (W + U (C + M diag(m) N) V)^T + b. Between tasks there is no M and no N, and the delta is part of the weight."""

    def __init__(self, base: nn.Linear, size: int, rng: torch.Generator):
        super().__init__()
        o, i = base.weight.shape
        size = min(size, o, i)
        self.base = base
        self.U = nn.Parameter(_orthonormal(o, size, rng).to(base.weight))
        self.V = nn.Parameter(_orthonormal(i, size, rng).T.contiguous().to(base.weight))
        self.C = nn.Buffer(torch.zeros(size, size, device=base.weight.device))
        self.M: nn.Parameter | None = None
        self.N: nn.Parameter | None = None
        self.mask: Tensor | None = None
        self._kept: Tensor | None = None

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        y = self.base(x)
        return y if self._kept is not None else y + x @ self.V.T @ self._between().T @ self.U.T

    def _between(self) -> Float[Tensor, "R R"]:
        """C + M diag(m) N."""
        if self.M is None or self.N is None:
            return self.C
        return self.C + (self.M if self.mask is None else self.M * self.mask[: self.M.shape[1]]) @ self.N

    @torch.no_grad()
    def delta(self) -> Float[Tensor, "o i"]:
        """U C V of the finished tasks."""
        return self.U @ self.C @ self.V

    def open(self, rank: int, rng: torch.Generator) -> list[nn.Parameter]:
        """M and N of a new task, of `rank` directions at most: M Kaiming-uniform, N zero, so that the delta is as it was."""
        self.unmerge()
        size = len(self.C)
        rank, bound = min(rank, size), size**-0.5  # kaiming_uniform with a = sqrt(5)
        values = torch.rand(size, rank, generator=rng) * 2 * bound - bound
        self.M = nn.Parameter(values.to(self.C))
        self.N = nn.Parameter(torch.zeros(rank, size, device=self.C.device))
        return [self.M, self.N]

    @torch.no_grad()
    def product(self, rank: int | None = None) -> Float[Tensor, "R R"]:
        """M N of the first `rank` directions; of all without."""
        if self.M is None or self.N is None:
            return torch.zeros_like(self.C)
        return self.M[:, :rank] @ self.N[:rank]

    def close(self, product: Float[Tensor, "R R"]) -> None:
        """The task is finished: C + product, and no M and N any more."""
        self.C.add_(product)
        self.M = self.N = self.mask = None
        self.merge()

    def merge(self) -> None:
        """The delta becomes part of the weight."""
        self.unmerge()
        self._kept = self.base.weight.data
        self.base.weight.data = self._kept + self.delta()

    def unmerge(self) -> None:
        """The weight is what it was, to the bit."""
        if self._kept is not None:
            self.base.weight.data, self._kept = self._kept, None

    def factors(self) -> dict[str, Tensor]:
        """A copy of what was learned."""
        return {name: getattr(self, name).detach().cpu().clone() for name in ("U", "V", "C")}

    def restore(self, factors: dict[str, Tensor]) -> None:
        """Raises ConfigError for factors of a layer of another size."""
        for name, value in factors.items():
            own = getattr(self, name)
            if own.shape != value.shape:
                raise ConfigError(f"{name} of a factored layer: {tuple(value.shape)}, not {tuple(own.shape)}")
            own.data.copy_(value)
        self.merge()


def _orthonormal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """Q of the QR decomposition of a Gaussian matrix."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=rng)).Q


def inject(tower: nn.Module, targets: str, size: int, rng: torch.Generator) -> list[Factored]:
    """A `Factored` in place of every linear layer whose name matches the regex, in their order; nothing else can be trained.
    Raises ConfigError if nothing matches."""
    linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if re.fullmatch(targets, name)]
    if not chosen:
        raise ConfigError(f"tuning targets '{targets}': no layer matches; linear layers are named like {linear[0]}")
    tower.requires_grad_(False)
    found = []
    for name in chosen:
        parent, _, own = name.rpartition(".")
        base = tower.get_submodule(name)
        assert isinstance(base, nn.Linear)
        found.append(Factored(base, size, rng))
        setattr(tower.get_submodule(parent), own, found[-1])
    return found


def plain(tower: nn.Module) -> nn.Module:
    """A copy in which every `Factored` is a linear layer with the delta in its weight."""
    twin = copy.deepcopy(tower)
    for name, module in [*twin.named_modules()]:
        if isinstance(module, Factored):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, module.base)
    return twin

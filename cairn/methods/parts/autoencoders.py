"""A variational autoencoder for each class, trained side by side; the decoder is what remains.

Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014), section 3, for the bound and its estimator; one autoencoder
per class on frozen embeddings is CGIL's [P], sizes, standardising and the trained variance are ours [I].

Letters: x row of width d, u latent of width l, q(u|x) = N(p, diag(r^2)); x ~ N(g(u), diag(v)), g with one hidden layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cairn.maths.similarity import unit
from cairn.memory.gaussians import LONE_VARIANCE
from cairn.memory.generators import Decoders, GeneratorMemory
from cairn.settings import Settings
from cairn.training.context import Context
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels


class Vae(Settings):
    """A variational autoencoder per class [P]; its decoder is kept."""

    kind: Literal["vae"] = "vae"
    latent: int = Field(default=16, ge=1, description="l, width of the latent [I]")
    hidden: int = Field(default=64, ge=1, description="hidden units of encoder and decoder [I]")
    steps: int = Field(default=300, ge=1, description="steps of training, all classes of a task at once [I]")
    batch: int = Field(default=32, ge=1, description="rows of each class and step [I]")
    lr: float = Field(default=1e-2, gt=0, description="peak learning rate, Adam [I]")

    def memory(self, dim: int) -> GeneratorMemory:
        """A memory that holds no class yet."""
        return GeneratorMemory.empty(self.latent, self.hidden, dim)

    def learned(self, memory: Any, x: Features, y: Labels, device: torch.device, ctx: Context) -> GeneratorMemory:
        """`memory` with these rows learned."""

        def train(rows: list[Float[Tensor, "_ d"]]) -> Decoders:
            return trained(self, [unit(own) for own in rows], device, ctx)

        return memory.add(x, y, train, ctx.seeds.generator("returned"))


def negative_elbo(
    weights: Sequence[Tensor], x: Float[Tensor, "k n d"], noise: Float[Tensor, "k n l"]
) -> Float[Tensor, "k n"]:
    """For every row, -log N(x; g(u), diag(v)) + KL(q(u|x), N(0, I)) with u = p + r noise, up to a constant.

    1/2 sum_d ((x - g(u))^2 / v + log v) + 1/2 sum_l (p^2 + r^2 - 1 - log r^2);
    (p, log r^2) = relu(x E + e) F + f,  g(u) = relu(u A + a) B + b, log v the last of `weights` = (E, e, F, f, A, a, B, b, log v).
    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014), section 3; a trained variance per dimension is ours.
    """
    E, e, F, f, A, a, B, b, log_v = weights
    p, log_r2 = ((x @ E + e).relu() @ F + f).chunk(2, dim=-1)
    u = p + torch.exp(0.5 * log_r2) * noise
    miss = x - (u @ A + a).relu() @ B - b
    likelihood = 0.5 * (miss**2 * torch.exp(-log_v) + log_v).sum(-1)
    return likelihood + 0.5 * (p**2 + log_r2.exp() - 1 - log_r2).sum(-1)


def trained(choice: Vae, rows: Sequence[Float[Tensor, "_ d"]], device: torch.device, ctx: Context) -> Decoders:
    """A decoder for the rows of each class, all trained side by side and none depending on another.

    Training sees (x - mean) / scale, scale^2 the average of a dimension's variance and all dimensions' together; what comes
    out takes it back. A class without scatter is its mean and an isotropic noise: as wide as the other classes' on
    average, or LONE_VARIANCE |mean|^2 / d where those have none either (|mean| = 1 if that is zero) [I].
    """
    mean = torch.stack([own.mean(0) for own in rows])
    variance = torch.stack([own.var(0, correction=0) for own in rows])
    total, energy = variance.mean(1, keepdim=True), (mean**2).mean(1, keepdim=True)
    energy = torch.where(energy > 0, energy, 1 / mean.shape[1])
    flat = total <= torch.finfo(total.dtype).eps * energy
    lone = LONE_VARIANCE * energy if flat.all() else total[~flat].mean()
    scale = torch.where(flat, lone, (variance + total) / 2).sqrt()
    standard = [(own - mean[c]) / scale[c] for c, own in enumerate(rows)]

    weights = _start(choice, len(rows), mean.shape[1], ctx.seeds.generator("weights"), device)

    def loss(inputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        x, noise = (tensor.to(device) for tensor in inputs)
        return negative_elbo(weights, x, noise).mean(1).sum() / x.shape[2]

    # Without a limit on the gradient's norm, which all classes share, none depends on another.
    schedule = Schedule(epochs=1, lr=choice.lr, optimizer="adam", weight_decay=0.0, clip=math.inf)
    fit(loss, weights, _Rows(standard, choice), schedule, ctx)
    *_, A, a, B, b, log_v = (w.detach().cpu() for w in weights)
    B, b, log_v = (torch.where(flat[..., None], 0.0, w) for w in (B, b, log_v))
    return Decoders(A, a[:, 0], B * scale[:, None], mean + scale * b[:, 0], scale * torch.exp(0.5 * log_v[:, 0]))


def _start(choice: Vae, k: int, d: int, rng: torch.Generator, device: torch.device) -> list[nn.Parameter]:
    """Matrices N(0, 1 / fan-in), those of every class the same; zeros for the rest."""
    sizes = ((d, choice.hidden), (choice.hidden, 2 * choice.latent), (choice.latent, choice.hidden), (choice.hidden, d))
    weights = []
    for fan, out in sizes:
        weights += [torch.randn(fan, out, generator=rng) / fan**0.5, torch.zeros(1, out)]
    weights.append(torch.zeros(1, d))
    return [nn.Parameter(w.repeat(k, 1, 1).to(device)) for w in weights]


class _Rows:
    """One epoch of `steps` batches: of every class `batch` rows, drawn with replacement, and the latents' noise."""

    def __init__(self, rows: Sequence[Float[Tensor, "_ d"]], choice: Vae):
        self.rows, self.choice = torch.cat(list(rows)), choice
        self.sizes = torch.tensor([len(own) for own in rows])
        self.starts = self.sizes.cumsum(0) - self.sizes

    def __len__(self) -> int:
        return self.choice.steps

    def epochs(
        self, rngs: Sequence[torch.Generator], skip: int = 0
    ) -> Iterator[Iterator[tuple[tuple[Tensor, Tensor], Tensor]]]:
        return (islice(self._epoch(rng), 0 if i else skip, None) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        shape = (len(self.sizes), self.choice.batch)
        for _ in range(self.choice.steps):
            place = (torch.rand(shape, generator=rng, dtype=torch.float64) * self.sizes[:, None]).long()
            noise = torch.randn(*shape, self.choice.latent, generator=rng)
            yield (self.rows[self.starts[:, None] + place], noise), place.flatten()

"""FM-LoRA: low-rank bases that all tasks share, a small matrix between them, a rank chosen for each task, shared prompt tokens.

Source: FM-LoRA: Factorized Low-Rank Meta-Prompting for Continual Learning (2025), arXiv 2504.08823. Its abstract and published
summaries were read, its equations were not, so none is cited by number. [P] marks what they state: low-rank bases shared by all
tasks and small matrices M, N of each task between them; a selector that gives a task its rank by how complex it is, through a
Gumbel-Softmax; a prompt matrix shared by all tasks that steadies representations; no old data, no growth. The towers there are
supervised ones. [K] is LoRA for layers and rate, VPT for the tokens, MG-CLIP for the softmax over the task's classes alone. Every
formula below is ours [I]:

1. an adapted layer: W + U C V, C the sum over the finished tasks of M_j N_j; U, V train with the first task, afterwards M, N alone;
2. the rank r of a task, of 1, 2, 4, ..., R: logits l_j = theta_j - (r_j / R - h)^2 / (2 spread^2), h in [0, 1] how hard the task
   is; a mask over the columns of M, m_i = sum_j p_j [i <= r_j], p = softmax((l + g) / tau), g Gumbel, tau falling, one-hot in the
   last tenth of the steps; afterwards r = argmax l, and what stands behind column r is cut;
3. P, p tokens behind the class token, which start near the mean patch token of the first task; from the second task on they
   train at a tenth of the rate and are held where they were;
4. loss: CE(s z T_b^T, y) + price sum_j p_j r_j / R + mu |P - P'|^2; scores: s z . t_c of all classes seen.

Letters: z unit embedding of an image, t_c unit text of class c, T_b those of the task's classes, s scale; P' the tokens before
the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.losses import class_cross_entropy
from cairn.maths.ranks import (
    candidate_ranks,
    cut,
    energy_rank,
    gumbel,
    gumbel_softmax,
    hardness,
    nested_mask,
    rank_prior,
    straight_through,
)
from cairn.maths.similarity import unit
from cairn.methods.parts.stages import competing
from cairn.methods.parts.two_stage import TrainedVision
from cairn.methods.protocol import Card, ChoosesRanks
from cairn.settings import Given, Settings, kind_by_name
from cairn.towers.factored import Factored, inject, plain
from cairn.towers.protocol import Towers
from cairn.towers.tokens import WithTokens
from cairn.training.context import Context, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Pixels, State, flattened, part

LATER = 0.1
"""Rate of what all tasks share, from the second task on, as a share of the schedule's [I]."""

SOFT = 0.9
"""Share of the steps in which several ranks are mixed; in the others the mask is that of one [I]."""

STARTING_NOISE = 0.02
"""By which prompt tokens differ from one another at first, as a share of the mean patch token's length per number [I]."""


class Layers(Given):
    """Layers of the image tower, and prompt tokens at its input."""

    kind: Literal["layers"] = Field(default="layers", description="layers of the image tower")
    targets: str = Field(
        default=r".*vision_model.*\.self_attn\.(k_proj|v_proj)", description="regex of layer names [K: keys and values]"
    )
    prompts: int = Field(default=4, ge=0, description="p, prompt tokens that all tasks share; 0: none [P: some; I: 4]")
    prompts_anchor: float = Field(
        default=1.0, ge=0, description="mu, weight of |P - P'|^2 from the second task on [P: that they steady; I: how]"
    )


class Behind(Given):
    """One layer behind the frozen tower, the identity at first; no prompt tokens. The form of embeddings."""

    kind: Literal["adapter"] = Field(default="adapter", description="one layer behind the frozen tower")


class Gumbel(Given):
    """The rank is chosen while the task trains, around what its hardness says [P: Gumbel-Softmax, complexity]."""

    kind: Literal["gumbel"] = Field(default="gumbel", description="chosen while the task trains")
    spread: float = Field(default=0.25, gt=0, description="how far the rank may be from R h, as a share of R [I]")
    price: float = Field(default=0.01, ge=0, description="weight of the mean rank in the loss, as a share of R [I]")
    warm: float = Field(default=1.0, gt=0, description="tau at the beginning of a task [I]")
    cold: float = Field(default=0.1, gt=0, description="tau at its end [I]")
    rate: float = Field(default=10.0, gt=0, description="rate of theta, in units of the schedule's [I]")

    def gate(self, size: int, h: float, device: torch.device) -> Gate:
        return GumbelGate(self, size, h, device)


class Energy(Given):
    """All directions train, and those are kept that hold most of the task's squared singular values."""

    kind: Literal["energy"] = Field(default="energy", description="chosen afterwards, by singular values")
    share: float = Field(default=0.95, gt=0, le=1, description="share of the squared singular values to be kept [I]")

    def gate(self, size: int, h: float, device: torch.device) -> Gate:
        return EnergyGate(size, self.share)


class Fixed(Given):
    """The same rank for all tasks."""

    kind: Literal["fixed"] = Field(default="fixed", description="the same for all tasks")
    rank: int = Field(default=16, ge=1, description="r, at most the number of basis vectors")

    def gate(self, size: int, h: float, device: torch.device) -> Gate:
        return Gate(min(self.rank, size))


Tuning: TypeAlias = Layers | Behind
Rank: TypeAlias = Gumbel | Energy | Fixed


class FmLoraConfig(Settings):
    """The settings of FM-LoRA."""

    tuning: Tuning = Field(
        default=Layers(), description="what is adapted: layers of the image tower, or one behind it: adapter"
    )
    subspace: int = Field(
        default=16,
        ge=1,
        description="R, basis vectors of a layer that all tasks share; no more than the layer has numbers",
    )
    bases: Literal["first", "always", "never"] = Field(
        default="first",
        description="when U and V train: with the first task, with all (later ones at a tenth of the rate), or never [I]",
    )
    rank: Rank = Field(default=Gumbel(), description="rank of a task: gumbel, energy or fixed [P: gumbel]")
    schedule: Schedule = Field(
        default=Schedule(epochs=2, batch=128, lr=1e-2, weight_decay=0.0),
        description="optimisation, the rate chosen on shapes:dev; no decay, which would not keep the order of the directions [I]",
    )

    _kinds = field_validator("tuning", "rank", mode="before")(kind_by_name)

    @classmethod
    def embedding(cls) -> FmLoraConfig:
        """The form that needs no image tower."""
        return cls(tuning=Behind(), schedule=Schedule(epochs=10, batch=128, lr=1e-3, weight_decay=0.0))


class Gate:
    """Which directions of a task are open while it trains, and how many remain: all `size` of them, without a price."""

    def __init__(self, size: int):
        self.size = size
        self.trained: list[nn.Parameter] = []
        self.rate = 1.0

    def opened(self, noise: Tensor, progress: float) -> tuple[Float[Tensor, " r"] | None, Tensor | float]:
        """The mask in a step with this Gumbel noise, `progress` in [0, 1) through the task, and what it costs."""
        return None, 0.0

    def closed(self, layers: Sequence[Factored]) -> int:
        """The rank; what is beyond it is gone."""
        for layer in layers:
            layer.close(layer.product())
        return self.size

    def told(self) -> dict[str, Any]:
        """For the log."""
        return {}


class EnergyGate(Gate):
    """All open, then cut to the rank that keeps `share` of the squared singular values of all layers together."""

    def __init__(self, size: int, share: float):
        super().__init__(size)
        self.share = share

    def closed(self, layers: Sequence[Factored]) -> int:
        products = [layer.product() for layer in layers]
        rank = energy_rank(products, self.share)
        for layer, S in zip(layers, products, strict=True):
            layer.close(cut(S, rank))
        return rank


class GumbelGate(Gate):
    """Open to the rank that is drawn in each step; what is likeliest in the end remains."""

    def __init__(self, choice: Gumbel, size: int, h: float, device: torch.device):
        super().__init__(size)
        self.choice, self.h, self.rate = choice, h, choice.rate
        self.ranks = candidate_ranks(size).to(device)
        self.prior = rank_prior(self.ranks, h, choice.spread)
        self.theta = nn.Parameter(torch.zeros(len(self.ranks), device=device))
        self.trained = [self.theta]

    @property
    def logits(self) -> Float[Tensor, " q"]:
        return self.theta + self.prior

    def opened(self, noise: Tensor, progress: float) -> tuple[Float[Tensor, " r"], Tensor]:
        tau = self.choice.warm * (self.choice.cold / self.choice.warm) ** progress
        p = gumbel_softmax(self.logits, noise.to(self.theta), tau)
        if progress >= SOFT:
            p = straight_through(p)
        return nested_mask(p, self.ranks), self.choice.price * (p * self.ranks).sum() / self.size

    @torch.no_grad()
    def closed(self, layers: Sequence[Factored]) -> int:
        rank = int(self.ranks[self.logits.argmax()])
        for layer in layers:
            layer.close(layer.product(rank))
        return rank

    def told(self) -> dict[str, Any]:
        weights = self.logits.detach().softmax(0).tolist()
        return {"hardness": self.h, "ranks": self.ranks.tolist(), "weights": weights}


class NoisyLoader(Loader):
    """A loader whose epochs bring, with the pixels, the Gumbel noise of the step and how far the training is.

    The noise comes from the generator of the epoch, which all processes have, so that they and a resumed run draw the same.
    """

    numbers, total = 0, 1
    """Noise of a step, and epochs in all."""

    def epochs(
        self, rngs: Sequence[torch.Generator], skip: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Iterator[tuple[Any, Tensor]]]:
        first = self.total - len(rngs)
        for i, (rng, batches) in enumerate(zip(rngs, super().epochs(rngs, skip, share), strict=True)):
            noise = gumbel((len(self), self.numbers), rng)
            yield self._noisy(batches, noise, first + i, 0 if i else skip)

    def _noisy(
        self, batches: Iterator[tuple[Tensor, Tensor]], noise: Tensor, epoch: int, skip: int
    ) -> Iterator[tuple[Any, Tensor]]:
        for step, (pixels, labels) in enumerate(batches, start=skip):
            yield (pixels, noise[step], (epoch * len(self) + step) / (self.total * len(self))), labels


class Encoder:
    """The image side with factored layers, and prompt tokens at its input once there are any."""

    def __init__(self, towers: Towers, config: FmLoraConfig, rng: torch.Generator):
        self.towers, self.tuning = towers, config.tuning
        self.entry: WithTokens | None = None
        self.version = 0
        if isinstance(self.tuning, Behind):
            identity = nn.Linear(towers.dim, towers.dim, bias=False, device="meta").to_empty(device="cpu")
            nn.init.eye_(identity.weight).requires_grad_(False)
            self.module: nn.Module = Factored(identity, config.subspace, rng).to(towers.device)
            self.layers = [m for m in self.module.modules() if isinstance(m, Factored)]
        else:
            if not towers.has_images:
                raise ConfigError("tuning 'layers': a features file has no tower to tune; take adapter")
            self.module = towers.vision()
            self.layers = inject(self.module, self.tuning.targets, config.subspace, rng)
            vision_model = self.module.get_submodule("vision_model")
            self.entry = WithTokens(vision_model.get_submodule("embeddings"))
            vision_model.add_module("embeddings", self.entry)
            self.module.to(towers.device).eval()

    def __call__(self, pixels: Pixels) -> Features:
        return self.module(self.towers.image(pixels) if self.entry is None else pixels)

    def copied(self) -> nn.Module:
        """A copy that shares nothing with it, of plain layers."""
        twin = plain(self.module if self.entry is not None else nn.Sequential(self.module))
        return twin if self.entry is not None else nn.Sequential(self.towers.vision(), *twin.children())

    @property
    def size(self) -> int:
        """R, that of the largest layer."""
        return max(len(layer.C) for layer in self.layers)

    @property
    def tokens(self) -> nn.Parameter | None:
        return None if self.entry is None else self.entry.tokens

    def bases(self) -> list[nn.Parameter]:
        return [matrix for layer in self.layers for matrix in (layer.U, layer.V)]

    def start_tokens(self, mean: Float[Tensor, " w"], number: int, rng: torch.Generator) -> None:
        """Tokens near the mean patch token, so that at first they show the tower nothing new."""
        assert self.entry is not None
        scale = STARTING_NOISE * mean.norm() / len(mean) ** 0.5
        values = mean + scale * torch.randn(number, len(mean), generator=rng)
        self.entry.tokens = nn.Parameter(values.to(self.towers.device))

    def state_dict(self) -> State:
        """U, V, C and P, whatever the number of tasks."""
        held = flattened({str(i): layer.factors() for i, layer in enumerate(self.layers)})
        if self.tokens is not None:
            held["P"] = self.tokens.detach().cpu().clone()
        return held | {"version": torch.tensor(self.version)}

    def load_state_dict(self, state: State) -> None:
        for i, layer in enumerate(self.layers):
            layer.restore(part(state, str(i)))
        if self.entry is not None:
            self.entry.tokens = nn.Parameter(state["P"].to(self.towers.device)) if "P" in state else None
        self.version = int(state["version"])


class FMLoRA(TrainedVision[Encoder], ChoosesRanks):
    """argmax_c s cos(f_b(x), t_c), f_b with U (C_1 + ... + C_b) V in its layers."""

    card = Card(
        title="FM-LoRA: shared low-rank bases, a rank per task, prompt tokens",
        source="FM-LoRA 2025",
        citation="FM-LoRA: Factorized Low-Rank Meta-Prompting for Continual Learning. 2025. arXiv 2504.08823.",
        config=FmLoraConfig,
        stages=(
            "how hard the task is: one pass of the frozen tower (rank=gumbel)",
            "vision: the task's matrices between the shared bases, and prompt tokens, against the texts of the task's classes",
            "rank: the directions beyond it are cut, the rest is added to what earlier tasks left",
        ),
        trains="vision",
        keeps="nothing",
        needs="images; texts that the towers can tell apart",
        passes="one per image and epoch, with gradients, and one more",
        text=True,
        moves=True,
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    memory_bytes = 0

    def __init__(self, towers: Towers, config: FmLoraConfig, *, seed: int):
        super().__init__(towers, config, Encoder(towers, config, Seeds(seed).generator("encoder")))
        self.ranks: list[int] = []

    @property
    def encoder(self) -> str:
        return f"factored-{self.image.version}"

    def learn(self, task: Task, ctx: Context) -> None:
        ctx = ctx.at(task=task.index)
        loader = NoisyLoader(task.train, self.towers.prepare, self.towers.pixels, batch=self.config.schedule.batch)
        k = len(self.anchors)  # old classes
        self.add_anchors(task, loader, ctx)
        classes = competing(loader.labels.unique(), len(self.anchors), ctx.log)
        if len(classes) > 1 and self.config.schedule.epochs:
            self.ranks = [*self.ranks, self._trained(loader, classes, k, ctx)]
        else:
            self.ranks = [*self.ranks, 0]

    def _trained(self, loader: NoisyLoader, classes: Tensor, k: int, ctx: Context) -> int:
        """The image side after this task; its rank."""
        config, image, s, device = self.config, self.image, self.towers.logit_scale, self.towers.device
        gate = config.rank.gate(image.size, self._hardness(loader, k, ctx), device)
        rng = ctx.seeds.generator("factors")
        own = [matrix for layer in image.layers for matrix in layer.open(gate.size, rng)]
        trained = [(p, 1.0) for p in own] + [(p, gate.rate) for p in gate.trained] + self._shared(loader, ctx)
        T, before = self.anchors[classes].to(device), None if image.tokens is None else image.tokens.detach().clone()
        mu = config.tuning.prompts_anchor if image.version and isinstance(config.tuning, Layers) else 0.0

        def loss(inputs: tuple[Tensor, Tensor, float], y: Tensor) -> Tensor:
            pixels, noise, progress = inputs
            mask, price = gate.opened(noise, progress)
            for layer in image.layers:
                layer.mask = mask
            z = unit(image(pixels))
            value = class_cross_entropy(z, T, torch.searchsorted(classes, y).to(device), s) + price
            if mu and image.tokens is not None and before is not None:
                value = value + mu * ((image.tokens - before) ** 2).sum()
            return value

        loader.numbers, loader.total = len(candidate_ranks(gate.size)), config.schedule.epochs
        parameters, rates = [p for p, _ in trained], [rate for _, rate in trained]
        fit(loss, parameters, loader, config.schedule, ctx, rates=rates)
        told = gate.told()
        rank = gate.closed(image.layers)
        image.version += 1
        ctx.log("rank", rank=rank, trained=sum(p.numel() for p in parameters), **told)
        return rank

    def _hardness(self, loader: Loader, k: int, ctx: Context) -> float:
        """Of the task, for the towers as they came; only if the rank asks for it."""
        if not isinstance(self.config.rank, Gumbel):
            return 0.0
        z, y = encode(loader, lambda pixels, _: unit(self.towers.image(pixels)), ctx, "Z")
        present = y.unique()
        new, old = self.anchors[k:], self.anchors[:k]
        return hardness(self.towers.logit_scale * z @ self.anchors.T, new, old) if len(present) else 0.0

    def _shared(self, loader: Loader, ctx: Context) -> list[tuple[nn.Parameter, float]]:
        """What of all tasks trains with this one, and at which rate: everything with the first that trains at all."""
        image, config = self.image, self.config
        first = not image.version
        if first and isinstance(config.tuning, Layers) and config.tuning.prompts:
            image.start_tokens(self._mean_patch(loader, ctx), config.tuning.prompts, ctx.seeds.generator("tokens"))
        bases = config.bases == "always" or (config.bases == "first" and first)
        for matrix in image.bases():
            matrix.requires_grad_(bases)
        found = [*(image.bases() if bases else []), *([] if image.tokens is None else [image.tokens])]
        return [(p, 1.0 if first else LATER) for p in found]

    def _mean_patch(self, loader: Loader, ctx: Context) -> Float[Tensor, " w"]:
        """At the tower's input, over all patches of the task's images."""
        assert self.image.entry is not None
        embeddings = self.image.entry.embeddings
        means, _ = encode(loader, lambda pixels, _: embeddings(pixels)[:, 1:].mean(1), ctx, "P")
        return means.mean(0)

    def state_dict(self) -> State:
        return super().state_dict() | {"ranks": torch.tensor(self.ranks, dtype=torch.int64)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.ranks = state["ranks"].tolist()

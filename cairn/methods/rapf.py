"""RAPF: one linear map behind a frozen image tower, apart where class texts are near, fused after every task.

Source: Huang et al., Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and Parameter Fusion (ECCV
2024), arXiv 2407.14143. Its equations were not read, so none is cited by number; [P] marks what its abstract and the authors'
published code state, and the defaults are theirs. Per task:
1. Cross entropy on s cos(W f(x), t_c) over the task's images and draws from the Gaussians of old classes.
2. A hinge on fresh draws of each old class whose text is nearer (Euclidean) than a threshold to that of a new one:
   max(0, cos(W v, t_new) - cos(W v, t_old) + margin), averaged over the draws v of all such pairs.
3. After training the old and the new weights are fused entry by entry in the basis of the old ones' singular vectors.
Embeddings are taken as they leave the tower; only the cosine at the end divides by a length.

What differs [I]: draws are spread over all old classes in every epoch, where the code takes two classes per batch; OAS
shrinks the covariances, where the code adds 1e-4 to their diagonals. Our first form, which started at the identity, had unit
embeddings, a hinge on distances over the drawn rows of the batch itself and another mask, is the settings start=identity,
unit_features=true, hinge=distance, pair_draws=null, mask=ratio, threshold=.65.

Letters: x embedding of an image, W adapter (d x d), z = W x / |W x|; t_c unit text of class c; s scale; N(mu_c, S_c)
Gaussian of class c, over x; U singular vectors of the old W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.fusion import fused
from cairn.maths.losses import class_cross_entropy
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, kept_bytes
from cairn.memory.replay import ReplayBatches
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, GaussianScoring, NamesClasses
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part


class RapfConfig(GaussianSettings):
    """The settings of RAPF."""

    start: Literal["random", "identity"] = Field(
        default="random", description="W before the first task: uniform in +-1/sqrt(d), or the identity [P: random]"
    )
    unit_features: bool = Field(default=False, description="embeddings are brought to length 1 first [P: they are not]")
    threshold: float = Field(
        default=0.55,
        ge=0,
        description="alpha: an old and a new class are neighbours if |t_i - t_j| is below it; 0: none are [P: .55]",
    )
    separation: float = Field(default=1.0, ge=0, description="weight of the hinge loss between neighbours [P: 1]")
    margin: float = Field(
        default=0.1, ge=0, description="by how much nearer the right text must be, in the hinge loss [P: .1]"
    )
    hinge: Literal["cosine", "distance"] = Field(default="cosine", description="what the hinge compares [P: cosine]")
    pair_draws: int | None = Field(
        default=40,
        ge=1,
        description="fresh draws of the old class per pair of neighbours and step; null: its rows of the batch [P: 40]",
    )
    pairs: int = Field(
        default=50, ge=1, description="pairs that are drawn in a step at most, in turn; the code has no limit [I]"
    )
    mask: Literal["clipped", "ratio"] = Field(
        default="clipped",
        description="share of the new weights: min(1, D / max D + fusion), or D / (D + fusion mean D) [P: clipped]",
    )
    fusion: float = Field(
        default=0.6, ge=0, description="the mask's constant; clipped: 1 is all new; ratio: 0 is all new [P: .6]"
    )
    real_share: float | None = Field(
        default=5 / 7,
        ge=0,
        le=1,
        description="share of real rows in a batch; null: each class the same share [P: 100 beside 40 drawn]",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=15, batch=140, lr=1e-3, optimizer="adam", weight_decay=0, warmup=0, milestones=(4, 10)),
        description="training of the adapter [P]",
    )


class RAPF(GaussianScoring[GaussianMemory], NamesClasses):
    """argmax_c s cos(W f(x), t_c)."""

    card = Card(
        title="RAPF: linear adapter, neighbours kept apart, weights fused",
        source="Huang et al. 2024",
        citation="Huang et al. Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and Parameter Fusion. "
        "ECCV 2024. arXiv 2407.14143.",
        config=RapfConfig,
        stages=(
            "adapter: cross entropy and, on draws of old classes with a new neighbour by text, a hinge loss",
            "fusion: old and new weights entry by entry in an orthonormal basis",
            "statistics: a Gaussian per new class",
        ),
        trains="adapter",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: kept_bytes(k, d),
        needs="images; texts that the towers can tell apart",
        passes="one per image, can be cached",
        text=True,
        older={"start": "identity", "unit_features": True, "hinge": "distance", "pair_draws": None, "mask": "ratio"},
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: RapfConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.W = torch.eye(towers.dim)
        if config.start == "random":
            drawn = torch.rand(towers.dim, towers.dim, generator=Seeds(seed).generator("start"))
            self.W = (2 * drawn - 1) / towers.dim**0.5
        self.anchors = torch.zeros(0, towers.dim)
        self.memory = config.memory(towers.dim)

    def learn(self, task: Task, ctx: Context) -> None:
        config, s = self.config, self.towers.logit_scale
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, ctx.log).cpu()])
        x, y = encode(loader, lambda z, _: self.memory_rows(z), ctx, "X", embed=self.embed)

        # Cross entropy on new images and draws of old classes, and the hinge loss on what is drawn of neighbours [P].
        old, device = self.memory, self.towers.device
        W, T = nn.Parameter(self.W.to(device, copy=True)), self.anchors.to(device)
        near = neighbours(T, task.classes.start, config.threshold)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            z, (y, rival) = unit(x.to(device) @ W.T), y.to(device).T
            rows = rival < 0  # of the batch itself
            value = class_cross_entropy(z[rows], T, y[rows], s)
            if config.pair_draws is None:
                drawn, rival = near[y].nonzero(as_tuple=True)
            else:
                drawn, rival = (~rows).nonzero()[:, 0], rival[~rows]
            return value + config.separation * hinge(z[drawn], T, y[drawn], rival, config.margin, config.hinge)

        batches = ReplayBatches(
            *(x, y, old),
            batch=config.schedule.batch,
            real_share=config.real_share,
            sphere=config.unit_features,
            device=device,
        )
        pairs = near.nonzero() if config.pair_draws and config.separation else near.nonzero()[:0]
        batches = _WithPairs(batches, old, pairs.cpu(), config.pair_draws or 0, config.pairs, self.on_sphere)
        fit(loss, [W], batches, config.schedule, ctx)
        old.tell_repairs(ctx.log)

        # Decomposed parameter fusion [P]. The first task has no older weights to hold on to.
        new = W.detach().cpu()
        self.W = fused(self.W, new, config.fusion, config.mask) if old.classes else new
        self.memory = old.add(x, y)

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.memory = self.memory.without(c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text. What was trained with the old one stays."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def memory_rows(self, features: Features) -> Features:
        return unit(features) if self.config.unit_features else features

    def on_sphere(self, drawn: Features) -> Features:
        return self.memory_rows(drawn)

    def row_scores(self, x: Features) -> Scores:
        return self.towers.logit_scale * unit(x @ self.W.to(x.device).T) @ self.anchors.to(x.device).T

    def state_dict(self) -> State:
        return {"W": self.W, "anchors": self.anchors} | flattened({"memory": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.W, self.anchors = state["W"], state["anchors"]
        self.memory = self.memory.restored(part(state, "memory"))


def neighbours(T: Float[Tensor, "k d"], start: int, threshold: float) -> Bool[Tensor, "k k"]:
    """Whether i is an old class (number below `start`), j a new one, and |t_i - t_j| < threshold."""
    number = torch.arange(len(T), device=T.device)
    pairs = (number[:, None] < start) & (number >= start)
    return pairs & (torch.cdist(T, T, compute_mode="donot_use_mm_for_euclid_dist") < threshold)


def hinge(
    z: Float[Tensor, "n d"],
    T: Float[Tensor, "k d"],
    y: Labels,
    rival: Labels,
    margin: float,
    by: Literal["cosine", "distance"] = "cosine",
) -> Float[Tensor, ""]:
    """Mean over rows i of max(0, near(z_i, t_{rival_i}) - near(z_i, t_{y_i}) + margin), 0 without any; near is the cosine of
    unit rows or minus their distance."""
    if not len(z):
        return z.new_zeros(())
    right, wrong = T[y], T[rival]
    if by == "cosine":
        gap = (z * wrong).sum(1) - (z * right).sum(1)
    else:
        gap = (z - right).norm(dim=1) - (z - wrong).norm(dim=1)
    return (gap + margin).relu().mean()


class _WithPairs:
    """Batches and, behind each, `draws` fresh draws of the old class of each pair, `most` pairs at a time and in turn.

    Labels have two columns: the class, and the new class a draw is to be kept from; -1 for the rows of the batch itself.
    """

    def __init__(
        self, batches: ReplayBatches, old: GaussianMemory, pairs: Int[Tensor, "p 2"], draws: int, most: int, memory_rows
    ):
        self.batches, self.old, self.pairs, self.draws, self.most = batches, old, pairs, draws, most
        self.memory_rows = memory_rows

    def __len__(self) -> int:
        return len(self.batches)

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """One epoch for each generator; of the first one, `skip` batches are left out."""
        seeds = [int(torch.randint(2**62, (), generator=rng)) for rng in rngs]
        for i, source in enumerate(self.batches.epochs(rngs, skip)):
            yield self._epoch(source, seeds[i], 0 if i else skip)

    def _epoch(self, source: Iterator[tuple[Tensor, Tensor]], seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (x, y) in enumerate(source, start=start):
            device, labels = x.device, torch.stack([y, torch.full_like(y, -1)], 1)
            if len(self.pairs):
                number = min(self.most, len(self.pairs))
                turn = (torch.arange(number) + step * number) % len(self.pairs)
                pairs = self.pairs[turn]
                classes, which = pairs[:, 0].unique(return_inverse=True)
                sizes = which.bincount()
                rng = torch.Generator().manual_seed(seed + step)
                (drawn,), _ = self.old.draws(self.draws * int(sizes.max()), [rng], classes.tolist(), device)
                # Pair i takes the next rows of its class that no pair before it took
                place = torch.stack([(which[:i] == c).sum() for i, c in enumerate(which)])
                own = drawn.view(len(classes), -1, self.draws, drawn.shape[1])
                rows = own[which.to(device), place.to(device)].flatten(0, 1)
                x = torch.cat([x, self.memory_rows(rows)])
                labels = torch.cat([labels, pairs.repeat_interleave(self.draws, 0).to(labels.device)])
            yield x, labels

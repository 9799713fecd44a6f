"""MCCL: unlabelled images of a task are learned from by what two views of each must have in common.

Source: MCCL (arXiv 2503.17914, IEEE Transactions on Multimedia 27, 2025) and its published code, for segmentation with few labels;
UniMatch (Yang et al. 2023), on which that builds [K]. [P] marks what they state. There one image has many rows, the places of a
feature map; here a row is an image's embedding by a frozen tower, an encoder is trained behind it and the decoder is one vector per
class, all of which is ours [I]:

e = unit(z + E z),  h_c = unit(t_c + r_c),  q = softmax(s e . h_c)
L = (L_x + 1/4 L_s1 + 1/4 L_s2 + 1/2 L_fp) / 2 + alpha L_p2p + omega L_dt + beta_t (L_m + L_n)

L_x is the cross entropy of labelled images; L_s that of strong views against the likeliest class of the weak one, where that is at
least `threshold` likely; L_fp the same for the weak view without half of its entries; L_p2p and L_dt align strong features with weak
ones, row by row and class by class; L_n and L_m are mean squared errors of q, of the strong view disturbed by noise and without its
most active entries, against q of the weak view (`cairn.maths.consistency`); beta_t rises to beta. The weak view is the image
itself [I: flipped and cropped in the source]. A prototype of L_dt is h_c [I: a running mean of weak features], and what is most
active are the largest entries of |e| [I: places of a feature map].

Classes come task by task [I]: E and r are trained on, old classes are drawn from Gaussians of their embeddings, which the frozen
tower never changes. A Gaussian is learned from the labelled images of its class and from the unlabelled ones that are taken for it
in the end. What an unlabelled image may show are the classes that the task has labelled images of: all its softmaxes are over these,
since unlabelled images, none of which is of an old class, would push old classes away.

Letters: z unit embedding of an image, t_c unit text of class c, s scale; E and r_c are zero at first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cairn.data.augment import STRONG_CHANCES, noisy, strong_view
from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.consistency import (
    compactness,
    dropped,
    masked,
    point_to_point,
    pseudo_labels,
    ramp,
    strength,
    trusted_cross_entropy,
    with_noise,
)
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, kept_bytes
from cairn.methods.parts.projector import Projector, UnitLength
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, CosineScoring, GaussianScoring, LearnsUnlabelled, NamesClasses
from cairn.towers.protocol import Towers
from cairn.training.context import BESIDE, Context, Log
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part

DROPOUT = 0.5
"""Share of the entries that L_fp does without [P]."""

NEAR, FAR = 16, 256
"""Rows of a class that meet in L_dt [P]."""


class MCCLConfig(GaussianSettings):
    """The settings of MCCL."""

    unlabelled: bool = Field(
        default=True, description="whether they are learned from; false: labelled images alone, in as many steps"
    )
    consistency: float = Field(
        default=1.0, ge=0, description="weight of L_s1, L_s2 and L_fp over that of UniMatch; 0: off [P: 1]"
    )
    alignment: float = Field(default=0.1, ge=0, description="alpha, weight of L_p2p; 0: off [P: .1]")
    compactness: float = Field(default=0.01, ge=0, description="omega, weight of L_dt; 0: off [P: .01]")
    intervention: float = Field(default=0.01, ge=0, description="beta, weight of L_m + L_n in the end; 0: off [P: .01]")
    threshold: float = Field(
        default=0.8, ge=0, le=1, description="probability from which a pseudo-label is trusted [I; P: .95]"
    )
    among: Literal["task", "seen"] = Field(
        default="task",
        description="what an unlabelled image may show: a class of which the task has labelled ones, or any class seen [I]",
    )
    statistics: Literal["labelled", "trusted"] = Field(
        default="trusted",
        description="a class's Gaussian: of labelled images alone, or of unlabelled ones that are trusted as well [I]",
    )
    views: int = Field(default=2, ge=2, description="strong views of each image, made once [P: two, made anew]")
    ratio: int = Field(default=2, ge=1, description="unlabelled rows of a batch for each labelled one [I; K: 1]")
    noise: float = Field(
        default=0.5,
        ge=0,
        description="on precomputed embeddings a strong view is the row and noise of this share of its length [I]",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=64, lr=0.05, optimizer="sgd"),
        description="training of encoder and class vectors [I: chosen on shapes:dev]",
    )

    @property
    def alters_images(self) -> bool:
        """Whether other images than the given ones pass the tower."""
        return True


class Inputs(NamedTuple):
    """A batch: labelled rows, old classes drawn; unlabelled rows in their views; every random number; how far training is."""

    x: Float[Tensor, "n d"]
    w: Float[Tensor, "u d"]
    s1: Float[Tensor, "u d"]
    s2: Float[Tensor, "u d"]
    draws: Float[Tensor, "u a"]
    """Uniform in [0, 1): d for what is dropped, d for noise, one for the mask."""
    progress: float


class MCCL(CosineScoring, GaussianScoring[GaussianMemory], LearnsUnlabelled, NamesClasses):
    """argmax_c s cos(z + E z, t_c + r_c)."""

    card = Card(
        title="MCCL: consistency of two views, for images without labels",
        source="MCCL 2025",
        citation="MCCL: multi-constraint consistency learning for semi-supervised segmentation. IEEE Transactions on Multimedia 27, "
        "2025. arXiv 2503.17914.",
        config=MCCLConfig,
        stages=(
            "one pass of the frozen tower: labelled images, unlabelled ones and strong views of these",
            "encoder and class vectors: cross entropy of labelled images, consistency of the views of unlabelled ones, old classes "
            "drawn",
            "statistics: a Gaussian per new class",
        ),
        trains="encoder, class vectors",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: kept_bytes(k, d),
        needs="images, of which some may have no label; texts that the towers can tell apart",
        passes="one per image, three per unlabelled one",
        text=True,
        quick={"schedule.epochs": 2, "schedule.batch": 8},
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: MCCLConfig, *, seed: int):
        self.towers, self.config, d = towers, config, towers.dim
        self.projector = Projector(d).to(towers.device)
        self.anchors, self.residuals = torch.zeros(0, d), torch.zeros(0, d)
        self.memory = config.memory(d)

    def learn(self, task: Task, ctx: Context) -> None:
        config, ctx = self.config, ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, ctx.log).cpu()])
        new = len(self.anchors) - len(self.residuals)
        self.residuals = torch.cat([self.residuals, self.residuals.new_zeros(new, self.towers.dim)])
        x, y = encode(loader, lambda z, _: unit(z), ctx, "X", embed=self.embed)
        views, hidden = self._views(task, ctx), len(task.unlabelled or ())
        residuals = nn.Parameter(self.residuals.to(self.towers.device))
        batches = _Batches(x, y, views, hidden, self.memory, config, residuals.device)
        among = y.unique() if config.among == "task" else torch.arange(len(self.anchors))
        fit(self._loss(residuals, among), [self.projector.current, residuals], batches, config.schedule, ctx)
        self.memory.tell_repairs(ctx.log)
        self.residuals = residuals.detach().cpu()
        if len(views) and config.statistics == "trusted":
            found, sure = pseudo_labels(self.row_scores(views[:, 0]).cpu()[:, among], config.threshold)
            found = among[found]
            sure &= torch.isin(found, y.unique())  # others are known by what was labelled
            ctx.log("unlabelled", images=len(views), trusted=int(sure.sum()))
            x, y = torch.cat([x, views[sure, 0]]), torch.cat([y, found[sure]])
        self.memory = self.memory.add(x, y)

    def _views(self, task: Task, ctx: Context) -> Float[Tensor, "u v d"]:
        """Unit embeddings of the unlabelled images: as they are, and of strong views of each."""
        number, d = self.config.views, self.towers.dim
        hidden = task.unlabelled
        if hidden is None or not len(hidden) or not self.config.unlabelled:
            return torch.zeros(0, 1 + number, d)
        n, rng = len(hidden), ctx.seeds.generator("views")
        numbered = Subset(hidden, np.arange(n), np.arange(n))
        loader = Loader(numbered, self.towers.prepare, self.towers.pixels, batch=self.config.schedule.batch)
        if not self.towers.has_images:
            z, _ = encode(loader, lambda pixels, _: unit(self.towers.image(pixels)), ctx, f"{BESIDE}unlabelled")
            strong = unit(noisy(z.repeat_interleave(number, 0), self.config.noise, rng))
            return torch.cat([z[:, None], strong.view(n, number, d)], 1)
        chances = torch.rand(n, number, STRONG_CHANCES, generator=rng)

        def rows(pixels: Pixels, numbers: Tensor) -> Tensor:
            views = [pixels, *(strong_view(pixels, chances[numbers, i]) for i in range(number))]
            return torch.cat([unit(self.towers.image(view)) for view in views], 1)

        return encode(loader, rows, ctx, f"{BESIDE}unlabelled")[0].view(n, 1 + number, d)

    def _loss(self, residuals: nn.Parameter, among: Int[Tensor, " j"]) -> Callable[[Inputs, Tensor], Tensor]:
        s, device = self.towers.logit_scale, self.towers.device
        T = self.anchors.to(device)

        def loss(inputs: Inputs, y: Tensor) -> Tensor:
            H = unit(T + residuals)
            L_x = cross_entropy(s * self.projector(inputs.x.to(device)) @ H.T, y.to(device))
            if not len(inputs.w):
                return L_x / 2
            return L_x / 2 + self._of_unlabelled(inputs, H, among.to(device))

        return loss

    def _of_unlabelled(self, inputs: Inputs, H: Float[Tensor, "k d"], among: Int[Tensor, " j"]) -> Float[Tensor, ""]:
        """All of L but L_x."""
        config, s, d = self.config, self.towers.logit_scale, self.towers.dim
        w, s1, s2 = (self.projector(rows.to(H.device)) for rows in (inputs.w, inputs.s1, inputs.s2))
        drops, noise, mask = inputs.draws.to(H.device).split([d, d, 1], 1)
        H = H[among]
        guide = (s * w @ H.T).detach()
        pseudo, trusted = pseudo_labels(guide, config.threshold)

        def cross(e: Tensor) -> Tensor:
            return trusted_cross_entropy(s * e @ H.T, pseudo, trusted)

        value = config.consistency * (cross(s1) / 8 + cross(s2) / 8 + cross(dropped(w, DROPOUT, drops)) / 4)
        fixed = w.detach()
        if config.alignment:
            value = value + config.alignment * (point_to_point(fixed, s1) + point_to_point(fixed, s2)) / 2
        if config.compactness:
            value = value + config.compactness * compactness(fixed, s1, pseudo, trusted, H.detach(), NEAR, FAR)
        if config.intervention:
            rho, q = strength(fixed, s1.detach(), torch.arange(len(w), device=w.device)), guide.softmax(1)
            disturbed = with_noise(s1, rho, noise), masked(s1, s1.detach().abs(), rho, mask[:, 0])
            errors = [((s * e @ H.T).softmax(1) - q).square().mean() for e in disturbed]
            value = value + config.intervention * ramp(inputs.progress) * torch.stack(errors).sum()
        return value

    def forget(self, c: int) -> None:
        self.anchors, self.residuals = without(self.anchors, c), without(self.residuals, c)
        self.memory = self.memory.without(c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text. What was trained with the old one stays."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def scores(self, features: Features) -> Scores:
        return self.row_scores(unit(features))

    @torch.no_grad()
    def row_scores(self, z: Features) -> Scores:
        """Of unit rows."""
        return self.towers.logit_scale * self.projector(z.to(self.towers.device)) @ self.class_matrix.T

    @property
    def class_matrix(self) -> Features:
        """h_c."""
        return unit(self.anchors + self.residuals).to(self.towers.device)

    def vision(self) -> nn.Module:
        return nn.Sequential(self.towers.vision(), UnitLength(), copy.deepcopy(self.projector))

    def state_dict(self) -> State:
        E = self.projector.current.detach().cpu().clone()
        held = {"anchors": self.anchors, "residuals": self.residuals, "encoder": E}
        return held | flattened({"memory": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.anchors, self.residuals = state["anchors"], state["residuals"]
        self.projector.current = nn.Parameter(state["encoder"].clone().to(self.towers.device))
        self.memory = self.memory.restored(part(state, "memory"))


class _Batches:
    """Labelled rows, and unit draws of old classes so that each class has the same share; beside them unlabelled rows in three of
    their views, and the random numbers of the loss. An epoch shows all rows of whichever are more, the others again and again; it
    has as many steps where the `hidden` ones, as many as there are, are not learned from. Rows lie and draws are made on `device`."""

    def __init__(
        self,
        x: Features,
        y: Labels,
        views: Float[Tensor, "u v d"],
        hidden: int,
        old: GaussianMemory,
        config: MCCLConfig,
        device: torch.device,
    ):
        self.x, self.y, self.views = (rows.to(device) for rows in (x, y, views))
        self.old, self.device = old, device
        self.epochs_in_all, batch = config.schedule.epochs, config.schedule.batch
        present = len(y.unique())
        share = present / (present + old.classes)
        self.real = max(1, round(share * batch))
        self.drawn = max(1, batch - self.real) if old.classes else 0
        self.beside = min(config.ratio * batch, len(views))
        self.steps = max(-(-len(x) // self.real), -(-hidden // (config.ratio * batch)))

    def __len__(self) -> int:
        return self.steps

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Inputs, Tensor]]]:
        """One epoch for each generator, the last of which is the last of all; of the first one, `skip` batches are drawn and passed
        over."""
        done = self.epochs_in_all - len(rngs)
        return (islice(self._epoch(rng, done + i), 0 if i else skip, None) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator, epoch: int) -> Iterator[tuple[Inputs, Tensor]]:
        steps, (u, v, d) = len(self), self.views.shape
        numbers = _again(len(self.x), steps * self.real, rng), _again(u, steps * self.beside, rng)
        rows, beside = (order.to(self.device) for order in numbers)
        old, names = self.x[:0], self.y[:0]
        if self.drawn:
            (old,), names = self.old.draws(-(-steps * self.drawn // self.old.classes), [rng], device=self.device)
            mixed = torch.randperm(len(names), generator=rng).to(self.device)
            old, names = unit(old[mixed]), names.to(self.device)[mixed]
        for step in range(steps):
            i, j = rows[step * self.real :][: self.real], beside[step * self.beside :][: self.beside]
            drawn = slice(step * self.drawn, (step + 1) * self.drawn)
            first, second = 1 + torch.randperm(v - 1, generator=rng)[:2]
            draws = torch.rand(len(j), 2 * d + 1, generator=rng)
            x, y = torch.cat([self.x[i], old[drawn]]), torch.cat([self.y[i], names[drawn]])
            w, s1, s2 = self.views[j, 0], self.views[j, int(first)], self.views[j, int(second)]
            yield Inputs(x, w, s1, s2, draws, (epoch + step / steps) / self.epochs_in_all), y


def _again(n: int, number: int, rng: torch.Generator) -> Tensor:
    """So many of n rows, in one order after the other."""
    orders = [torch.randperm(n, generator=rng) for _ in range(-(-number // n))] if n else []
    return torch.cat([torch.zeros(0, dtype=torch.int64), *orders])[:number]

"""ENGINE: descriptions and altered images teach two linear units per task; a discriminant head and re-ranking beside them.

Source: Zhou et al., External Knowledge Injection for CLIP-Based Class-Incremental Learning (ICCV 2025), arXiv 2503.08510,
and the authors' published code and settings, whose facts are marked [P]. Per task: two linear units, added to those of
finished tasks, trained against the class texts, the descriptions and altered images; one noisy class mean per old class and
batch (no image is kept); class means and one covariance of the features before the projection. At test

    outputs = stat D + (1 - stat) (rerank R + (1 - rerank) cos(G_i(x), G_t(t_c)))

with D the row of discriminant scores brought to length 1, and R_c the cosine of the image with the mean of the sentences
that tell c from the other likeliest classes, 0 for all but these.

What differs [I]: a description is written for a class, not for a pair of classes, so a pair takes of each class the sentence
that speaks most for it and against the other, and d_c stands in for one sentence drawn at random; images are altered by crop,
mirror and light, once instead of anew in every epoch (the code: pixel noise); noise is a share of the mean's length (0.25 in
each of 512 coordinates is 0.57 of a length of 10, about that of CLIP's embeddings); units start at the identity; the
covariance is pooled exactly over all images, where the code averages inverse covariances of tasks.

Letters: x unit embedding of an image, x' those of its altered copies, h its unit features before the projection; p_c mean of
class c; t_c unit text of class c, l its unit sentences, d_c their unit mean; G_i, G_t the units of all tasks together; s scale;
k classes, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from cairn.data.augment import CHANCES, noisy, view
from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError, ResultError
from cairn.maths.discriminant import linear_discriminant
from cairn.maths.losses import batch_contrast
from cairn.maths.rows import without
from cairn.maths.shrinkage import Ridge
from cairn.maths.similarity import unit
from cairn.memory.covariances import Shared
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.means import ClassMeans
from cairn.methods.parts.described import sentences_of
from cairn.methods.parts.projector import Projectors
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, DescribedClasses, NamesClasses
from cairn.settings import Settings
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part


class EngineConfig(Settings):
    """The settings of ENGINE. [P] figures are those of CIFAR-100 where sets differ."""

    descriptions: str = Field(
        default="data", description="data: what the data set brings; template: its prompt templates; or a JSON file"
    )
    stat: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="share of the discriminant head in the scores; 0: no head "
        "[P: .8 on CIFAR-100 and ImageNet-R, .85 UCF, .95 CUB, .99 Aircraft]",
    )
    rerank: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of re-ranking beside the cosines; 0: none [P: .5; .2 UCF, .8 Aircraft]",
    )
    candidates: int = Field(default=5, ge=1, description="likeliest classes that are ranked anew; 1: none is [P: 5]")
    loss: Literal["contrast", "cross_entropy"] = Field(
        default="contrast",
        description="contrast: images and texts of a batch, against each other; cross_entropy: of each image over the class "
        "texts, and cosines for L_t and L_i [P: contrast]",
    )
    text_weight: float = Field(
        default=2.0, ge=0, description="weight of L_t, class texts towards descriptions; 0: off [P: 2]"
    )
    image_weight: float = Field(
        default=0.5, ge=0, description="weight of L_i, images towards altered ones; 0: off [P: .5; 0 UCF]"
    )
    views: int = Field(default=1, ge=1, description="altered copies of each image, made and embedded once [I]")
    noise: float = Field(
        default=0.57,
        ge=0,
        description="length of the noise on a class mean, as a share of the mean's [P: .25 per coordinate; I: a share]",
    )
    replay: int | None = Field(
        default=1,
        ge=0,
        description="noisy means per old class and batch; null: as many as images of a new one; 0: none [P: 1]",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=64, lr=0.05, optimizer="sgd", weight_decay=0.05),
        description="training of the units [P]",
    )

    @property
    def alters_images(self) -> bool:
        """Whether other images than the given ones pass the tower."""
        return True

    @classmethod
    def embedding(cls) -> EngineConfig:
        """For precomputed embeddings: class texts stand in for descriptions, noise for altered images."""
        return cls(descriptions="template")


class ENGINE(DescribedClasses, NamesClasses):
    """argmax_c of s (stat D_c + (1 - stat) (rerank R_c + (1 - rerank) cos(G_i(x), G_t(t_c))))."""

    card = Card(
        title="ENGINE: descriptions injected, likeliest classes re-ranked",
        source="Zhou et al. 2025",
        citation="Zhou et al. External Knowledge Injection for CLIP-Based Class-Incremental Learning. ICCV 2025. "
        "arXiv 2503.08510.",
        config=EngineConfig,
        stages=(
            "one pass of the frozen tower: images and altered copies of them",
            "units of the task: texts towards descriptions, images towards altered ones, noisy means of old classes",
            "discriminant head: class means and one covariance of the features before the projection",
            "at test: head, cosines and the likeliest classes by the sentences that tell them apart, as weighed",
        ),
        trains="projectors",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: k * (4 * (d + w) + 16) + 2 * w * (w + 1),
        needs="images; texts and descriptions help",
        passes="one per image and one for its altered copy",
        text=True,
        older={"stat": 0.0, "rerank": 0.5, "loss": "cross_entropy"},
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: EngineConfig, *, seed: int):
        if config.descriptions != "template" and not towers.has_images:
            raise ConfigError("descriptions: a features file has no text tower; set descriptions=template")
        self.towers, self.config = towers, config
        self.device = towers.device
        names = ("visual", "textual")
        self.units = Projectors(towers.dim, names).to(self.device)
        self.anchors = torch.zeros(0, towers.dim)
        self.means = ClassMeans.empty(towers.dim)
        self.sentences: list[Tensor] = []
        self.tasks = 0
        self._set_head(GaussianMemory(towers.hidden_dim, covariance=Shared(), shrinkage=Ridge(eps=0)))

    def _set_head(self, head: GaussianMemory) -> None:
        """Class means and one covariance of h, empty with `stat` 0."""
        self.head = head
        self._discriminant: tuple[Tensor, Tensor] | None = None

    @property
    def needs_sentences(self) -> bool:
        return self.config.descriptions == "data"

    @property
    def memory_bytes(self) -> int:
        return self.means.bytes + (self.head.bytes if self.config.stat else 0)

    def learn(self, task: Task, ctx: Context) -> None:
        config, s, d = self.config, self.towers.logit_scale, self.towers.dim
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        new = class_anchors(self.towers, task, loader, ctx.log).cpu()
        self.anchors = torch.cat([self.anchors, new])
        self.sentences = self.sentences + self._embedded(task, new, ctx.log)
        rows, y = self._with_views(task, ctx)
        x, h = rows[:, : -self.towers.hidden_dim], rows[:, -self.towers.hidden_dim :]

        # Units of this task; those before stand still, and all of them are added up [P].
        self.units.grow()
        visual, textual = self.units["visual"], self.units["textual"]
        t, described = self.anchors.to(self.device), self._described().to(self.device)

        def loss(rows: Tensor, y: Tensor) -> Tensor:
            rows, y = rows.to(self.device).view(len(rows), -1, d), y.to(self.device)
            z, T, altered = visual(rows[:, 0]), textual(t), rows[:, 1:]
            if config.loss == "contrast":
                L_c = (batch_contrast(s * z, T[y]) + batch_contrast(s * T[y], z)) / 2
                L_t = batch_contrast(T[y], described[y])
                L_i = torch.stack([batch_contrast(z, unit(copy)) for copy in altered.unbind(1)]).mean()
            else:
                L_c = cross_entropy(s * z @ T.T, y)
                L_t = -(T * described).sum(1)[y].mean()
                L_i = -cosine_similarity(z[:, None], altered, dim=2).mean()
            return L_c + config.text_weight * L_t + config.image_weight * L_i

        # The task's images, and noisy means of old classes in place of theirs [P].
        share = max(1, config.schedule.batch // len(y.unique()))
        replay = share if config.replay is None else config.replay
        batches = _Batches(x, y, self.means.means, config.noise, config.schedule.batch, replay)
        fit(loss, self.units.current, batches, config.schedule, ctx.logged_at(stage=1))
        self.means = self.means.add(x[:, :d], y)
        if config.stat:
            self.tasks += 1
            self._set_head(self.head.add(h, y))

    def _embedded(self, task: Task, new: Float[Tensor, "k d"], log: Log) -> list[Float[Tensor, "_ d"]]:
        """Unit embeddings of the sentences of each new class; without a text tower its class text."""
        if not self.towers.has_images:
            return [text[None] for text in new]
        said = sentences_of(self.config.descriptions, task, log)
        return [unit(self.towers.text(sentences)).cpu() for sentences in said]

    def _with_views(self, task: Task, ctx: Context) -> tuple[Float[Tensor, "n w"], Labels]:
        """Unit embeddings of each image, of its altered copies, and its unit features before the projection, in one row; and
        the labels."""
        n, views = len(task.train), self.config.views
        numbered = Subset(task.train, np.arange(n), np.arange(n))
        loader = Loader(numbered, self.towers.prepare, self.towers.pixels, batch=self.config.schedule.batch)
        rng = ctx.seeds.generator("views")
        y = torch.as_tensor(task.train.labels)
        if not self.towers.has_images:
            x, _ = encode(loader, lambda pixels, _: unit(self.towers.image(pixels)), ctx, "X")
            return torch.cat([x, *(noisy(x, self.config.noise, rng) for _ in range(views)), x], 1), y
        chances = torch.rand(n, views, CHANCES, generator=rng)

        def rows(pixels: Pixels, numbers: Tensor) -> Tensor:
            altered = [self.towers.image(view(pixels, chances[numbers, copy])) for copy in range(views)]
            x, h = self.towers.image_and_hidden(pixels)
            return torch.cat([unit(part) for part in (x, *altered, h)], 1)

        return encode(loader, rows, ctx, "X")[0], y

    def _described(self) -> Float[Tensor, "k d"]:
        """d_c."""
        return unit(torch.stack([own.mean(0) for own in self.sentences]))

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.means = self.means.without(c)
        self.sentences = self.sentences[:c] + self.sentences[c + 1 :]
        if self.config.stat:
            self._set_head(self.head.without(c))

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text and its sentences. What the units were trained to, with the old ones, stays."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)
        (self.sentences[c],) = self._embedded(named, self.anchors[c : c + 1], log)

    def embed(self, pixels: Pixels) -> Features:
        """The embedding and, where there is an image tower, the features before the projection behind it."""
        x, h = self.towers.image_and_hidden(pixels)
        return torch.cat([x, h], 1) if self.towers.has_images else x

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        """s (stat D + (1 - stat) (rerank R + (1 - rerank) cos(G_i(x), G_t(t_c))))."""
        stat, rerank = self.config.stat, self.config.rerank
        features = features.to(self.device)
        x, h = unit(features[:, : self.towers.dim]), unit(features[:, -self.towers.hidden_dim :])
        cosines = self.units["visual"](x) @ self.units["textual"](self.anchors.to(self.device)).T
        number = min(self.config.candidates, len(self.anchors))
        if rerank and number > 1:
            best = cosines.topk(number, 1).indices
            cosines = (1 - rerank) * cosines + rerank * self._reranked(x, best, torch.zeros_like(cosines))
        if stat:
            cosines = (1 - stat) * cosines + stat * unit(self._discriminants(h))
        return self.towers.logit_scale * cosines

    def _discriminants(self, h: Float[Tensor, "n w"]) -> Scores:
        """D_c = h . P mu_c - mu_c . P mu_c / 2 - log k, P = d (n S + tr(S) I)^-1, n the images of a task on average [P: the
        task's, and such P averaged over tasks]."""
        if self._discriminant is None:
            head = self.head
            W, b = linear_discriminant(head.means, head.covariance(0), int(head.counts.sum()) / self.tasks)
            self._discriminant = W.float().to(self.device), b.float().to(self.device)
        W, b = self._discriminant
        return h @ W + b

    def _reranked(self, x: Features, best: Int[Tensor, "n b"], zeros: Scores) -> Scores:
        """R: cosine of the image with the mean, over the others b of the `best`, of the sentences that tell c from b."""
        sentences = torch.cat(self.sentences).to(self.device)
        pairs = telling(self.sentences, self._described()).to(self.device)[best[:, :, None], best[:, None, :]]
        others = ~torch.eye(best.shape[1], dtype=torch.bool, device=self.device)
        means = torch.einsum("nabd,ab->nad", sentences[pairs], others.float())
        return zeros.scatter(1, best, cosine_similarity(means, x[:, None], dim=2))

    def state_dict(self) -> State:
        units = {name: value.cpu().clone() for name, value in self.units.state_dict().items()}
        sizes = torch.tensor([len(own) for own in self.sentences], dtype=torch.int64)
        sentences = torch.cat([self.anchors[:0], *self.sentences])
        held = {"anchors": self.anchors, "sentences": sentences, "sizes": sizes}
        parts = {"units": units, "means": self.means.state_dict()}
        if self.config.stat:
            parts["head"] = self.head.state_dict() | {"tasks": torch.tensor(self.tasks)}
        return held | flattened(parts)

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.sentences = list(state["sentences"].split(state["sizes"].tolist())) if len(state["sizes"]) else []
        self.units.load_state_dict(part(state, "units"))
        self.means = ClassMeans.from_state(part(state, "means"))
        if self.config.stat:
            head = part(state, "head")
            if not head:
                raise ResultError("engine: the state holds no discriminant head; set stat=0, or learn again")
            self.tasks = int(head.pop("tasks"))
            self._set_head(self.head.restored(head))


class _Batches:
    """Rows of images, and in every batch `replay` noisy copies of each old class's mean: one copy for the image and others
    for what its altered copies would be, side by side [I]."""

    def __init__(self, x: Tensor, y: Tensor, old: Tensor, noise: float, batch: int, replay: int):
        self.x, self.y, self.noise, self.batch = x, y, noise, batch
        self.old, self.names = old.repeat(replay, 1), torch.arange(len(old)).repeat(replay)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """One epoch for each generator; of the first one, `skip` batches are drawn and passed over."""
        return (islice(self._epoch(rng), 0 if i else skip, None) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        copies = self.x.shape[1] // self.old.shape[1]
        for rows in torch.randperm(len(self.x), generator=rng).split(self.batch):
            drawn = torch.cat([noisy(self.old, self.noise, rng) for _ in range(copies)], 1)
            yield torch.cat([self.x[rows], drawn]), torch.cat([self.y[rows], self.names])


def telling(sentences: Sequence[Float[Tensor, "_ d"]], described: Float[Tensor, "k d"]) -> Int[Tensor, "k k"]:
    """For classes a and b the number, among all sentences, of the one of a that tells it from b: the largest
    l . d_a - l . d_b."""
    found, start = [], 0
    for c, own in enumerate(sentences):
        likeness = own @ described.T
        found.append(start + (likeness[:, c : c + 1] - likeness).argmax(0))
        start += len(own)
    return torch.stack(found)

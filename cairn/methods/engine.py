"""ENGINE: descriptions and altered images teach two linear units per task, and sentences re-rank the likeliest classes.

Source: Zhou et al., External Knowledge Injection for CLIP-Based Class-Incremental Learning (ICCV 2025), arXiv 2503.08510.
Its abstract and a published summary with its equations were read, the paper was not, so none is cited by number. [P] marks
what they state: the units and their three losses, noisy class means for old classes (no image is kept), the re-ranking and
the figures of the schedule. [I] is ours. What differs: a description is written for a class, not for a pair of classes, so
a pair takes of each class the sentence that speaks most for it and against the other; images are altered more mildly than
by AutoAugment, and once instead of anew in every epoch; noise is a share of the mean's length (0.25 in each of 512
coordinates is 0.57 of a length of 10, about that of CLIP's embeddings).

Letters: x unit embedding of an image, x' those of its altered copies, p_c mean of class c; t_c unit text of class c, l its
unit sentences, d_c their unit mean; G_i, G_t the units of all tasks together; s scale; k classes, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, logsigmoid

from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.data.views import CHANCES, view
from cairn.errors import ConfigError
from cairn.maths.similarity import unit
from cairn.memory.means import ClassMeans
from cairn.methods.described import sentences_of
from cairn.methods.projector import Projector
from cairn.methods.protocol import FROZEN
from cairn.methods.stages import class_anchors
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.training.checkpoint import Checkpoint
from cairn.training.encode import encoded
from cairn.training.fit import fit
from cairn.training.log import Log
from cairn.training.schedule import Schedule
from cairn.training.seeds import Seeds
from cairn.types import Features, Labels, Pixels, Scores


class Config(BaseModel):
    """The settings of ENGINE."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    descriptions: str = Field(
        "data", description="data: what the data set brings; template: its prompt templates; or a JSON file"
    )
    text_weight: float = Field(1.0, ge=0, description="weight of L_t, class texts towards descriptions; 0: off [P: 1]")
    image_weight: float = Field(1.0, ge=0, description="weight of L_i, images towards altered ones; 0: off [P: 1]")
    views: int = Field(1, ge=1, description="altered copies of each image, made and embedded once [I]")
    noise: float = Field(
        0.5,
        ge=0,
        description="length of the noise on a class mean, as a share of the mean's [P: alpha = 0.25 per coordinate; I: a share]",
    )
    replay: int | None = Field(
        None, ge=0, description="noisy means per old class and batch; null: as many as images of a new one; 0: none [I]"
    )
    candidates: int = Field(5, ge=1, description="likeliest classes that are ranked anew; 1: none is [P: 5]")
    schedule: Schedule = Field(
        Schedule(epochs=10, batch=64, lr=0.05, optimizer="sgd"), description="training of the units [P]"
    )

    @property
    def alters_images(self) -> bool:
        """Whether other images than the given ones pass the tower."""
        return True

    @classmethod
    def embedding(cls) -> Config:
        """For precomputed embeddings: class texts stand in for descriptions, noise for altered images."""
        return cls(descriptions="template")


class ENGINE:
    """argmax_c f_c: the probability from s cos(G_i(x), G_t(t_c)) and, of the likeliest classes, how they do pair by pair."""

    encoder = FROZEN

    def __init__(self, towers: Towers, config: Config, *, seed: int, log: Log):
        if config.descriptions != "template" and not towers.has_images:
            raise ConfigError("descriptions: a features file has no text tower; set descriptions=template")
        self.towers, self.config, self.log, self.seeds = towers, config, log, Seeds(seed)
        self.device = torch.device(towers.device)
        names = ("visual", "textual")
        self.units = nn.ModuleDict({name: Projector(towers.dim) for name in names}).to(self.device)
        self.anchors = torch.zeros(0, towers.dim)
        self.means = ClassMeans.empty(towers.dim)
        self.sentences: list[Tensor] = []

    @property
    def counts(self) -> Labels:
        """Images each class was learned from."""
        return self.means.counts

    @property
    def needs_sentences(self) -> bool:
        return self.config.descriptions == "data"

    @property
    def memory_bytes(self) -> int:
        return self.means.bytes

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        config, s, d = self.config, self.towers.logit_scale, self.towers.dim
        seeds, log = self.seeds.at(task=task.index), self.log.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        new = class_anchors(self.towers, task, loader, log).cpu()
        self.anchors = torch.cat([self.anchors, new])
        self.sentences = self.sentences + self._embedded(task, new, log)
        x, y = self._with_views(task, seeds, checkpoint)

        # Units of this task; those before stand still, and all of them are added up [P].
        for projector in self.units.values():
            projector.grow()
        visual, textual = self.units["visual"], self.units["textual"]
        t, described = self.anchors.to(self.device), self._described().to(self.device)

        def loss(rows: Tensor, y: Tensor) -> Tensor:
            rows, y = rows.to(self.device).view(len(rows), -1, d), y.to(self.device)
            z, T = visual(rows[:, 0]), textual(t)
            L_c = cross_entropy(s * z @ T.T, y)
            L_t = -(T * described).sum(1)[y].mean()
            L_i = -cosine_similarity(z[:, None], rows[:, 1:], dim=2).mean()
            return L_c + config.text_weight * L_t + config.image_weight * L_i

        # The task's images, and noisy means of old classes in place of theirs [P].
        share = max(1, config.schedule.batch // len(y.unique()))
        replay = share if config.replay is None else config.replay
        batches = _Batches(x, y, self.means.means, config.noise, config.schedule.batch, replay)
        current = [projector.current for projector in self.units.values()]
        fit(loss, current, batches, config.schedule, seeds, log.at(stage=1), checkpoint)
        self.means = self.means.add(x[:, :d], y)

    def _embedded(self, task: Task, new: Float[Tensor, "k d"], log: Log) -> list[Float[Tensor, "_ d"]]:
        """Unit embeddings of the sentences of each new class; without a text tower its class text."""
        if not self.towers.has_images:
            return [text[None] for text in new]
        said = sentences_of(self.config.descriptions, task, log)
        return [unit(self.towers.text(sentences)).cpu() for sentences in said]

    def _with_views(
        self, task: Task, seeds: Seeds, checkpoint: Checkpoint | None
    ) -> tuple[Float[Tensor, "n w"], Labels]:
        """Unit embeddings of each image and behind it, in the same row, of its altered copies; and the labels."""
        n, views = len(task.train), self.config.views
        numbered = Subset(task.train, np.arange(n), np.arange(n))
        loader = Loader(numbered, self.towers.prepare, self.towers.pixels, batch=self.config.schedule.batch)
        rng = seeds.generator("views")
        y = torch.as_tensor(task.train.labels)
        if not self.towers.has_images:
            x, _ = encoded(loader, lambda pixels, _: unit(self.towers.image(pixels)), checkpoint, "X")
            return torch.cat([x, *(noisy(x, self.config.noise, rng) for _ in range(views))], 1), y
        chances = torch.rand(n, views, CHANCES, generator=rng)

        def rows(pixels: Pixels, numbers: Tensor) -> Tensor:
            altered = [view(pixels, chances[numbers, copy]) for copy in range(views)]
            return torch.cat([unit(self.towers.image(seen)) for seen in (pixels, *altered)], 1)

        return encoded(loader, rows, checkpoint, "X")[0], y

    def _described(self) -> Float[Tensor, "k d"]:
        """d_c."""
        return unit(torch.stack([own.mean(0) for own in self.sentences]))

    def forget(self, c: int) -> None:
        self.anchors = torch.cat([self.anchors[:c], self.anchors[c + 1 :]])
        self.means = self.means.without(c)
        self.sentences = self.sentences[:c] + self.sentences[c + 1 :]

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        """Logits of f_inj + f_pt."""
        s, x = self.towers.logit_scale, unit(features.to(self.device))
        injected = s * self.units["visual"](x) @ self.units["textual"](self.anchors.to(self.device)).T
        number = min(self.config.candidates, len(self.anchors))
        if number < 2:
            return injected
        best = injected.topk(number, 1).indices
        likeness = s * x @ torch.cat(self.sentences).to(self.device).T
        tuned = pairwise(likeness, best, telling(self.sentences, self._described()).to(self.device))
        whole = injected.logsumexp(1, keepdim=True)
        return injected.scatter(1, best, torch.logaddexp(injected.gather(1, best), whole + tuned))

    def state_dict(self) -> State:
        units = {name: value.cpu().clone() for name, value in self.units.state_dict().items()}
        sizes = torch.tensor([len(own) for own in self.sentences], dtype=torch.int64)
        sentences = torch.cat([self.anchors[:0], *self.sentences])
        held = {"anchors": self.anchors, "sentences": sentences, "sizes": sizes}
        return held | flattened({"units": units, "means": self.means.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.sentences = list(state["sentences"].split(state["sizes"].tolist())) if len(state["sizes"]) else []
        self.units.load_state_dict(part(state, "units"))
        self.means = ClassMeans.from_state(part(state, "means"))


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


def noisy(x: Float[Tensor, "n d"], noise: float, rng: torch.Generator) -> Float[Tensor, "n d"]:
    """x + e, e normal with standard deviation noise |x| / sqrt(d) in every direction."""
    return x + noise * x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5 * torch.randn(x.shape, generator=rng)


def telling(sentences: Sequence[Float[Tensor, "_ d"]], described: Float[Tensor, "k d"]) -> Int[Tensor, "k k"]:
    """For classes a and b the number, among all sentences, of the one of a that tells it from b: the largest
    l . d_a - l . d_b."""
    found, start = [], 0
    for c, own in enumerate(sentences):
        likeness = own @ described.T
        found.append(start + (likeness[:, c : c + 1] - likeness).argmax(0))
        start += len(own)
    return torch.stack(found)


def pairwise(
    likeness: Float[Tensor, "n l"], best: Int[Tensor, "n b"], telling: Int[Tensor, "k k"]
) -> Float[Tensor, "n b"]:
    """log f_pt: of each of the `best` classes a, the log of the mean over the others b of softmax(h_ab, h_ba)_a.

    h_ab is the scaled cosine of the image with the sentence that tells a from b, as the frozen towers give it.
    """
    h = likeness.gather(1, telling[best[:, :, None], best[:, None, :]].flatten(1)).unflatten(1, (best.shape[1], -1))
    wins = logsigmoid(h - h.transpose(1, 2))
    wins = wins.masked_fill(torch.eye(best.shape[1], dtype=torch.bool, device=wins.device), float("-inf"))
    return wins.logsumexp(2) - np.log(best.shape[1] - 1)

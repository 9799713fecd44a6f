"""SPA: descriptions choose the patches of an image that count, transport aligns the two, small projectors adapt.

Source: "Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning" (arXiv 2605.13835). Only the abstract is
public. [P] marks what it says: semantic-guided selection of patches, optimal transport between patches and description
tokens, task-specific projectors, Gaussian pseudo-features for old classes. What is marked [K] (nearest published
practice) or [I] (ours) is a setting with a documented default; docs/deviations.md lists them all.

Both towers stay frozen, so the local score of an image and a class is a number that never changes: it is computed when
the image passes the tower, once, and training sees embeddings and numbers alone.

Letters: z unit embedding of the image, p_i its unit patches; t_c unit text of class c, d_cl its description tokens;
g, h projectors; S_c local score; s scale. Every class has a Gaussian in z.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cairn.data.descriptions import read_descriptions, written_by
from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.errors import ConfigError, DataError
from cairn.maths.alignment import aligned, local_scores, padded_tokens
from cairn.maths.shrinkage import Oas, Shrinkage
from cairn.maths.similarity import unit
from cairn.memory.covariances import Covariance, Full
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.settings import kind_by_name
from cairn.methods.stages import class_anchors
from cairn.towers.clip import filled
from cairn.towers.patches import Attention
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part, spelled, words
from cairn.training.fit import fit
from cairn.training.log import Log
from cairn.training.schedule import Schedule
from cairn.training.seeds import Seeds
from cairn.types import Features, Pixels, Scores


class Local(BaseModel):
    """The patch branch: which patches and tokens meet, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(0.5, ge=0, description="lambda, weight of the local score; 0: no patches [I]")
    attention: Attention = Field("value", description="in the last block, for patches: native or value [K]")
    tokens: Literal["sentences", "words"] = Field(
        "sentences", description="one token per sentence, or one per word of it [I]"
    )
    patches: int | None = Field(16, ge=2, description="K, patches chosen per class; null: all, no selection [I]")
    guide: Literal["max", "mean"] = Field("max", description="a patch's score over the description tokens [I]")
    transport: bool = Field(True, description="false: mean of maxima in place of the transport plan [P: true]")
    eps: float = Field(0.1, gt=0, description="entropy of the plan; the cost is 1 - cos [I]")
    iterations: int = Field(100, ge=1, description="Sinkhorn sweeps [I]")
    best: int | None = Field(
        None, ge=1, description="m, classes per image that get a local score, by the class token; null: all [I]"
    )


class Config(BaseModel):
    """The settings of SPA."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    descriptions: str = Field(
        "data", description="data: what the data set brings; template: its prompt templates; or a JSON file"
    )
    local: Local = Field(Local())
    covariance: Covariance = Field(
        Full(), description="what is kept of a class: full, low_rank, diagonal or shared [I]"
    )
    shrinkage: Shrinkage = Field(Oas(), description="how a covariance of few images is made usable: oas or ridge [I]")
    replay: int = Field(4, ge=0, description="pseudo-features per old class and batch; 0: no replay [K: AREA]")
    schedule: Schedule = Field(
        Schedule(epochs=10, batch=64, lr=0.05, optimizer="sgd"),
        description="training of the projectors; epochs=0: none [K: ENGINE, AREA]",
    )

    _kinds = field_validator("covariance", "shrinkage", mode="before")(kind_by_name)

    @classmethod
    def embedding(cls) -> Config:
        """The class-token form, for precomputed embeddings: projectors and replay, no patches."""
        return cls(local=Local(weight=0.0), descriptions="template")


class Projector(nn.Module):
    """x -> unit(x + sum_b G_b x), G_b trained on task b from zero; those of finished tasks are one matrix [P]."""

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("finished", torch.zeros(d, d))
        self.current = nn.Parameter(torch.zeros(d, d))

    def grow(self) -> None:
        """The current task's map joins the finished ones; a new one starts at zero."""
        self.finished += self.current.detach()
        self.current = nn.Parameter(torch.zeros_like(self.finished))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return unit(x + x @ (self.finished + self.current).T)


class SPA:
    """argmax_c s (cos(g(z), h(t_c)) + lambda S_c)."""

    encoder = "frozen"

    def __init__(self, towers: Towers, config: Config, *, seed: int, log: Log):
        if config.local.weight and not towers.has_images:
            raise ConfigError("local.weight: a features file has no patches; set local.weight=0")
        self.towers, self.config, self.log, self.seeds = towers, config, log, Seeds(seed)
        self.visual, self.textual = (Projector(towers.dim).to(_device(towers)) for _ in range(2))
        self.anchors = torch.zeros(0, towers.dim)
        self.sentences: list[tuple[str, ...]] = []
        self.memory = GaussianMemory(towers.dim, covariance=config.covariance, shrinkage=config.shrinkage)
        self._tokens: list[Tensor] = []
        self._padded = torch.zeros(0, 1, towers.dim), torch.zeros(0, 1)

    @property
    def memory_bytes(self) -> int:
        return self.memory.bytes

    def learn(self, task: Task) -> None:
        seeds, log = self.seeds.at(task=task.index), self.log.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=self.config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, log).cpu()])
        if self.config.local.weight:
            self._describe(self._said(task, log))

        # One pass of the frozen tower: the embedding and, class by class, the local score. Patches are not kept.
        z, S, y = self._encoded(loader)

        # Task-specific projectors: this task's start at zero, those before stand still [P].
        old = self.memory
        self.visual.grow()
        self.textual.grow()
        s, T = self.towers.logit_scale, self.anchors.to(z.device)

        def loss(rows: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
            x, local = rows
            scores = s * (self.visual(x) @ self.textual(T).T + self.config.local.weight * local)
            return cross_entropy(scores, labels.to(scores.device))

        batches = _Batches(z, S, y, old, self.config.schedule.batch, self.config.replay)
        fit(loss, [self.visual.current, self.textual.current], batches, self.config.schedule, seeds, log.at(stage=1))

        # Statistics of the new classes; the encoder never moves, so they never need calibration [P].
        self.memory = old.add(z.cpu(), y.cpu())

    def embed(self, pixels: Pixels) -> Features:
        """The image's embedding and behind it, in the same row, its unit patches one after the other."""
        if not self.config.local.weight:
            return self.towers.image(pixels)
        z, p = self.towers.image_and_patches(pixels, self.config.local.attention)
        return torch.cat([z, unit(p.flatten(0, 1)).view(len(z), -1)], 1)

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        d, s = self.towers.dim, self.towers.logit_scale
        features = features.to(self.visual.finished.device)
        T = self.textual(self.anchors.to(features.device))
        return s * (self.visual(unit(features[:, :d])) @ T.T + self.config.local.weight * self._local(features, T))

    # the patch branch

    @torch.no_grad()
    def reasons(self, pixels: Pixels, best: int = 3) -> list[dict[str, Any]]:
        """Why one image (1 x 3 x h x w) looks like each of its `best` classes, the likeliest first.

        Per class: `class` (arrival number), `score`, `global` (cosine of the class token), `local` (S), and `patches`:
        the number of each chosen patch (row by row from the top left), its share of all transported likeness
        sum_l P_li cos_li / S, and the sentence that most of it was transported to.

        Raises ConfigError without patches, ValueError for more than one image.
        """
        if not self.config.local.weight:
            raise ConfigError("local.weight is 0: without patches there is nothing to show")
        if len(pixels) != 1:
            raise ValueError(f"{len(pixels)} images: one at a time")
        features = self.embed(pixels)
        d, how = self.towers.dim, self._how()
        T = self.textual(self.anchors.to(features.device))
        z, p = self.visual(unit(features[:, :d])) @ T.T, features[0, d:].view(-1, d)
        scores = self.scores(features)[0]
        found = []
        for c in scores.topk(min(best, len(scores))).indices.tolist():
            tokens = self._tokens[c]
            weights = tokens.new_full((1, 1, len(tokens)), 1 / len(tokens))
            cos = (tokens @ p.T)[None, None]
            alignment = aligned(cos, weights, **how)
            chosen, P = alignment.chosen[0, 0], alignment.plan[0, 0]
            gain = (P * cos[0, 0][:, chosen]).sum(0) / alignment.score[0, 0]
            to = P.argmax(0).tolist()
            patches = [
                {"patch": patch, "share": share, "sentence": self._sentence(c, token)}
                for patch, share, token in zip(chosen.tolist(), gain.tolist(), to, strict=True)
            ]
            found.append(
                {"class": c, "score": scores[c].item(), "global": z[0, c].item(),
                 "local": alignment.score[0, 0].item(), "patches": patches}
            )  # fmt: skip
        return found

    def _sentence(self, c: int, token: int) -> str:
        """The sentence that a token of class c belongs to."""
        if self.config.local.tokens == "sentences":
            return self.sentences[c][token]
        for sentence in self.sentences[c]:
            token -= len(self.towers.tokens(sentence))
            if token < 0:
                return sentence
        raise IndexError(f"class {c} has no token {token}")

    def _how(self) -> dict[str, Any]:
        return self.config.local.model_dump(include={"patches", "guide", "transport", "eps", "iterations"})

    def _said(self, task: Task, log: Log) -> tuple[tuple[str, ...], ...]:
        """The sentences of the task's classes."""
        choice = self.config.descriptions
        if choice == "template":
            log("notice", text="descriptions=template: class names in templates stand in for visual descriptions")
            filled_in = {name: [filled(template, name) for template in task.templates] for name in task.names}
            return written_by("templates", filled_in).of(task.names)
        if choice != "data":
            return read_descriptions(choice).of(task.names)
        if task.descriptions is None:
            raise DataError(
                "descriptions: the data set brings none; run `cairn describe` and set descriptions=FILE, or set "
                "descriptions=template"
            )
        return task.descriptions.of(task.names)

    def _describe(self, sentences: tuple[tuple[str, ...], ...]) -> None:
        """Description tokens of new classes."""
        for own in sentences:
            by_word = self.config.local.tokens == "words"
            tokens = torch.cat(self.towers.word_tokens(own)) if by_word else self.towers.text(own)
            self._tokens.append(unit(tokens).to(_device(self.towers)))
        self.sentences += sentences
        self._padded = padded_tokens(self._tokens)

    def _local(self, features: Features, T: Float[Tensor, "k d"]) -> Scores:
        """S of every image and class; zero without patches."""
        d, choice = self.towers.dim, self.config.local
        if not choice.weight:
            return features.new_zeros(len(features), len(T))
        z, p = features[:, :d], features[:, d:].unflatten(1, (-1, d))
        candidates = None
        if choice.best is not None and choice.best < len(T):
            candidates = (self.visual(unit(z)) @ T.T).topk(choice.best, dim=1).indices
        return local_scores(p, *self._padded, candidates, **self._how())

    @torch.no_grad()
    def _encoded(self, loader: Loader) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings, local scores against the classes so far, and labels of the task's images."""
        rows, T = [], self.textual(self.anchors.to(_device(self.towers)))
        for pixels, labels in loader:
            features = self.embed(pixels)
            rows.append((unit(features[:, : self.towers.dim]), self._local(features, T), labels))
        z, S, y = (torch.cat(column) for column in zip(*rows, strict=True))
        return z, S, y.to(z.device)

    # on disk

    def state_dict(self) -> State:
        projectors = {"visual": self.visual.state_dict(), "textual": self.textual.state_dict()}
        sizes = torch.tensor([len(tokens) for tokens in self._tokens], dtype=torch.int64)
        tokens = torch.cat(self._tokens).cpu() if self._tokens else torch.zeros(0, self.towers.dim)
        said = words([sentence for own in self.sentences for sentence in own])
        counts = torch.tensor([len(own) for own in self.sentences], dtype=torch.int64)
        held = {"anchors": self.anchors, "tokens": tokens, "sizes": sizes, "sentences": said, "counts": counts}
        return held | flattened({**projectors, "memory": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.visual.load_state_dict(part(state, "visual"))
        self.textual.load_state_dict(part(state, "textual"))
        self.memory = GaussianMemory.from_state(part(state, "memory"), self.config.covariance, self.config.shrinkage)
        self._tokens = list(state["tokens"].to(_device(self.towers)).split(state["sizes"].tolist()))
        if self._tokens:
            self._padded = padded_tokens(self._tokens)
        said = iter(spelled(state["sentences"]))
        self.sentences = [tuple(next(said) for _ in range(count)) for count in state["counts"].tolist()]


class _Batches:
    """Real rows with their local scores; pseudo-features of old classes, which have no patches, with local scores 0."""

    def __init__(self, z: Tensor, S: Tensor, y: Tensor, old: GaussianMemory, batch: int, per_class: int):
        self.z, self.S, self.y, self.old, self.batch, self.per_class = z, S, y, old, batch, per_class

    def __len__(self) -> int:
        return -(-len(self.z) // self.batch)

    def epoch(self, rng: torch.Generator) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for rows in torch.randperm(len(self.z), generator=rng).split(self.batch):
            x, local, y = self.z[rows], self.S[rows], self.y[rows]
            if self.per_class and self.old.classes:
                drawn, names = self.old.draw(self.per_class, rng)
                x, y = torch.cat([x, unit(drawn).to(x.device)]), torch.cat([y, names.to(y.device)])
                local = torch.cat([local, local.new_zeros(len(names), local.shape[1])])
            yield (x, local), y


def _device(towers: Towers) -> torch.device:
    return torch.device(getattr(towers, "device", "cpu"))

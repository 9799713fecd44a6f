"""SPA: descriptions choose the patches of an image that count, transport aligns the two, small projectors adapt.

Source: "Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning" (arXiv 2605.13835). Only the abstract is
public. [P] marks what it says: semantic-guided selection of patches, optimal transport between patches and description
tokens, task-specific projectors, Gaussian pseudo-features for old classes. What is marked [K] (nearest published
practice) or [I] (ours) is a setting with a documented default; docs/methods.md lists them all.

Both towers stay frozen. Which patches of an image count depends on the image and on the descriptions of the first task's
classes, the guides: it is computed when the image passes the tower, once, and training sees embeddings alone. What the patches
that count look like is one vector, the local feature; a class has a Gaussian over the image's embedding and its local feature
together, so that old classes are replayed in both. Later classes change neither. With `local.among=seen` all classes seen are
guides; the local feature of an old image then changes as classes come, and its Gaussian does not.

Letters: z unit embedding of the image, p_i its unit patches, v its unit local feature; t_c unit text of class c, d_cl its
description tokens, d_c their unit mean; g, h projectors of z and t, g', h' of v and d; S_c local score; s scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.alignment import aligned, local_features, local_scores, padded_tokens
from cairn.maths.losses import mean_squared_distance
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, kept_bytes
from cairn.methods.parts.described import sentences_of
from cairn.methods.parts.prior import PriorWeight
from cairn.methods.parts.projector import Projectors, UnitLength
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import (
    FROZEN,
    Card,
    CosineForm,
    CosineScoring,
    DescribedClasses,
    GaussianScoring,
    NamesClasses,
    PatchReasons,
)
from cairn.settings import Settings
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Attention, Features, Pixels, Scores, State, flattened, part, spelled, words


class Local(Settings):
    """The patch branch: which patches and tokens meet, and what becomes of it."""

    weight: float = Field(default=1.0, ge=0, description="lambda, weight of the local score; 0: no patches [I]")
    score: Literal["feature", "plan"] = Field(
        default="feature",
        description="S_c: cos(g'(v), h'(d_c)), trained and replayed, or the plan's own sum P cos, as it is [I]",
    )
    attention: Attention = Field(default="value", description="in the last block, for patches: native or value [K]")
    tokens: Literal["sentences", "words"] = Field(
        default="sentences", description="one token per sentence, or one per word of it [I]"
    )
    patches: int | None = Field(
        default=24, ge=2, description="K, patches chosen per class; null: all, no selection [I]"
    )
    guide: Literal["max", "mean"] = Field(default="max", description="a patch's score over the description tokens [I]")
    transport: bool = Field(
        default=True, description="false: every patch to its best token, in place of the plan [P: true]"
    )
    eps: float = Field(default=0.1, gt=0, description="entropy of the plan; the cost is 1 - cos [I]")
    iterations: int = Field(default=100, ge=1, description="Sinkhorn sweeps [I]")
    best: int | None = Field(
        default=5,
        ge=1,
        description="m, classes per image whose descriptions look at it, by the class token; null: all [I]",
    )
    among: Literal["first", "seen"] = Field(
        default="first",
        description="for the local feature, where those classes are sought: among the first task's, so that it never changes, or "
        "among all seen [I]",
    )
    training_guide: Literal["image", "label"] = Field(
        default="image", description="who names those classes in training: the image, as in testing, or its label [I]"
    )


class SpaConfig(GaussianSettings):
    """The settings of SPA."""

    descriptions: str = Field(
        default="data", description="data: what the data set brings; template: its prompt templates; or a JSON file"
    )
    local: Local = Field(default=Local())
    replay: int | None = Field(
        default=None,
        ge=0,
        description="pseudo-features per old class and batch; null: as many as of a new one; 0: none [K: AREA, 4]",
    )
    prior: float | None = Field(
        default=None,
        ge=0,
        description="weight of the squared distance of what the projectors give from what they are given [K: KgCoOp, 8, on texts]; "
        "null: where classes have fewer than 8 images, chosen by images left out, else 0 [I]",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=20, batch=64, lr=0.05, optimizer="sgd"),
        description="training of the projectors; epochs=0: none [K: ENGINE, AREA, 10 epochs]",
    )

    @classmethod
    def embedding(cls) -> SpaConfig:
        """The class-token form, for precomputed embeddings: projectors and replay, no patches."""
        return cls(local=Local(weight=0.0), descriptions="template")


class SPA(CosineScoring, GaussianScoring[GaussianMemory], PatchReasons, DescribedClasses, NamesClasses):
    """argmax_c s (cos(g(z), h(t_c)) + lambda S_c)."""

    card = Card(
        title="SPA: patches chosen by descriptions",
        source="arXiv 2605.13835",
        citation="Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning. arXiv 2605.13835.",
        config=SpaConfig,
        stages=(
            "one pass: descriptions choose patches, transport weighs them into the local feature",
            "projectors of the task on class token and local feature, old classes drawn in both",
            "statistics: a Gaussian per new class",
        ),
        trains="projectors",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: kept_bytes(k, 2 * d),
        needs="images; descriptions help if the towers can read them",
        passes="one per image, can be cached",
        text=True,
        older={"local": {"among": "seen"}, "prior": 0.0},
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: SpaConfig, *, seed: int):
        if config.local.weight and not towers.has_images:
            raise ConfigError("local.weight: a features file has no patches; set local.weight=0")
        self.towers, self.config = towers, config
        # Whether rows are [z ; v]; otherwise they are z alone.
        self.two = config.local.weight > 0 and config.local.score == "feature"
        names = ("visual", "textual", "local_visual", "local_textual")[: 4 if self.two else 2]
        self.projectors = Projectors(towers.dim, names).to(towers.device)
        self.anchors = torch.zeros(0, towers.dim)
        self.sentences: list[tuple[str, ...]] = []
        # Classes 0..guides-1 are those of the first task.
        self.guides = 0
        width = towers.dim * (2 if self.two else 1)
        self.memory = config.memory(width)
        self.prior_weight = PriorWeight(config.prior)
        self._tokens: list[Tensor] = []
        self._padded = self._nothing_said()

    def learn(self, task: Task, ctx: Context) -> None:
        config, s = self.config, self.towers.logit_scale
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, ctx.log).cpu()])
        self.guides = self.guides or len(self.anchors)
        if config.local.weight:
            sentences = sentences_of(config.descriptions, task, ctx.log)
            self.sentences += sentences
            self._tokens += self._described(sentences)
            self._padded = padded_tokens(self._tokens)

        # One pass of the frozen tower: descriptions choose patches, transport weighs them [P]. Patches are not kept.
        x, S, y = encode(loader, self._seen, ctx, "rows", embed=self.embed)
        x, S, y = (column.to(self.towers.device) for column in (x, S, y))

        # Task-specific projectors: this task's start at zero, those before stand still [P].
        old = self.memory
        self.projectors.grow()
        current = self.projectors.current

        def loss(rows: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
            """CE(s (cos(g(z), h(t_c)) + lambda S_c), y)."""
            x, S = rows
            return cross_entropy(s * (self._cosines(x) + config.local.weight * S), labels.to(x.device))

        share = max(1, config.schedule.batch // len(y.unique()))
        replay = share if config.replay is None else config.replay

        def train(rows: Tensor, weight: float, ctx: Context) -> None:
            def with_prior(given: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
                value = loss(given, labels)
                return value + weight * self._displacement(given[0]) if weight else value

            batches = _Batches(x[rows], S[rows], y[rows], old, config.schedule.batch, replay, self.on_sphere)
            fit(with_prior, current, batches, config.schedule, ctx.logged_at(stage=1))

        def left_out_loss(rows: Tensor) -> Tensor:
            return loss((x[rows], S[rows]), y[rows])

        # With few images a prior keeps the projectors near the identity [K: KgCoOp, of texts].
        weight = self.prior_weight.chosen(y, old.counts, current, train, left_out_loss, ctx)
        train(torch.arange(len(y)), weight, ctx)
        old.tell_repairs(ctx.log)

        # Statistics of the new classes. Nothing of them moves later [P], unless all classes seen choose patches (`_seen`).
        self.memory = old.add(x.cpu(), y.cpu())

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.memory = self.memory.without(c)
        if c < self.guides:  # the last guide gives way to the oldest class that is left
            self.guides = max(self.guides - 1, min(1, len(self.anchors)))
        if self._tokens:
            del self._tokens[c], self.sentences[c]
            self._padded = padded_tokens(self._tokens) if self._tokens else self._nothing_said()

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text and its sentences. What the projectors were trained to, with the old ones, stays; so do the Gaussians
        of local features, for whose patches these sentences may have looked."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)
        if self.config.local.weight:
            (self._tokens[c],) = self._described(sentences := sentences_of(self.config.descriptions, named, log))
            (self.sentences[c],) = sentences
            self._padded = padded_tokens(self._tokens)

    def embed(self, pixels: Pixels) -> Features:
        """The image's embedding and behind it, in the same row, its unit patches one after the other."""
        if not self.config.local.weight:
            return self.towers.image(pixels)
        z, p = self.towers.image_and_patches(pixels, self.config.local.attention)
        return torch.cat([z, unit(p.flatten(0, 1)).view(len(z), -1)], 1)

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        x, S = self._seen(features.to(self.towers.device), None)
        return self.row_scores(x) + self.towers.logit_scale * self.config.local.weight * S

    def memory_rows(self, features: Features) -> Float[Tensor, "n w"]:
        """Rows as the memory holds them."""
        return self._seen(features.to(self.towers.device), None)[0]

    @torch.no_grad()
    def row_scores(self, x: Float[Tensor, "n w"]) -> Scores:
        """What rows alone say: of an image, all but the plan's own score, where that counts."""
        return self.towers.logit_scale * self._cosines(x.to(self.towers.device))

    def _cosines(self, x: Float[Tensor, "n w"]) -> Float[Tensor, "n k"]:
        """cos(g(z), h(t_c)), and where rows are [z ; v] also lambda cos(g'(v), h'(d_c))."""
        d, project = self.towers.dim, self.projectors
        scores = self._global(x[:, :d])
        if not self.two:
            return scores
        local = project["local_visual"](x[:, d:]) @ project["local_textual"](self._said()).T
        return scores + self.config.local.weight * local

    def _said(self) -> Features:
        """d_c, one unit row per class."""
        D, b = self._padded
        return unit((D * b[..., None]).sum(1))

    def _displacement(self, x: Float[Tensor, "n w"]) -> Float[Tensor, ""]:
        """mean_i |g(z_i) - z_i|^2 + mean_c |h(t_c) - t_c|^2, and where rows are [z ; v] the same of g'(v_i) and h'(d_c)."""
        given: dict[str, Tensor] = dict(zip(("visual", "local_visual"), x.split(self.towers.dim, 1), strict=False))
        given["textual"] = self.anchors.to(x.device)
        if self.two:
            given["local_textual"] = self._said()
        distances = [mean_squared_distance(self.projectors[name](rows), rows) for name, rows in given.items()]
        return torch.stack(distances).sum()

    def _global(self, z: Features) -> Scores:
        """cos(g(z), h(t_c))."""
        return self.projectors["visual"](z) @ self.projectors["textual"](self.anchors.to(z.device)).T

    def on_sphere(self, x: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """Draws from the memory, where rows of images lie: z and v apart."""
        return unit(x.view(-1, self.towers.dim)).view(x.shape)

    @property
    @torch.no_grad()
    def class_matrix(self) -> Features:
        """h(t_c)."""
        return self.projectors["textual"](self.anchors.to(self.towers.device))

    def vision(self) -> nn.Module:
        return nn.Sequential(self.towers.vision(), UnitLength(), copy.deepcopy(self.projectors["visual"]))

    def cosine_form(self) -> CosineForm:
        if self.config.local.weight:
            raise ConfigError("local.weight: the scores of patches are no cosines of class vectors; set local.weight=0")
        return super().cosine_form()

    @property
    def needs_sentences(self) -> bool:
        return self.has_reasons and self.config.descriptions == "data"

    # the patch branch

    @property
    def has_reasons(self) -> bool:
        """Whether patches are looked at."""
        return self.config.local.weight > 0

    def patch_grid(self, features: Features) -> int:
        """Patches along a side of the images behind the features."""
        return math.isqrt(features.shape[1] // self.towers.dim - 1)

    @torch.no_grad()
    def reasons(self, features: Features, best: int = 3) -> list[dict[str, Any]]:
        """Why one image, as `embed` gives it (1 x w), looks like each of its `best` classes, the likeliest first.

        Per class: `class` (arrival number), `score`, `global` (cosine of the class token), `local` (S), and `patches`:
        the number of each chosen patch (row by row from the top left), its share of all transported likeness (sums to
        1), and the sentence that most of it was transported to.

        Raises ConfigError without patches, ValueError for more than one image.
        """
        if not self.has_reasons:
            raise ConfigError("local.weight is 0: without patches there is nothing to show")
        if len(features) != 1:
            raise ValueError(f"{len(features)} images: one at a time")
        d, s, how = self.towers.dim, self.towers.logit_scale, self._how()
        p, scores = features[0, d:].view(-1, d), self.scores(features)[0]
        cls = self._global(unit(features[:, :d]))[0]
        local = (scores / s - cls) / self.config.local.weight
        found = []
        for c in scores.topk(min(best, len(scores))).indices.tolist():
            tokens = self._tokens[c]
            weights = tokens.new_full((1, 1, len(tokens)), 1 / len(tokens))
            cos = (tokens @ p.T)[None, None]
            alignment = aligned(cos, weights, **how)
            chosen, share = alignment.chosen[0, 0], alignment.share[0, 0]
            to = alignment.plan[0, 0].argmax(0).tolist()
            patches = [
                {"patch": patch, "share": share, "sentence": self._sentence(c, token)}
                for patch, share, token in zip(chosen.tolist(), share.tolist(), to, strict=True)
            ]
            found.append(
                {
                    "class": c,
                    "score": scores[c].item(),
                    "global": cls[c].item(),
                    "local": local[c].item(),
                    "patches": patches,
                }
            )
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

    def _nothing_said(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(0, 1, self.towers.dim), torch.zeros(0, 1)

    def _how(self) -> dict[str, Any]:
        return self.config.local.model_dump(include={"patches", "guide", "transport", "eps", "iterations"})

    def _described(self, sentences: Sequence[tuple[str, ...]]) -> list[Tensor]:
        """The unit tokens of each class's sentences."""
        read = self.towers.word_tokens if self.config.local.tokens == "words" else None
        rows = [self.towers.text(own) if read is None else torch.cat(read(own)) for own in sentences]
        return [unit(tokens).to(self.towers.device) for tokens in rows]

    def _seen(self, features: Features, labels: Tensor | None) -> tuple[Float[Tensor, "n w"], Scores]:
        """What scoring and training need of embedded images: rows z or [z ; v], and the plan's scores, if those count.

        The classes that look at an image are its m best by cos(z, t_c), weighted by their softmax; with `labels`, in
        training, its own class alone. For v they are sought among the guides, so that it depends on the image alone: among all
        classes seen v would be another, for an old image, than the one that the memory learned, as soon as a later class is
        among the m best. Nothing of this depends on a projector.
        """
        d, choice, s = self.towers.dim, self.config.local, self.towers.logit_scale
        z, T = unit(features[:, :d]), self.anchors.to(features.device)
        nothing = z.new_zeros(len(z), len(T))
        if not choice.weight:
            return z, nothing
        p, cls = features[:, d:].unflatten(1, (-1, d)), s * z @ T.T
        among = self.guides if self.two and choice.among == "first" else len(T)
        likely, candidates = cls[:, :among].topk(min(choice.best or among, among), dim=1)
        if self.two:
            prior = torch.softmax(likely, 1)
            if labels is not None and choice.training_guide == "label":
                candidates, prior = labels.to(z.device)[:, None], prior.new_ones(len(z), 1)
            return torch.cat([z, local_features(p, *self._padded, candidates, prior, **self._how())], 1), nothing
        some = candidates if candidates.shape[1] < len(T) else None
        return z, local_scores(p, *self._padded, some, **self._how())

    # on disk

    def state_dict(self) -> State:
        sizes = torch.tensor([len(tokens) for tokens in self._tokens], dtype=torch.int64)
        tokens = torch.cat(self._tokens).cpu() if self._tokens else torch.zeros(0, self.towers.dim)
        said = words([sentence for own in self.sentences for sentence in own])
        counts = torch.tensor([len(own) for own in self.sentences], dtype=torch.int64)
        held = {"anchors": self.anchors, "tokens": tokens, "sizes": sizes, "sentences": said, "counts": counts}
        held["guides"] = torch.tensor(self.guides)
        projectors = {name: value.cpu().clone() for name, value in self.projectors.state_dict().items()}
        parts = {"projectors": projectors, "memory": self.memory.state_dict(), "prior": self.prior_weight.state_dict()}
        return held | flattened(parts)

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        # Earlier versions had all classes seen for guides
        self.guides = int(state["guides"]) if "guides" in state else len(self.anchors)
        self.projectors.load_state_dict(part(state, "projectors"))
        self.memory = self.memory.restored(part(state, "memory"))
        self.prior_weight.load_state_dict(part(state, "prior"))
        self._tokens = list(state["tokens"].to(self.towers.device).split(state["sizes"].tolist()))
        if self._tokens:
            self._padded = padded_tokens(self._tokens)
        said = iter(spelled(state["sentences"]))
        self.sentences = [tuple(next(said) for _ in range(count)) for count in state["counts"].tolist()]


class _Batches:
    """Real rows with the plan's scores, and pseudo-features of old classes, made where those lie, which have no patches: scores 0."""

    def __init__(
        self,
        x: Tensor,
        S: Tensor,
        y: Tensor,
        old: GaussianMemory,
        batch: int,
        per_class: int,
        on_sphere: Callable[[Tensor], Tensor],
    ):
        self.x, self.S, self.y, self.old = x, S, y, old
        self.batch, self.per_class, self.on_sphere = batch, per_class, on_sphere

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def epochs(
        self, rngs: Sequence[torch.Generator], skip: int = 0
    ) -> Iterator[Iterator[tuple[tuple[Tensor, Tensor], Tensor]]]:
        """One epoch for each generator; of the first one, `skip` batches are drawn and passed over."""
        return (islice(self._epoch(rng), 0 if i else skip, None) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for rows in torch.randperm(len(self.x), generator=rng).to(self.x.device).split(self.batch):
            x, S, y = self.x[rows], self.S[rows], self.y[rows]
            if self.per_class and self.old.classes:
                (drawn,), names = self.old.draws(self.per_class, [rng], device=x.device)
                x, y = torch.cat([x, self.on_sphere(drawn)]), torch.cat([y, names.to(y.device)])
                S = torch.cat([S, S.new_zeros(len(names), S.shape[1])])
            yield (x, S), y

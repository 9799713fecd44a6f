"""Joint training: after each task, everything is fitted anew on the images of *all* tasks so far.

It keeps every image, so it is no class-incremental method: it is the upper bound of every table. A bound must not depend on
whether training the towers pays on a data set. So a fifth of the images of each class is held out while the towers are trained
(both stages of DMC on all the others), and chooses how much what they were and what they have become has to say. The test split
has no part in it.

Five classifiers are pooled: class texts as they came and as they were trained, each with the embeddings they belong to, a kernel
ridge regression on either embedding, and `blend`, whose sums do not depend on the order of learning. On the images held out
the ridges are chosen, the weights of the pool found, and which of the classifiers have a part in it: blend alone, the
regressions beside it, or the texts, too, if by more than chance they tell more images right. For this a second blend learns all
images but these; the regressions learn them afterwards. Where nothing trains the encoder, there is one embedding and one
regression; where no image can be held out, blend, which weighs its parts without, is alone.

Letters: f image encoder; z = f(x)/|f(x)|, z0 that of the towers as they came; f_j score of classifier j, w_j its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cairn.data.images import Concatenation, Subset
from cairn.data.loading import Loader
from cairn.data.stream import without_class
from cairn.data.task import Task
from cairn.maths.losses import class_cross_entropy
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.blend import Blend, BlendConfig
from cairn.methods.parts.kernel_ridge import KernelRidge
from cairn.methods.parts.pooled import best_pool, pooled
from cairn.methods.parts.stages import (
    BOUND,
    TextStage,
    VisionStage,
    align_text,
    align_vision,
    behind_trunk,
    class_anchors,
    rename_text,
    renamed_anchors,
)
from cairn.methods.protocol import Card, HoldsOut, KeepsImages, NamesClasses
from cairn.settings import Settings
from cairn.towers.protocol import Towers
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context, Log, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part


class JointConfig(Settings):
    """Both stages of DMC, given everything at once."""

    stage1: VisionStage = Field(default=BOUND)
    stage2: TextStage = Field(default=TextStage(schedule=Schedule(epochs=3, batch=128, lr=0.2)))
    restart: bool = Field(
        default=False, description="start from the pretrained weights after each task; else train on from the last"
    )
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="share of each class's images that chooses the ridge and weighs the classifiers",
    )

    @classmethod
    def embedding(cls) -> JointConfig:
        return cls(stage1=VisionStage.embedding().model_copy(update={"classes": "seen"}), stage2=TextStage())


class Joint(KeepsImages, HoldsOut, NamesClasses):
    """argmax_c sum_j w_j f_jc, everything fitted on all images seen so far."""

    card = Card(
        title="Joint training on all images so far (upper bound)",
        source="the field's upper bound",
        citation="The joint-training bound of the class-incremental literature.",
        config=JointConfig,
        stages=(
            "both stages of DMC on all images so far but a fifth",
            "that fifth weighs what was trained against the towers as they came",
            "kernel ridge regression, and blend, on all images so far",
        ),
        trains="vision, then text",
        keeps="images",
        bytes=lambda k, d, n, i, w: n * i,
        needs="images, all of them, always; texts help",
        passes="one per image so far and epoch, with gradients",
        text=True,
        moves=True,
        former={"stage1": {"margin": 0.0}},
        quick={
            "stage1.schedule.epochs": 1,
            "stage1.schedule.batch": 8,
            "stage1.schedule.lr": 1e-3,
            "stage2.schedule.epochs": 2,
            "stage2.schedule.batch": 8,
        },
    )

    def __init__(self, towers: Towers, config: JointConfig, *, seed: int):
        self.towers, self.config, self.seed = towers, config, seed
        self.tasks: list[Task] = []
        self.out: list[Tensor] = []
        """Of each task, which of its images are held out."""
        self._frozen: list[Features] = []
        """Of each task what blend's towers say of its images, as it can be made again from them."""
        self.blend, self._without_held_out = self._blend(), self._blend()
        self.anchors = torch.zeros(0, towers.dim)
        self._start(Seeds(seed))
        self.moves = bool(self.image.parameters())
        self.ridges = [KernelRidge(towers.dim) for _ in range(1 + self.moves)]
        """On z0, and on z where the encoder moves."""
        self.weights = torch.zeros(0)
        self.held_out: tuple[Scores, Labels] | None = None

    def _blend(self) -> Blend:
        """That has learned nothing."""
        config = BlendConfig() if self.towers.has_images else BlendConfig.embedding()
        return Blend(self.towers, config, seed=self.seed)

    def _start(self, seeds: Seeds) -> None:
        """The pretrained weights."""
        self.image = ImageEncoder(self.towers, self.config.stage1.tuning, seeds.generator("encoder"))
        self.texts = self.config.stage2.text.build(self.towers).to(self.towers.device)
        for task in self.tasks:
            self._grow(task, seeds.at(task=task.index))

    def _grow(self, task: Task, seeds: Seeds) -> None:
        rows = self.anchors[task.classes.start : task.classes.stop].to(self.towers.device)
        if task.names:
            self.texts.grow(task.names, rows, seeds.generator("texts"))

    @property
    def encoder(self) -> str:
        return f"joint-{len(self.tasks)}"

    @property
    def memory_bytes(self) -> int:
        """Every image, as prepared for the tower."""
        tasks = [task for task in self.tasks if len(task.train)]
        return sum(self.towers.prepare(task.train[0]).nbytes * len(task.train) for task in tasks)

    def learn(self, task: Task, ctx: Context) -> None:
        stage1, stage2, s = self.config.stage1, self.config.stage2, self.towers.logit_scale
        seeds, ctx = ctx.seeds, ctx.at(task=task.index)
        own = Loader(task.train, self.towers.prepare, self.towers.pixels)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, own, ctx.log).cpu()])
        if self.config.restart:
            self._start(seeds)
        self.tasks.append(task)
        self._grow(task, ctx.seeds)
        self.out.append(chosen(task.train.labels, self.config.held_out, ctx.seeds.generator("held-out")))
        everything, out = Concatenation([seen.train for seen in self.tasks]), torch.cat(self.out)
        y, kept = torch.as_tensor(everything.labels), np.flatnonzero((~out).numpy())

        # Stages 1 and 2, on all images but those held out.
        learned = Subset(everything, kept, everything.labels[kept])
        loader = Loader(learned, self.towers.prepare, self.towers.pixels, batch=stage1.schedule.batch)
        loader = behind_trunk(loader, self.image, ctx)
        align_vision(stage1, self.image, self.anchors, loader, s, class_cross_entropy, ctx.at(stage=1))
        x, rows = self._embedded(everything, ctx)
        nothing = GaussianMemory(self.towers.dim)
        align_text(stage2, self.texts, rows[-1][~out], y[~out], nothing, s, class_cross_entropy, ctx.at(stage=2))

        # The ridges and the weights by images held out; the regressions learn these, too.
        k = len(self.anchors)
        fitted = [ridge.fit(z, y, k, out) for ridge, z in zip(self.ridges, rows, strict=True)]
        self._blends_learn(task, self.blend.memory_rows(self._frozen[-1]), self.out[-1], ctx)
        blended = self._without_held_out.row_scores(x[out])
        scores = [*(f.cpu() for f in self._by_texts([z[out] for z in rows])), *fitted, blended]
        every = range(len(scores))
        self.weights = best_pool(scores, y[out], [every[-1:], every[-1 - len(fitted) :], every])
        self.held_out = (pooled(self.weights, scores), y[out]) if out.any() else None
        ctx.log(
            "pool", weights=self.weights.tolist(), ridges=[ridge.lam for ridge in self.ridges], held_out=int(out.sum())
        )

    def _blends_learn(self, task: Task, x: Features, out: Bool[Tensor, " n"], ctx: Context) -> None:
        texts = self.anchors[task.classes.start : task.classes.stop] if task.names and self.blend.uses_text else None
        y = torch.as_tensor(task.train.labels)
        self.blend.learn_rows(x, y, texts, ctx)
        self._without_held_out.learn_rows(x[~out], y[~out], texts, ctx)

    def _embedded(self, everything: Concatenation, ctx: Context) -> tuple[Features, list[Float[Tensor, "n _"]]]:
        """Blend's rows of all images, and z0, and z where the encoder moves."""
        for task in self.tasks[len(self._frozen) :]:
            if not len(task.train):  # all of its classes were forgotten
                self._frozen.append(torch.zeros(0, self.towers.dim * self.blend.blocks))
                continue
            loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
            self._frozen.append(encode(loader, lambda pixels, _: self.blend.embed(pixels))[0])
        frozen = torch.cat(self._frozen)
        found = [unit(frozen[:, : self.towers.dim])]
        if self.moves:
            loader = Loader(everything, self.towers.prepare, self.towers.pixels)
            with self.image.inference():
                z, _ = encode(loader, lambda pixels, _: self.image(pixels), ctx, "Z")
            found.append(unit(z))
        return self.blend.memory_rows(frozen), found

    @torch.no_grad()
    def _by_texts(self, rows: Sequence[Float[Tensor, "_ d"]]) -> list[Float[Tensor, "_ k"]]:
        """s z0 . t_c with the texts as they came, if they are texts, and s z . t_c as they were trained."""
        s, device = self.towers.logit_scale, rows[0].device
        texts = [(rows[0], self.anchors)] if self.towers.has_text else []
        return [s * z @ t.to(device).T for z, t in [*texts, (rows[-1], self.texts())]]

    def attach_images(self, tasks: Sequence[Task]) -> None:
        """The tasks learned so far, whose images a state does not hold."""
        self.tasks, self._frozen = list(tasks), []
        self.out = list(torch.cat(self.out).split([len(task.train) for task in self.tasks])) if self.tasks else []

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.texts.forget(c)
        for blend in (self.blend, self._without_held_out):
            blend.forget(c)
        for ridge in self.ridges:
            ridge.forget(c)
        left = [torch.as_tensor(task.train.labels) != c for task in self.tasks]
        self.out = [out[own] for out, own in zip(self.out, left, strict=True)]
        self._frozen = [z[own] for z, own in zip(self._frozen, left, strict=False)]
        self.tasks = [without_class(task, c) for task in self.tasks]

    def rename(self, c: int, named: Task, log: Log) -> None:
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)
        rename_text(self.texts, c, named, self.anchors[c], log)
        for blend in (self.blend, self._without_held_out):
            blend.rename(c, named, log)
        self.tasks = [_renamed(task, c, *named.names) for task in self.tasks]

    def embed(self, pixels: Pixels) -> Features:
        """What blend's towers say, z0 first, and z behind it where the encoder moves."""
        untouched = self.blend.embed(pixels)
        return torch.cat([untouched, self.image(pixels)], 1) if self.moves else untouched

    def scores(self, features: Features) -> Scores:
        d, frozen = self.towers.dim, features[:, : self.towers.dim * self.blend.blocks]
        rows = [unit(frozen[:, :d]), *([unit(features[:, -d:])] if self.moves else [])]
        ridges = [ridge(z) for ridge, z in zip(self.ridges, rows, strict=True)]
        return pooled(self.weights, [*self._by_texts(rows), *ridges, self.blend.scores(frozen)])

    def state_dict(self) -> State:
        ridges = {f"ridge-{i}": ridge.state_dict() for i, ridge in enumerate(self.ridges)}
        parts = {
            "image": self.image.state_dict(),
            "texts": self.texts.state(),
            "blend": self.blend.state_dict(),
            "without-held-out": self._without_held_out.state_dict(),
            **ridges,
        }
        out = torch.cat([torch.zeros(0, dtype=torch.bool), *self.out])
        return {"anchors": self.anchors, "weights": self.weights, "out": out} | flattened(parts)

    def load_state_dict(self, state: State) -> None:
        """For scoring. To learn on it must be given its images again: see `attach_images`."""
        self.anchors, self.weights, self.out = state["anchors"], state["weights"], [state["out"]]
        self.image.load_state_dict(part(state, "image"))
        self.texts.restore(part(state, "texts"))
        self.blend.load_state_dict(part(state, "blend"))
        self._without_held_out.load_state_dict(part(state, "without-held-out"))
        for i, ridge in enumerate(self.ridges):
            ridge.load_state_dict(part(state, f"ridge-{i}"))


def _renamed(task: Task, c: int, name: str) -> Task:
    """The task with class number c, if it came with it, under this name."""
    return replace(task, names=tuple(name if i == c else own for i, own in zip(task.classes, task.names, strict=True)))


def chosen(labels: np.ndarray, share: float, rng: torch.Generator) -> Tensor:
    """For each row, whether it is one of a random share of its class: at least one, but none where there is no other."""
    y = torch.as_tensor(labels)
    out = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        own = (y == c).nonzero()[:, 0]
        if len(own) > 1:
            number = min(len(own) - 1, max(1, round(share * len(own))))
            out[own[torch.randperm(len(own), generator=rng)[:number]]] = True
    return out

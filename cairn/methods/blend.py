"""Blend: several classifiers in closed form on a frozen image tower, weighed by how they do on images left out.

Ours. No image is kept, nothing is trained step by step, and a task is learned in one pass. Three experts score an image:

1. a Gaussian per class, its covariance between that of the class and that of all, its mean between that of the class and what
   the class's text lets one expect (maths/quadratic_discriminant.py);
2. the text itself, s cos(z, t_c), as CLIP has it;
3. a ridge regression on random features (memory/gram.py), as in RanPAC.

Each scores the task's images as if it had not learned them, exactly and without learning again, and their weights follow from
these scores (maths/opinion_pool.py), as do the pseudo-images of the prior mean, the ridge and what a class's scores gain where it
has fewer images than others. What a weight was fitted to in earlier tasks counts on.

Images of the task without labels: of each the blend that has learned those with labels tells the likeliest class c(x) among the
classes C that these show, and the task is learned anew with all x of

    max_{c in C} softmax_C(scores(x))_c >= threshold

as images of c(x); weights, pseudo-images and ridge are chosen by labelled images alone. These had a say in what the others were taken
for, so their scores are no longer as if they had not been learned: good enough for weights (chosen by fifths that were left out of
both, accuracy was no better on development streams), but not for telling how often the method is right. One round of self-training
with pseudo-labels (Scudder 1965; Lee 2013), here over sums, so that learning anew costs as much as learning.

Kin: discriminant analysis on CLIP with text (Wang et al. 2024, A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation,
weights by hand), RanPAC (McDonnell et al. 2023), FeCAM (Goswami et al. 2023), regularised discriminant analysis (Friedman
1989), empirical-Bayes shrinkage of means (Efron and Morris 1973).

Letters: z unit embedding of an image, x its row: z and the moments of its patches side by side, each a unit block; h = relu(x V)
random features; t_c unit text of class c; kappa pseudo-images of the prior mean; s CLIP's scale.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.consistency import pseudo_labels
from cairn.maths.opinion_pool import OpinionPool
from cairn.maths.quadratic_discriminant import QuadraticDiscriminant, predicted_means
from cairn.maths.ridge import one_hot
from cairn.maths.rows import replaced, without
from cairn.maths.score_modules import FirstColumns, PatchMoments, PooledScores, RandomFeatureScores
from cairn.maths.similarity import CosineScores, unit
from cairn.memory.gram import Gram
from cairn.memory.scatter import Precision, ScatterMemory
from cairn.methods.parts.random_features import RandomFeatures
from cairn.methods.protocol import (
    FROZEN,
    Card,
    GaussianScoring,
    KeepsSums,
    LearnsOnline,
    LearnsUnlabelled,
    LeavesOut,
    NamesClasses,
    ScoresAsModule,
)
from cairn.settings import Settings
from cairn.towers.protocol import Towers
from cairn.training.context import BESIDE, Context, Log
from cairn.training.encode import encode
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part

KAPPAS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
KAPPA = 2.0
"""Before anything is known; log kappa is taken for normal around its logarithm, with deviation 1."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

GAUSSIAN, TEXT, RIDGE = 0.03, 0.5, 5.0
"""Weights before anything is known: Gaussians of hundreds of numbers are far too sure, outputs of a regression lie near 0 and 1."""

STRENGTH = 3.0
"""Of the prior on the logarithms of the weights."""

MOST = 1024
"""Images of a task that weights are fitted to, at most."""

RANK, FEATURES = 128, 1024


def _bytes(k: int, d: int, n: int, i: int, w: int) -> int:
    """With default settings: of each class count, mean, text, axes in float16 and what they lack, and a column of C; G."""
    wide = d if i == 4 * d else 3 * d  # a features file has no patches
    axes = min(n - k, k * min(RANK, wide))
    cut = 2 * wide * (wide + 1) if n - k > axes and wide > RANK else 0
    return k * (20 + 4 * wide + 4 * d + 4 * FEATURES) + 2 * wide * axes + cut + 2 * FEATURES * (FEATURES + 1)


class BlendConfig(Settings):
    """The settings of blend."""

    patches: Literal["none", "mean", "moments"] = Field(
        default="moments",
        description="beside the image's embedding: nothing, the mean of its patches, or mean and deviation",
    )
    rank: int | None = Field(
        default=RANK,
        ge=0,
        description="principal axes kept of a class's own scatter; null: all; 0: one covariance for all",
    )
    precision: Precision = Field(default="float16", description="in which they are kept; with float64 all sums are")
    pull: float = Field(
        default=1.0, gt=0, description="nu / d: pseudo-images of the common covariance in a class's own"
    )
    prior_scatter: float = Field(
        default=0.3,
        ge=0,
        description="delta: pseudo-images at what texts predict, in the scatter; where there are texts",
    )
    features: int = Field(default=FEATURES, ge=0, description="random features of the ridge regression; 0: without it")
    text: bool = Field(default=True, description="whether class texts count, where there are any")
    ageing: float = Field(
        default=0.5,
        ge=0,
        description="images scored among k of today's K classes weigh (k / K)^ageing in the fit of weights",
    )
    class_prior: Literal["equal", "counts"] = Field(
        default="equal",
        description="how likely a class is before an image is seen: as any other, or in proportion to its images",
    )

    unlabelled: bool = Field(default=True, description="whether images without labels are learned from")
    threshold: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="probability, among the classes of the task, from which one is taken for its likeliest class",
    )

    @classmethod
    def embedding(cls) -> BlendConfig:
        return cls(patches="none")


class Taken(NamedTuple):
    """Rows of images without labels, and the classes they are taken for."""

    x: Float[Tensor, "u d"]
    y: Int[Tensor, " u"]


class Blend(
    GaussianScoring[ScatterMemory], KeepsSums, LearnsOnline, LearnsUnlabelled, LeavesOut, NamesClasses, ScoresAsModule
):
    """argmax_c sum_e exp(phi_e) E_e(x, c) - theta log n_c of the experts' scores, where all classes are equally likely."""

    card = Card(
        title="Blend: Gaussians, texts and random features in closed form",
        source="ours",
        config=BlendConfig,
        stages=(
            "one pass: sums of each class, sums of random features",
            "prior means, ridge and weights by the task's images, each scored as if it had not been learned",
            "with images without labels: each taken for the task's class that it likeliest shows, and all learned anew",
        ),
        trains="head",
        keeps="gaussians",
        bytes=_bytes,
        closed_form=True,
        passes="one per image, can be cached",
        text=True,
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: BlendConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.blocks = 1 if config.patches == "none" else 2 if config.patches == "mean" else 3
        d = towers.dim * self.blocks
        self.texts = torch.zeros(0, towers.dim)
        self.random = RandomFeatures(d, config.features, seed) if config.features else None
        self.gram = Gram.empty(config.features, torch.float64 if config.precision == "float64" else torch.float32)
        self.ridge_errors = torch.zeros(len(RIDGES), dtype=torch.float64)
        starts = [GAUSSIAN, *([TEXT] if self.uses_text else []), *([RIDGE] if self.random else [])]
        self.left_out = None
        self.pools = [OpinionPool.starting(starts, STRENGTH, math.log(kappa / KAPPA) ** 2 / 2) for kappa in KAPPAS]
        self._set(ScatterMemory(d, config.rank, config.precision))

    @property
    def uses_text(self) -> bool:
        return self.config.text and self.towers.has_text

    def _set(self, memory: ScatterMemory) -> None:
        self.memory = memory
        self._discriminant: QuadraticDiscriminant | None = None
        self._W: Tensor | None = None

    def learn(self, task: Task, ctx: Context) -> None:
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
        x, y = encode(loader, lambda features, _: self.memory_rows(features), ctx, "X", embed=self.embed)
        texts = self.towers.class_texts(task.names, task.templates).cpu() if self.uses_text and task.names else None
        start = self.texts, self.memory, self.gram, self.ridge_errors, self.pools
        self.learn_rows(x, y, texts, ctx)

        # Images without labels, as what they look like.
        if task.unlabelled is not None and len(task.unlabelled) and self.config.unlabelled:
            loader = Loader(task.unlabelled, self.towers.prepare, self.towers.pixels)
            u, _ = encode(loader, lambda pixels, _: self.memory_rows(self.embed(pixels)), ctx, f"{BESIDE}unlabelled")
            among = y.unique()
            found, sure = pseudo_labels(self.row_scores(u)[:, among], self.config.threshold)
            ctx.log("unlabelled", images=len(u), trusted=int(sure.sum()))
            self.texts, memory, self.gram, self.ridge_errors, self.pools = start
            self._set(memory)
            self.learn_rows(x, y, texts, ctx, Taken(u[sure], among[found[sure]]))
            self.left_out = None  # each of them had a say in what the others were taken for

    def learn_rows(
        self,
        x: Features,
        y: Labels,
        texts: Tensor | None,
        ctx: Context,
        taken: Taken | None = None,
    ) -> None:
        """A task by the rows of its images and the texts of the classes that it brings. Rows that are `taken` for some of its
        classes are learned with them; nothing is chosen by these."""
        config, before = self.config, self.memory.classes
        if texts is not None:
            self.texts = torch.cat([self.texts, texts])

        # Statistics: sums over images, of which none is kept.
        for rows, labels in [(x, y)] if taken is None else [(x, y), taken]:
            self._set(self.memory.add(rows, labels))
            if self.random:
                self.gram = self.gram.joined(self._widened(rows), one_hot(labels, self.memory.classes))
        Y = one_hot(y, self.memory.classes)

        # What the experts say of the task's images as if each had not been learned.
        rows = torch.randperm(len(x), generator=ctx.seeds.generator("weights"))[:MOST].sort().values
        x, y, Y = x[rows], y[rows], Y[rows]
        others: list[Tensor] = []
        if self.uses_text:
            others.append(self._text_scores(x))
        if self.random:
            left_out = self.gram.left_out(self._widened(x), Y, RIDGES)
            self.ridge_errors = self.ridge_errors + torch.stack([(f - Y).square().sum() for f in left_out])
            others.append(left_out[int(self.ridge_errors.argmin())])
        # Of a class's only image nothing tells kappa: without it the class is where texts predict it.
        counts = self.memory.counts
        several = counts[y] > 1
        ageing = (before / self.memory.classes) ** config.ageing if before else 1.0
        gaussians = self._gaussians().left_out(x.double(), y, KAPPAS)
        self.pools = [
            pool.fitted(torch.stack([g, *others], 2), y, counts, ageing, several)
            for pool, g in zip(self.pools, gaussians, strict=True)
        ]
        scores = torch.stack([gaussians[self._best], *others], 2)
        self.left_out = (self.pool.joined(scores, counts, self._likely_by_counts), y)
        self._set(self.memory.stored())
        ctx.log(
            "blend",
            kappa=self.kappa,
            weights=self.pool.weights.tolist(),
            theta=self.pool.psi[-1].item(),
            ridge=self.ridge,
        )

    @property
    def kappa(self) -> float:
        """That of the least loss so far."""
        return KAPPAS[self._best]

    @property
    def pool(self) -> OpinionPool:
        return self.pools[self._best]

    @property
    def _best(self) -> int:
        return min(range(len(KAPPAS)), key=lambda i: self.pools[i].loss)

    @property
    def ridge(self) -> float:
        return RIDGES[int(self.ridge_errors.argmin())]

    def forget(self, c: int) -> None:
        """Its sums and text. In the random features' G its images stay as counterexamples, and in the few numbers of the weights a
        trace."""
        self.texts, self.gram = without(self.texts, c), self.gram.without(c)
        self._set(self.memory.without(c))

    def unlearn(self, features: Features, labels: Labels) -> None:
        """Weights, kappa and ridge stay as they were fitted."""
        x = self.memory_rows(features).cpu()
        if self.random:
            self.gram = self.gram.without_rows(self._widened(x), one_hot(labels, self.memory.classes))
        self._set(self.memory.without_rows(x, labels))

    def merge(self, c: int, other: int) -> None:
        """Weights, kappa and ridge stay as they were fitted."""
        self.texts, self.gram = without(self.texts, other), self.gram.merged(c, other)
        self._set(self.memory.merged(c, other))

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text. The weights of the experts were fitted with the old one and stay."""
        if self.uses_text:
            self.texts = replaced(self.texts, c, self.towers.class_texts(named.names, named.templates))
            self._set(self.memory)

    @property
    def memory_bytes(self) -> int:
        return self.memory.bytes + self.texts.nbytes + (self.gram.bytes if self.random else 0)

    def embed(self, pixels: Pixels) -> Features:
        """The image's embedding and behind it mean and deviation of its unit patches."""
        if self.blocks == 1:
            return self.towers.image(pixels)
        z, p = self.towers.image_and_patches(pixels)
        p = unit(p.flatten(0, 1)).view(p.shape)
        return torch.cat([z, p.mean(1), *([p.std(1, correction=0)] if self.blocks == 3 else [])], 1)

    def memory_rows(self, features: Features) -> Features:
        """x: blocks of equal length, one in all."""
        return self.on_sphere(features)

    def on_sphere(self, drawn: Features) -> Features:
        return unit(drawn.reshape(-1, self.towers.dim)).view(drawn.shape) / math.sqrt(self.blocks)

    def row_scores(self, x: Features) -> Scores:
        if not self.memory.classes:
            return x.new_zeros(len(x), 0)
        rows = x.detach().cpu()
        scores = [self._gaussians().scores(rows.double(), self.kappa)]
        if self.uses_text:
            scores.append(self._text_scores(rows))
        if self.random:
            if self._W is None:
                self._W = self.gram.solution(self.ridge)
            scores.append(self._widened(rows) @ self._W)
        return self.pool.joined(torch.stack(scores, 2), self.memory.counts, self._likely_by_counts).to(x)

    def scores_module(self) -> nn.Sequential:
        towers, d = self.towers, self.towers.dim
        experts: list[nn.Module] = [self._gaussians().module(self.kappa)]
        if self.uses_text:
            experts.append(FirstColumns(d, CosineScores(self.texts, towers.logit_scale)))
        if self.random:
            scale = math.sqrt(2 / self.config.features)
            experts.append(RandomFeatureScores(self.random.V, self.gram.solution(self.ridge), scale))
        vision = towers.vision() if self.blocks == 1 else towers.vision_and_patches()
        offsets = self.pool.offsets(self.memory.counts, self._likely_by_counts)
        pooled = PooledScores(experts, self.pool.weights.tolist(), offsets)
        return nn.Sequential(PatchMoments(vision, self.blocks), pooled).cpu().float().eval()

    @property
    def _likely_by_counts(self) -> bool:
        return self.config.class_prior == "counts"

    def _gaussians(self) -> QuadraticDiscriminant:
        if self._discriminant is None:
            texts = self.texts if self.uses_text else None
            self._discriminant = QuadraticDiscriminant(
                self.memory.statistics,
                predicted_means(self.memory.means, texts),
                [self.towers.dim] * self.blocks,
                nu=self.config.pull * self.memory.dim,
                delta=self.config.prior_scatter if self.uses_text else 0.0,
            )
        return self._discriminant

    def _text_scores(self, x: Features) -> Tensor:
        z = x[:, : self.towers.dim].double() * math.sqrt(self.blocks)
        return self.towers.logit_scale * z @ self.texts.double().T

    def _widened(self, x: Features) -> Tensor:
        """h, of length about one."""
        assert self.random is not None
        return self.random(x).double() * math.sqrt(2 / self.config.features)

    def state_dict(self) -> State:
        pools = {str(i): pool.state_dict() for i, pool in enumerate(self.pools)}
        held = {"texts": self.texts, "ridge_errors": self.ridge_errors}
        if self.random:
            held |= {"seed": torch.tensor(self.random.seed)} | flattened({"gram": self.gram.state_dict()})
        return held | flattened({"memory": self.memory.state_dict(), "pools": flattened(pools)})

    def load_state_dict(self, state: State) -> None:
        self.texts, self.ridge_errors = state["texts"], state["ridge_errors"]
        if self.random:
            self.gram = Gram.from_state(part(state, "gram"))
            self.random = RandomFeatures(self.memory.dim, self.config.features, int(state["seed"]))
        pools = part(state, "pools")
        self.pools = [OpinionPool.from_state(part(pools, str(i))) for i in range(len(KAPPAS))]
        self._set(self.memory.restored(part(state, "memory")))

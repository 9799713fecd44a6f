"""Segment: each patch of an image is told to show a class or the background, by discriminant analysis of dense features.

A method of our own in closed form. For patches p of the frozen tower (dense features by value attention, as in SPA), of which a
share m lies on the object of class c and the rest on the background 0, sums over all patches of all images are kept:

n_c = sum m,  mu_c = sum m p / n_c,  S = (sum p p^T - sum_c n_c mu_c mu_c^T) / sum_c n_c
l_c(p) = p^T P mu_c - mu_c^T P mu_c / 2 + log pi_c,  P = (S + ridge tr(S)/d I)^-1,  q = softmax(l) over 0..k

pi_0 is the share of the background in labelled images, the classes have the rest alike. The sums of all tasks are those of one: what
is learned task by task from labelled images is what is learned at once. An image's score of class c is log mean_p q_c(p).

Images of the task without labels are learned from in the same way. Such an image shows one of the classes that the task has labelled
images of: with f = 1 - q_0, the class for which sum_p f log(q_c / f) is largest, if its softmax is at least `threshold`; its patches
with f above 1 - `doubt` are that class's, those with f below `doubt` are background, the others are passed over. That pseudo-labels
are trusted from a threshold on is MCCL's (arXiv 2503.17914) and UniMatch's [K]; that all patches of an image show one class is ours.

Where images have no masks every patch is the object's. On a features file an image is one patch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from cairn.data.loading import Loader
from cairn.data.task import Images, Subset, Task
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.methods.protocol import FROZEN, Card, LearnsUnlabelled, Segments
from cairn.settings import Settings
from cairn.towers.masks import mask_in_view
from cairn.towers.protocol import Towers
from cairn.training.context import BESIDE, Context
from cairn.training.encode import encode
from cairn.types import Attention, Features, Labels, Pixels, Scores, State

LEAST = 1e-12
"""Of a probability whose logarithm is taken."""


class SegmentConfig(Settings):
    """The settings of Segment."""

    attention: Attention = Field(default="value", description="in the last block, for patches: native or value")
    ridge: float = Field(default=0.1, gt=0, description="added to the covariance, as a share of its average variance")
    unlabelled: bool = Field(default=True, description="whether images without labels are learned from")
    threshold: float = Field(
        default=0.8, ge=0, le=1, description="probability from which the class of an image without label is trusted"
    )
    doubt: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="a patch of it is passed over unless it is object or background but for this probability",
    )


class _Discriminant(NamedTuple):
    W: Float[Tensor, "d c"]
    b: Float[Tensor, " c"]

    def __call__(self, p: Float[Tensor, "n p d"]) -> Float[Tensor, "n p c"]:
        return p.double() @ self.W + self.b


class Segment(LearnsUnlabelled, Segments):
    """argmax_c log mean_p q_c(p), and of each patch argmax_c q_c(p)."""

    card = Card(
        title="Segment: patches by discriminant analysis, with masks and without",
        source="ours",
        config=SegmentConfig,
        stages=(
            "one pass of the frozen tower: patches of labelled images and of others",
            "sums of labelled patches; those of images without labels whose class is trusted",
        ),
        trains="nothing",
        keeps="second-order",
        bytes=lambda k, d, n, i, w: 8 * (d * d + (k + 1) * (d + 1) + 2),
        needs="images; masks, if it is to find objects",
        passes="one per image, can be cached",
        closed_form=True,
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: SegmentConfig, *, seed: int):
        self.towers, self.config, d = towers, config, towers.dim
        self.products = torch.zeros(d, d, dtype=torch.float64)
        self.sums, self.counts = torch.zeros(1, d, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        self.labelled = torch.zeros(2, dtype=torch.float64)
        """Patches of labelled images that are background, and all of them."""
        self._held: _Discriminant | None = None

    @property
    def memory_bytes(self) -> int:
        return sum(held.nbytes for held in self.state_dict().values())

    def learn(self, task: Task, ctx: Context) -> None:
        ctx = ctx.at(task=task.index)
        p, y = self._patches(task.train, ctx, "X")
        shares = _shares(task.train, self.towers, p)
        new = max(0, task.classes.stop + 1 - len(self.counts))
        self.sums = torch.cat([self.sums, self.sums.new_zeros(new, self.towers.dim)])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(new)])
        self._add(p, shares, torch.ones_like(shares), y)
        self.labelled = self.labelled + torch.tensor([float((1 - shares).sum()), shares.numel()], dtype=torch.float64)
        if task.unlabelled is not None and len(task.unlabelled) and self.config.unlabelled:
            self._learn_unlabelled(task.unlabelled, y.unique(), ctx)

    def _learn_unlabelled(self, images: Images, among: Labels, ctx: Context) -> None:
        numbered = Subset(images, np.arange(len(images)), np.arange(len(images)))
        p, _ = self._patches(numbered, ctx, f"{BESIDE}unlabelled")
        q = self._discriminant()(p)[..., [0, *(among + 1).tolist()]].softmax(-1)
        f = 1 - q[..., 0]
        confidence, found = image_class(q[..., 1:], f)
        sure, doubt = confidence >= self.config.threshold, self.config.doubt
        weights = ((f >= 1 - doubt) | (f <= doubt)).double()[sure]
        ctx.log("unlabelled", images=len(images), trusted=int(sure.sum()), patches=int(weights.sum()))
        self._add(p[sure], (f > 0.5).double()[sure], weights, among[found[sure]])

    def _patches(self, images: Images, ctx: Context, name: str) -> tuple[Float[Tensor, "n p d"], Labels]:
        """Unit patches of each image, all of them in memory, and the labels."""
        d = self.towers.dim
        loader = Loader(images, self.towers.prepare, self.towers.pixels, batch=32)
        rows, y = encode(loader, lambda features, _: features, ctx, name, embed=self.embed)
        return _dense(rows, d), y

    def _add(
        self, p: Float[Tensor, "n p d"], shares: Float[Tensor, "n p"], weights: Float[Tensor, "n p"], y: Labels
    ) -> None:
        """With these patches, `shares` of which lie on the object of class y and the rest on the background."""
        x, w = p.flatten(0, 1).double(), weights.flatten()
        m, c = shares.flatten(), (y + 1).repeat_interleave(p.shape[1])
        self.products = self.products + (x * w[:, None]).T @ x
        self.sums = self.sums.index_add(0, c, x * (w * m)[:, None])
        self.counts = self.counts.index_add(0, c, w * m)
        self.sums[0] += (w * (1 - m)) @ x  # of tensors made just now: a state that was kept stays as it is
        self.counts[0] += w @ (1 - m)
        self._held = None

    def _discriminant(self) -> _Discriminant:
        if self._held is None:
            n, d = self.counts.clamp(min=LEAST), self.towers.dim
            mu = self.sums / n[:, None]
            S = (self.products - (self.counts[:, None] * mu).T @ mu) / self.counts.sum().clamp(min=1)
            S = S + (self.config.ridge * S.trace() / d + LEAST) * torch.eye(d, dtype=torch.float64)
            W = torch.linalg.solve(S, mu.T)
            background, every = self.labelled.tolist()
            share = background / max(every, 1.0)
            prior = torch.full_like(n, max((1 - share) / max(1, len(n) - 1), LEAST))
            prior[0] = share
            self._held = _Discriminant(W, prior.log() - (mu * W.T).sum(1) / 2)
        return self._held

    def embed(self, pixels: Pixels) -> Features:
        """The image's embedding and behind it, in the same row, its unit patches one after the other."""
        if not self.towers.has_images:
            return self.towers.image(pixels)
        z, p = self.towers.image_and_patches(pixels, self.config.attention)
        return torch.cat([z, unit(p.flatten(0, 1)).view(len(z), -1)], 1)

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        q = self._shares_of(features)
        return q[..., 1:].mean(1).clamp(min=LEAST).log().float()

    @torch.no_grad()
    def segment(self, features: Features) -> Float[Tensor, "n c g g"]:
        q = self._shares_of(features).float()
        g = round(q.shape[1] ** 0.5)
        return q.transpose(1, 2).unflatten(2, (g, g))

    @property
    def finds_objects(self) -> bool:
        return bool(self.labelled[0] > 0)

    def _shares_of(self, features: Features) -> Float[Tensor, "n p c"]:
        return self._discriminant()(_dense(features.cpu(), self.towers.dim)).softmax(-1)

    def forget(self, c: int) -> None:
        """Its sums. What it added to the products around its mean stays in the covariance of all."""
        mu = self.sums[c + 1] / self.counts[c + 1].clamp(min=LEAST)
        self.products = self.products - self.counts[c + 1] * mu[:, None] * mu
        self.sums, self.counts, self._held = without(self.sums, c + 1), without(self.counts, c + 1), None

    def state_dict(self) -> State:
        held = {"products": self.products, "sums": self.sums[1:], "counts": self.counts[1:], "labelled": self.labelled}
        return held | {"background": self.sums[:1], "background_count": self.counts[:1]}

    def load_state_dict(self, state: State) -> None:
        self.products, self.labelled, self._held = state["products"].clone(), state["labelled"].clone(), None
        self.sums = torch.cat([state["background"], state["sums"]])
        self.counts = torch.cat([state["background_count"], state["counts"]])


def image_class(q: Float[Tensor, "n p j"], f: Float[Tensor, "n p"]) -> tuple[Float[Tensor, " n"], Labels]:
    """The class of each image, and its probability: softmax_c sum_p f log(q_c / f), f the probability that a patch is no
    background."""
    within = (q / f.clamp(min=LEAST)[..., None]).clamp(min=1e-6).log()
    confidence, found = (within * f[..., None]).sum(1).softmax(1).max(1)
    return confidence, found


def _dense(rows: Float[Tensor, "n w"], d: int) -> Float[Tensor, "n p d"]:
    """Unit patches of embedded images; of an embedding alone, the embedding."""
    return unit(rows)[:, None] if rows.shape[1] == d else rows[:, d:].unflatten(1, (-1, d))


def _shares(images: Images, towers: Towers, p: Float[Tensor, "n p d"]) -> Float[Tensor, "n p"]:
    """Of each patch, the share that lies on the object; all of it where the image has no mask."""
    shares, g = torch.ones(p.shape[:2], dtype=torch.float64), round(p.shape[1] ** 0.5)
    for i in range(len(images)):
        if (mask := mask_in_view(images, i, towers)) is not None:
            shares[i] = adaptive_avg_pool2d(torch.as_tensor(mask).double()[None], g).flatten()
    return shares

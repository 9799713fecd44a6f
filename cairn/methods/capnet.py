"""CAPNET: prompts of a class refined along a graph of classes whose texts are alike, for images that show several, rare ones too.

Source: CAPNET, Category-Aware Prompt learning for long-tailed multi-label images (2025), arXiv 2511.20641. Its abstract and
published summaries were read, its equations were not, so none is cited by number. [P] marks what they state: CLIP with prompts per
class; texts refined by a three-layer graph convolution as a residual, on a graph from CLIP's text encoder in place of label
counts; a binary decision per class from the cosine over a trained temperature; the distribution-balanced focal loss; several
views of a test image, averaged. The paper learns one long-tailed data set; tasks are ours [I]:

1. graph over all classes seen, from their template texts (see `cairn.maths.graph`);
2. class vectors f_c = unit(p_c + H_c), p_c the unit text of the class's prompt, H the graph convolution of all p;
3. scores u_ic = (z_i . f_c - b) / tau, the log-odds of "image i shows class c";
4. loss over the classes of which the task tells: balanced focal, or cross entropy; and on those of which it does not tell
   rho BCE(u, sigma(u')), u' what was answered before the task: labels of old classes are restored by the old model
   [K: KRT, Dong et al. 2023];
5. training images once an epoch, or drawn class by class [K: part of the recipe of the loss]; the former was better on
   development data.

Without a bias b every probability would begin near 1, cosines being positive [I; K: SigLIP]. The image tower stands still: the
paper's adapters in it are left out. An image of single-label data shows one class of those that its task brings.

Letters: z unit embedding of an image (n x d); p, f class texts (k x d); Y what is told (n x j); s scale of the towers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.graph import propagated, text_graph
from cairn.maths.label_set_losses import balanced_focal, balanced_weights, prior_shift
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.methods.parts.stages import class_anchors, rename_text, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, NamesClasses
from cairn.settings import Given, Settings, kind_by_name
from cairn.towers.prompts import ClassText, Prompts, Residual
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Pixels, Scores, State, flattened, part


class Graph(Settings):
    """The graph over classes, and the convolution along it."""

    share: float = Field(default=0.2, ge=0, le=1, description="q, what a class takes from its neighbours [K: SCPNet]")
    neighbours: int = Field(default=8, ge=0, description="classes of the nearest texts [K: 20 to 62 of 20 to 80]")
    layers: int = Field(default=3, ge=0, description="of the convolution; 0: none [P: 3]")
    widening: int = Field(default=2, ge=1, description="width between layers, in widths of a text [K]")
    lr: float = Field(default=2e-4, gt=0, description="peak learning rate of the layers, temperature and bias [K]")


class BalancedFocal(Given):
    """The distribution-balanced focal loss."""

    kind: Literal["balanced-focal"] = Field(default="balanced-focal", description="distribution-balanced focal loss")
    floor: float = Field(default=0.1, ge=0, description="least weight of a decision [K]")
    slope: float = Field(default=10.0, gt=0, description="how steeply weights follow the share drawn [K]")
    middle: float = Field(default=0.2, description="share drawn at which a weight is half way [K: VOC .3, COCO .2]")
    strength: float = Field(default=0.05, ge=0, description="kappa, of the shift of rare classes [K]")
    scale: float = Field(default=2.0, gt=0, description="lambda, of negatives [K: VOC 5, COCO 2]")


class CrossEntropy(Given):
    """Binary cross entropy, every decision weighing alike."""

    kind: Literal["cross-entropy"] = Field(default="cross-entropy", description="binary cross entropy")


class CapnetConfig(Settings):
    """The settings of CAPNET."""

    text: ClassText = Field(
        default=Prompts(per_class=4, freeze_old=True, lr=2e-3),
        description="prompts per class [P], or residual: a vector per class, which features files take",
    )
    graph: Graph = Field(default=Graph())
    loss: BalancedFocal | CrossEntropy = Field(
        default=BalancedFocal(), description="balanced-focal [P] or cross-entropy"
    )
    sampling: Literal["class-aware", "plain"] = Field(
        default="plain", description="each image once an epoch [I], or as many drawn class by class [K]"
    )
    distillation: float = Field(
        default=1.0, ge=0, description="rho, weight of what was answered before on classes of which nothing is told [I]"
    )
    ensemble: bool = Field(
        default=False,
        description="scores of the image and of its four corners, averaged [P: perturbed copies; I: which]",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=64, lr=0.2), description="optimisation; prompts have a rate of their own"
    )

    _kinds = field_validator("text", "loss", mode="before")(kind_by_name)

    @classmethod
    def embedding(cls) -> CapnetConfig:
        """The form for precomputed embeddings: residual class texts, one view."""
        return cls(text=Residual(freeze_old=True), graph=Graph(lr=1e-3), schedule=Schedule(epochs=10, batch=64, lr=0.2))

    @property
    def alters_images(self) -> bool:
        return self.ensemble


class _Decision(NamedTuple):
    """Class vectors, log temperature and bias: what u is made of."""

    vectors: Float[Tensor, "k d"]
    log_tau: Float[Tensor, ""]
    bias: Float[Tensor, ""]

    def scores(self, z: Features) -> Scores:
        return (z @ self.vectors.T - self.bias) / self.log_tau.exp()


class Capnet(NamesClasses):
    """u_c = (cos(f(x), f_c) - b) / tau, the log-odds of each class by itself."""

    card = Card(
        title="CAPNET: prompts along a graph of classes, balanced loss",
        source="CAPNET 2025",
        citation="CAPNET: category-aware prompt learning for long-tailed multi-label images. 2025. arXiv 2511.20641.",
        config=CapnetConfig,
        stages=(
            "one pass of the frozen tower",
            "prompts, graph convolution, temperature and bias: balanced focal loss over the task's classes, and what was answered "
            "before over the others",
        ),
        trains="prompts, graph convolution",
        keeps="nothing",
        needs="images, which may show several classes; texts that the towers can tell apart",
        passes="one per image, can be cached",
        text=True,
        label_sets=True,
        quick={"schedule.epochs": 2, "schedule.batch": 8},
    )

    encoder = FROZEN
    memory_bytes = 0

    def __init__(self, towers: Towers, config: CapnetConfig, *, seed: int):
        if config.ensemble and not towers.has_images:
            raise ConfigError("ensemble true: a features file has no images to take corners of; set it to false")
        self.towers, self.config, d = towers, config, towers.dim
        self.texts = config.text.build(towers).to(towers.device)
        self.anchors = torch.zeros(0, d)
        self.layers = _layers(d, config.graph, Seeds(seed).generator("graph"))
        self.log_tau, self.bias = nn.Parameter(torch.tensor(math.log(0.05))), nn.Parameter(torch.zeros(()))
        self.vectors = torch.zeros(0, d)

    def learn(self, task: Task, ctx: Context) -> None:
        config, device, ctx = self.config, self.towers.device, ctx.at(task=task.index)
        before = self._as_it_stands()
        new = class_anchors(self.towers, task, Loader(task.train, self.towers.prepare, self.towers.pixels), ctx.log)
        self.anchors = torch.cat([self.anchors, new.cpu()])
        if task.names:
            self.texts.grow(task.names, new.to(device), ctx.seeds.generator("texts"))
        z, Y = self._features(task, ctx)
        told = Y.any(0).nonzero()[:, 0]
        if not len(before.vectors):  # half the decisions on the first images are yes
            self.bias.data.fill_((z @ unit(self.anchors[told]).T).mean())
        others = torch.tensor(sorted({*range(len(before.vectors))} - {*told.tolist()}), dtype=torch.int64)
        A = text_graph(self.anchors, config.graph.share, config.graph.neighbours).to(device)
        decide = _loss(config.loss, Y[:, told].float(), device)
        told, others, before = told.to(device), others.to(device), _Decision(*(held.to(device) for held in before))
        layers, log_tau, bias = ([*map(_on(device), self.layers)], _on(device)(self.log_tau), _on(device)(self.bias))

        def loss(z: Tensor, shown: Tensor) -> Tensor:
            z, shown = z.to(device), shown.to(device)
            u = _Decision(self._class_vectors(A, layers), log_tau, bias).scores(z)
            value = decide(u[:, told], shown)
            if config.distillation and len(others):
                formerly = before.scores(z)[:, others].sigmoid()
                value = value + config.distillation * binary_cross_entropy_with_logits(u[:, others], formerly)
            return value

        schedule = config.schedule
        if isinstance(config.text, Prompts):
            schedule = schedule.model_copy(update={"lr": config.text.lr})
        texts, rest = self.texts.trainable(), [*layers, log_tau, bias]
        rates = [1.0] * len(texts) + [config.graph.lr / schedule.lr] * len(rest)
        batches = LabelSetBatches(z, Y[:, told.cpu()], schedule.batch, config.sampling == "class-aware")
        fit(loss, [*texts, *rest], batches, schedule, ctx, rates=rates)
        self.layers, self.log_tau, self.bias = [*map(_on("cpu"), layers)], _on("cpu")(log_tau), _on("cpu")(bias)
        self._cache(A)
        ctx.log(
            "decision", tau=self.log_tau.exp().item(), bias=self.bias.item(), neighbours=int((A > 0).sum() - len(A))
        )

    def _features(self, task: Task, ctx: Context) -> tuple[Features, Bool[Tensor, "n k"]]:
        """Unit embeddings of the task's images, once each, and which classes of those seen each is told to show."""
        images, k = task.train if task.label_sets is None else task.label_sets, len(self.anchors)
        loader = Loader(images, self.towers.prepare, self.towers.pixels, batch=self.config.schedule.batch)
        z, y = encode(loader, lambda z, _: unit(z[:, : self.towers.dim]), ctx, "Z", embed=self.embed)
        if task.label_sets is None:
            return z, torch.eye(k, dtype=torch.bool)[y]
        return z, torch.from_numpy(np.ascontiguousarray(task.label_sets.targets))

    def _class_vectors(self, A: Float[Tensor, "k k"], layers: Sequence[Tensor]) -> Float[Tensor, "k d"]:
        """f_c of all classes seen."""
        p = self.texts()
        return unit(p + propagated(A, p, layers)) if layers else p

    @torch.no_grad()
    def _cache(self, A: Float[Tensor, "k k"] | None = None) -> None:
        """Keep the class vectors as they stand; scoring uses these."""
        if not len(self.anchors):
            self.vectors = torch.zeros(0, self.towers.dim)
            return
        graph, device = self.config.graph, self.towers.device
        A = text_graph(self.anchors, graph.share, graph.neighbours) if A is None else A
        self.vectors = self._class_vectors(A.to(device), [layer.to(device) for layer in self.layers]).cpu()

    def _as_it_stands(self) -> _Decision:
        return _Decision(self.vectors, self.log_tau.detach().clone(), self.bias.detach().clone())

    def forget(self, c: int) -> None:
        """Its text and its place in the graph. What the shared layers learned of it stays."""
        self.anchors = without(self.anchors, c)
        self.texts.forget(c)
        self._cache()

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text, and with it its neighbours."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)
        rename_text(self.texts, c, named, self.anchors[c].to(self.towers.device), log)
        self._cache()

    def embed(self, pixels: Pixels) -> Features:
        views = [pixels, *corners(pixels)] if self.config.ensemble else [pixels]
        return torch.cat([self.towers.image(view) for view in views], 1)

    def scores(self, features: Features) -> Scores:
        decision = _Decision(*(held.to(features.device) for held in self._as_it_stands()))
        views = features.split(self.towers.dim, 1)
        return torch.stack([decision.scores(unit(view)) for view in views]).mean(0)

    def state_dict(self) -> State:
        weights = {str(i): W.detach().clone() for i, W in enumerate(self.layers)}
        held = {"anchors": self.anchors, "tau": self.log_tau.detach().clone(), "bias": self.bias.detach().clone()}
        return held | flattened({"texts": self.texts.state(), "layers": weights})

    def load_state_dict(self, state: State) -> None:
        self.anchors, layers = state["anchors"], part(state, "layers")
        self.log_tau, self.bias = nn.Parameter(state["tau"].clone()), nn.Parameter(state["bias"].clone())
        self.layers = [nn.Parameter(layers[str(i)].clone()) for i in range(len(layers))]
        self.texts.restore(part(state, "texts"))
        self._cache()


class LabelSetBatches:
    """Rows and what each is told to show, in an order drawn anew every epoch: each once, or as many drawn class by class, every
    class as often, and of a class every row with the same chance.

    Source for the latter: Shen et al., Relay Backpropagation (2016), section 3.3; part of the recipe of Wu et al. (2020).
    """

    def __init__(self, z: Features, Y: Bool[Tensor, "n j"], batch: int, class_aware: bool):
        self.z, self.Y, self.batch, self.class_aware = z, Y, batch, class_aware

    def __len__(self) -> int:
        return -(-len(self.z) // self.batch)

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        return (self._epoch(rng, 0 if i else skip) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.order(rng).split(self.batch)[skip:]:
            yield self.z[rows], self.Y[rows].to(self.z)

    def order(self, rng: torch.Generator) -> Int[Tensor, " n"]:
        """The rows of an epoch."""
        n, j = self.Y.shape
        if not self.class_aware:
            return torch.randperm(n, generator=rng)
        classes = torch.cat([torch.randperm(j, generator=rng) for _ in range(-(-n // j))])[:n]
        chances, members = torch.rand(n, generator=rng), [own.nonzero()[:, 0] for own in self.Y.T]
        return torch.stack(
            [members[c][int(u * len(members[c]))] for c, u in zip(classes.tolist(), chances, strict=True)]
        )


def corners(pixels: Pixels, share: float = 0.875) -> list[Pixels]:
    """The four corners of each image, of that share of its sides, as large as the image.

    Source: LIFT (Shi et al. 2024), whose crops are of an image resized by 24 pixels more; ours are of the image itself [I].
    """
    h, w = pixels.shape[-2:]
    high, wide = round(share * h), round(share * w)
    return [
        interpolate(pixels[..., top : top + high, left : left + wide], size=(h, w), mode="bicubic", align_corners=False)
        for top in (0, h - high)
        for left in (0, w - wide)
    ]


def _layers(d: int, graph: Graph, rng: torch.Generator) -> list[nn.Parameter]:
    """Glorot's normal start, the last of zeros, so that class vectors begin as the texts."""
    widths = [d, *[graph.widening * d] * (graph.layers - 1), d]
    found = []
    for number, (a, b) in enumerate(pairwise(widths), start=1):
        W = torch.randn(a, b, generator=rng) * math.sqrt(2 / (a + b))
        found.append(nn.Parameter(W if number < graph.layers else torch.zeros(a, b)))
    return found[: graph.layers]


def _on(device: torch.device | str) -> Callable[[Tensor], nn.Parameter]:
    """A trainable copy there."""
    return lambda held: nn.Parameter(held.detach().to(device).clone())


def _loss(
    loss: BalancedFocal | CrossEntropy, Y: Float[Tensor, "n j"], device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of scores and of what is shown, for classes that are shown as often as in Y."""
    counts, n = Y.sum(0).to(device), len(Y)
    if isinstance(loss, CrossEntropy):
        return binary_cross_entropy_with_logits
    shift = prior_shift(counts, n, loss.strength, loss.scale)

    def balanced(u: Tensor, shown: Tensor) -> Tensor:
        weights = balanced_weights(shown, counts, loss.floor, loss.slope, loss.middle)
        return balanced_focal(u, shown, weights, shift, loss.scale)

    return balanced

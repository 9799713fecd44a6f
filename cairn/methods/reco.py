"""RECO: images and class texts refined by what a memory holds of their like, one transformer layer on either side.

Source: Iscen et al., Retrieval-Enhanced Contrastive Vision-Text Models (ICLR 2024), arXiv 2306.07196. Its abstract, published
summaries and reviews were read, its equations were not, so none is cited by number. [P] marks what they state: frozen towers; a
memory of images with texts, used at test; search within a modality, by image for images and by text for texts, and fusion across,
an image taking the texts of the images that are found and a text the images of the texts; one transformer layer for each side,
trained so that refined images and texts match each other and the original ones; another memory may be put in at test. [I] is
ours: everything that is of class increments, sizes, starting points, and cross entropy over classes in place of a contrast of
pairs, since many rows share a text.

    v^ = unit(v + phi_I([v ; u_j, j in N_I(v)])),   t^_c = unit(t_c + phi_T([t_c ; v_j, j in N_T(t_c)]))
    loss: CE(s v^ T^^T, y) + lambda (CE(s v^ T^T, y) + CE(s v T^^T, y))

In training a row does not find itself: it would find its own label, and the layer would learn to copy it.

Around another method (`base`) its embeddings take the place of the towers', and its class vectors, where it compares images with
such, that of class texts. What is kept of an image stays where it was when the base's encoder moves on.

Letters: v unit embedding of an image, t_c unit text of class c, rows of T; (v_j, u_j) the memory: unit embeddings of images and the
texts of their classes; N_I(v) the K rows of largest v . v_j, N_T(t) those of largest t . u_j; phi a layer's change of its query;
s scale; k classes, d width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, scaled_dot_product_attention

from cairn.config import with_values
from cairn.data.embeddings import features_dataset
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.exemplars import Exemplars
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.replay import ReplayBatches
from cairn.memory.retrieval import Exact, Index, Neighbours, Search, nearest_others, text_neighbours
from cairn.methods.catalogue import method_named
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, CosineScoring, Method, NamesClasses
from cairn.settings import Given, Settings, kind_by_name
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part

DUPLICATE = 0.999
"""Cosine from which a row of an outside memory is taken for the same picture."""


class Transformer(Given):
    """One transformer layer for each side, trained."""

    kind: Literal["transformer"] = Field(default="transformer", description="one transformer layer per side, trained")
    heads: int = Field(default=8, ge=1, description="heads of the attention; they divide d [I]")


class Average(Given):
    """The mean of what is found, with a fixed weight: plain k-nearest-neighbour fusion, nothing is trained."""

    kind: Literal["average"] = Field(default="average", description="the mean of what is found; nothing is trained")
    weight: float = Field(default=0.25, ge=0, le=1, description="share of what is found [I]")


FusionOf: TypeAlias = Transformer | Average


class RecoConfig(Settings):
    """The settings of RECO."""

    base: str = Field(
        default="", description="method whose embeddings and class vectors are refined; empty: the towers' [I]"
    )
    base_settings: dict[str, Any] = Field(default={}, description="settings of the base, by path")
    exemplars: int = Field(default=16, ge=1, description="embeddings kept per class, chosen by herding [I]")
    memory: str = Field(
        default="data",
        description="data: the exemplars alone; or a features file with texts, in addition [P: WebLI, LAION]",
    )
    neighbours: int = Field(default=5, ge=1, description="K, rows that are looked for [I]")
    floor: float = Field(default=-1.0, ge=-1, le=1, description="least cosine of a neighbour; -1: all count [I]")
    search: Search = Field(default=Exact(), description="exact, or approximate by faiss [I]")
    fusion: FusionOf = Field(default=Transformer(), description="transformer, or average: no training [P: transformer]")
    compare: Literal["both", "text", "image", "mean"] = Field(
        default="text",
        description="both: refined images with refined texts; text: images with refined texts; image: refined images with texts; "
        "mean: of the three [P: both]",
    )
    alignment: float = Field(
        default=1.0,
        ge=0,
        description="lambda, weight of refined against original rows in the loss; 0: off [P: some; I: 1]",
    )
    train: Literal["seen", "first"] = Field(
        default="seen", description="seen: on every task and the exemplars; first: on the first task alone [I; P: once]"
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=128, lr=1e-4), description="training of the layers [I]"
    )

    _kinds = field_validator("search", "fusion", mode="before")(kind_by_name)

    @property
    def alters_images(self) -> bool:
        """A base may train the tower, or alter images."""
        return bool(self.base)


class FusionLayer(nn.Module):
    """phi([q ; r_1 .. r_K]): what one pre-norm transformer layer adds to its first token, which alone is asked for.

    h = sqrt(d) q + e_q and sqrt(d) r_j + e_r; a = O attention(LN(h), LN([h ; r])), a + M2 gelu(M1 LN(h + a)).
    No positions: what is found is a set. O and M2 are zero at first, so that phi is [I].
    """

    def __init__(self, d: int, heads: int, rng: torch.Generator):
        super().__init__()
        if d % heads:
            raise ConfigError(f"fusion.heads={heads}: must divide the width of the embeddings, {d}")

        def drawn(n: int) -> nn.Parameter:
            """Uniform, of variance 1/d (Glorot)."""
            return nn.Parameter((2 * torch.rand(n, d, generator=rng) - 1) * math.sqrt(3 / d))

        self.heads = heads
        self.kinds = nn.Parameter(0.02 * torch.randn(2, d, generator=rng))  # e_q, e_r
        self.qkv, self.M1 = drawn(3 * d), drawn(d)
        self.O, self.M2 = nn.Parameter(torch.zeros(d, d)), nn.Parameter(torch.zeros(d, d))
        self.gains = nn.Parameter(torch.ones(2, d))

    def forward(
        self,
        query: Float[Tensor, "n d"],
        rows: Float[Tensor, "r d"],
        numbers: Int[Tensor, "n K"],
        present: Bool[Tensor, "n K"],
    ) -> Float[Tensor, "n d"]:
        """The tokens of query i are it and rows[numbers_i], as far as they are present. Keys and values are made once for each row."""
        (n, d), (Q, KV) = query.shape, (self.qkv[: query.shape[1]], self.qkv[query.shape[1] :])
        h = d**0.5 * query + self.kinds[0]
        own, others = (layer_norm(x, (d,), self.gains[0]) for x in (h, d**0.5 * rows + self.kinds[1]))
        tokens = torch.cat([(own @ KV.T)[:, None], (others @ KV.T)[numbers]], 1)
        found = ((own @ Q.T)[:, None], *tokens.chunk(2, 2))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in found)
        mask = torch.cat([present.new_ones(n, 1), present], 1)[:, None, None]
        a = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, d) @ self.O.T
        return a + gelu(layer_norm(h + a, (d,), self.gains[1]) @ self.M1.T) @ self.M2.T


class Held(NamedTuple):
    """The memory as it is searched: v_j, the text number of each row, and all texts, those of classes first."""

    rows: Float[Tensor, "m d"]
    labels: Labels
    texts: Float[Tensor, "g d"]
    search: Index


class RECO(NamesClasses):
    """argmax_c of s v . t^_c, or as `compare` says."""

    card = Card(
        title="RECO: images and class texts refined by what a memory holds of their like",
        source="Iscen et al. 2024",
        citation="Iscen et al. Retrieval-Enhanced Contrastive Vision-Text Models. ICLR 2024. arXiv 2306.07196.",
        config=RecoConfig,
        stages=(
            "one pass of the frozen tower, or whatever the base does",
            "fusion layers: refined images and texts against each other and the original ones, on the task's images and the exemplars",
            "exemplars: embeddings of each new class, herded towards its mean",
        ),
        trains="fusion layers",
        keeps="exemplars",
        bytes=lambda k, d, n, i, w: 4 * d * min(n, 16 * k) + 8 * k,
        needs="images; texts help",
        passes="one per image, can be cached; with a base, its own and one more",
        text=True,
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    def __init__(self, towers: Towers, config: RecoConfig, *, seed: int):
        self.towers, self.config, self.device, d = towers, config, towers.device, towers.dim
        self.base = _base(towers, config, seed)
        rng, how = Seeds(seed).generator("fusion"), config.fusion
        layers = (
            {side: FusionLayer(d, how.heads, rng) for side in ("image", "text")} if isinstance(how, Transformer) else {}
        )
        self.layers = nn.ModuleDict(layers).to(self.device)
        self.anchors, self.exemplars = torch.zeros(0, d), Exemplars.empty(d)
        self.outside, self.outside_labels, self.outside_texts = _outside(config.memory, d)
        self._held: Held | None = None
        self._refined_texts: Tensor | None = None

    @property
    def encoder(self) -> str:
        return self.base.encoder if self.base else FROZEN

    @property
    def memory_bytes(self) -> int:
        return self.exemplars.bytes + (self.base.memory_bytes if self.base else 0)

    @property
    def texts(self) -> Float[Tensor, "k d"]:
        """t_c: the base's class vectors where it has such."""
        return self.base.class_matrix.detach().cpu() if isinstance(self.base, CosineScoring) else self.anchors

    def learn(self, task: Task, ctx: Context) -> None:
        config, s = self.config, self.towers.logit_scale
        first, former = not len(self.anchors), self.encoder
        if self.base:
            self.base.learn(task, ctx)
        ctx = ctx.at(task=task.index)
        if self.encoder != former and not first:
            ctx.log("notice", text="the base's encoder has moved: embeddings kept of older images are as they were")
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, ctx.log).cpu()])
        x, y = encode(loader, lambda features, _: self._rows(features), ctx, "X", embed=self.embed)
        self._tell_duplicates(x, ctx.log)

        # The task's images and the exemplars of all classes: what is learned from, and the memory meanwhile.
        k, rows = len(self.anchors), torch.cat([x, self.exemplars.rows])
        labels = torch.cat([y, self.exemplars.labels])
        if self.layers and k > 1 and (first or config.train == "seen"):
            held = self._memory(rows, labels)
            own = nearest_others(
                held.search, held.rows[: len(rows)], torch.arange(len(rows), device=self.device), config.neighbours
            )
            T, all_rows, all_labels = held.texts[:k], held.rows[: len(rows)], labels.to(self.device)
            of_texts = text_neighbours(T, held.texts, held.rows, held.labels, config.neighbours)

            def loss(batch: Tensor, y: Tensor) -> Tensor:
                i, y = batch[:, 0].to(self.device), y.to(self.device)
                v = all_rows[i]
                fused = self._image(v, held, Neighbours(own.numbers[i], own.cosines[i]))
                texts = self._text(T, held, of_texts)
                value = cross_entropy(s * fused @ texts.T, y)
                apart = cross_entropy(s * fused @ T.T, y) + cross_entropy(s * v @ texts.T, y)
                return value + config.alignment * apart

            batches = ReplayBatches(
                torch.arange(len(rows))[:, None],
                all_labels.cpu(),
                GaussianMemory(self.towers.dim),
                batch=config.schedule.batch,
                real_share=None,
                device=self.device,
            )
            fit(loss, list(self.layers.parameters()), batches, config.schedule, ctx.logged_at(stage=1))

        sums = torch.zeros(k, x.shape[1]).index_add(0, labels, rows)
        means = sums / labels.bincount(minlength=k).clamp(min=1)[:, None]
        self.exemplars = self.exemplars.add(x, y, means, config.exemplars)
        self._changed()

    def _tell_duplicates(self, x: Features, log: Log) -> None:
        if len(self.outside) and len(x):
            near = self.config.search.index(self.outside).nearest(x, 1).cosines[:, 0]
            if number := int((near > DUPLICATE).sum()):
                log(
                    "notice",
                    text=f"memory={self.config.memory}: it holds {number} of the {len(x)} images of this task, or as good as",
                )

    def _rows(self, features: Features) -> Features:
        """v: the embedding, whatever else a base puts behind it."""
        return unit(features[:, : self.towers.dim])

    def _memory(self, rows: Features, labels: Labels) -> Held:
        """These rows and those from outside, whose texts come behind those of the classes."""
        texts = torch.cat([self.texts, self.outside_texts])
        labels = torch.cat([labels, self.outside_labels + len(self.anchors)])
        rows = torch.cat([rows, self.outside]).to(self.device)
        return Held(rows, labels.to(self.device), texts.to(self.device), self.config.search.index(rows))

    def _image(self, v: Features, held: Held, found: Neighbours) -> Features:
        """v^: an image takes the texts of the images that are found."""
        return self._fused("image", v, held.texts, held.labels[found.numbers], found.present(self.config.floor))

    def _text(self, t: Features, held: Held, found: Neighbours) -> Features:
        """t^: a text takes the images of the texts that are found."""
        some, numbers = found.numbers.unique(return_inverse=True)
        return self._fused("text", t, held.rows[some], numbers, found.present(self.config.floor))

    def _fused(
        self,
        side: str,
        query: Features,
        rows: Float[Tensor, "r d"],
        numbers: Int[Tensor, "n K"],
        present: Bool[Tensor, "n K"],
    ) -> Features:
        if isinstance(self.config.fusion, Average):
            w, shares = self.config.fusion.weight, present.float()[..., None]
            mean = (shares * rows[numbers]).sum(1) / shares.sum(1).clamp(min=1)
            return unit(torch.where(present.any(1, keepdim=True), (1 - w) * query + w * mean, query))
        return unit(query + self.layers[side](query, rows, numbers, present))

    def _changed(self) -> None:
        self._held = self._refined_texts = None

    def forget(self, c: int) -> None:
        if self.base:
            self.base.forget(c)
        self.anchors, self.exemplars = without(self.anchors, c), self.exemplars.without(c)
        self._changed()

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text, and what the base made of its name. What was trained with the old one stays."""
        if isinstance(self.base, NamesClasses):
            self.base.rename(c, named, log)
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)
        self._changed()

    def embed(self, pixels: Pixels) -> Features:
        return self.base.embed(pixels) if self.base else self.towers.image(pixels)

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        v, T, s, config = (
            self._rows(features.to(self.device)),
            self.texts.to(self.device),
            self.towers.logit_scale,
            self.config,
        )
        if self._held is None:
            self._held = self._memory(self.exemplars.rows, self.exemplars.labels)
        held = self._held
        if self._refined_texts is None:
            found = text_neighbours(T, held.texts, held.rows, held.labels, config.neighbours)
            self._refined_texts = self._text(T, held, found)
        refined = self._refined_texts
        if config.compare == "text":
            return s * v @ refined.T
        fused = self._image(v, held, held.search.nearest(v, config.neighbours))
        if config.compare == "both":
            return s * fused @ refined.T
        if config.compare == "image":
            return s * fused @ T.T
        return s * (fused @ refined.T + fused @ T.T + v @ refined.T) / 3

    def state_dict(self) -> State:
        parts: dict[str, State] = {
            "layers": {name: value.cpu().clone() for name, value in self.layers.state_dict().items()},
            "exemplars": self.exemplars.state_dict(),
        }
        return {"anchors": self.anchors} | flattened(parts | ({"base": self.base.state_dict()} if self.base else {}))

    def load_state_dict(self, state: State) -> None:
        self.anchors = state["anchors"]
        self.layers.load_state_dict(part(state, "layers"))
        self.exemplars = Exemplars.from_state(part(state, "exemplars"))
        if self.base:
            self.base.load_state_dict(part(state, "base"))
        self._changed()


def _base(towers: Towers, config: RecoConfig, seed: int) -> Method | None:
    """Raises ConfigError for a method whose features cannot be kept, UnknownName for none."""
    if not config.base:
        if config.base_settings:
            raise ConfigError(f"base_settings={config.base_settings}: there is no base; set base to a method's name")
        return None
    entry = method_named(config.base)
    if entry.build is RECO or entry.card.keeps == "images":
        raise ConfigError(f"base={config.base}: must be another method, one that keeps no images")
    settings = with_values(entry.default_config(towers), config.base_settings.items())
    return entry.build(towers, settings, seed=seed)


def _outside(memory: str, d: int) -> tuple[Features, Labels, Float[Tensor, "g d"]]:
    """Rows, text numbers and texts of a features file; nothing for `data`. Raises ConfigError and DataError."""
    if memory == "data":
        return torch.zeros(0, d), torch.zeros(0, dtype=torch.int64), torch.zeros(0, d)
    dataset = features_dataset(memory)
    held = dataset.embeddings
    if held.dim != d:
        raise ConfigError(
            f"memory={memory}: its rows have {held.dim} numbers, the towers' embeddings {d}; embed it with these"
        )
    if held.text is None:
        raise ConfigError(f"memory={memory}: the features file has no text_features, which this needs; add them")
    rows = torch.stack([torch.as_tensor(dataset.train[i]) for i in range(len(dataset.train))])
    return unit(rows.float()), torch.as_tensor(dataset.train.labels).long(), unit(torch.as_tensor(held.text).float())

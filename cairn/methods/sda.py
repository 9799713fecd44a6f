"""SDA: a stream that is seen once, a bounded buffer, and a contrast in which altered copies are classes of their own.

Source: Yu and Chiu, Mitigating Forgetting in Online Continual Learning via Contrasting Semantically Distinct Augmentations (2022),
arXiv 2211.05347. Its abstract was read, the paper was not, so no equation is cited by number. [P] marks what it states: one
stream, a bounded memory of images; a contrast in which strongly altered copies count as semantically different from their class;
beside it a softmax classifier under cross entropy, on images that are sampled against its bias to new classes; networks that are
trained from scratch. [K] is CSI for the rotations and their labels, SupCon for the loss, SCR for the projection head and for class
means of the buffer as a classifier, OnPro for a classifier that learns from the buffer alone. Every formula below is ours [I]. For
each batch X of the stream:

1. X_m is drawn from the buffer, then X enters it, then X_c is drawn, of each class as many, `sampled` in all.
2. A contrast in which copy a of class y has a label of its own, so that it is held apart from the class; P(i) are the other rows with
   the label of row i:

    V = {sigma_a(x), sigma_a(view(x)) : x in X and X_m, a = 0..S-1}, label (y, a);  h = unit(B relu(A f(.)))
    L_con = mean_i -1/|P(i)| sum_{p in P(i)} log(exp(h_i.h_p / tau) / sum_{j != i} exp(h_i.h_j / tau))

3. Cross entropy on the balanced draw:

    L_ce = CE(s z C^T, y) over view(x), x in X_c, all classes seen;  C = unit(T + R)

4. One step, with neither warm-up nor decay, since where the stream ends is not known:

    contrast L_con + L_ce

`contrast=0, classified=both` is plain experience replay: cross entropy on X and X_m. It has a small part of the passes in a step;
`steps` gives it the others.

Letters: sigma_a the shifts, sigma_0 the identity; z unit embedding, h unit projection of the embedding; T unit class texts, R what is
trained of the classes; s scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from cairn.data.augment import CHANCES, noisy, view
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.errors import ConfigError
from cairn.maths.losses import class_cross_entropy, supervised_contrast
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.buffer import Buffer, Insertion
from cairn.methods.parts.two_stage import TrainedVision
from cairn.methods.protocol import Card, LearnsOnline, TunesImageTower
from cairn.settings import Given, Settings, kind_by_name
from cairn.towers.protocol import Towers
from cairn.towers.tuning import Adapter, Frozen, ImageEncoder, Lora, Projection
from cairn.training.context import Context, Seeds
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels, Pixels, State, flattened, part

EMBEDDED = 256
"""Items of the buffer that pass the tower at once, for class means."""

Shift: TypeAlias = Callable[[Tensor], Tensor]
"""Of pixels, or of rows."""


class Rotations(Given):
    """Turns by 90 degrees, or by 180."""

    kind: Literal["rotations"] = Field(default="rotations", description="turned images [K: CSI]")
    number: Literal[2, 4] = Field(default=4, description="S, copies with the image as it is; 2: upside down alone")

    def shifts(self, towers: Towers, rng: torch.Generator) -> list[Shift]:
        if not towers.has_images:
            raise ConfigError("shifts 'rotations': a features file has no images to turn; take permutations")
        turns = [a * 4 // self.number for a in range(self.number)]
        return [lambda pixels, k=k: torch.rot90(pixels, k, (2, 3)) for k in turns]


class Permutations(Given):
    """Tiles of an image change places, each time all of them; on a features file the numbers of a row do."""

    kind: Literal["permutations"] = Field(
        default="permutations", description="tiles, or numbers of a row, change places"
    )
    number: int = Field(default=4, ge=2, description="S, copies with the image as it is; at most grid^2")
    grid: int = Field(default=2, ge=2, description="tiles along a side of an image")

    def shifts(self, towers: Towers, rng: torch.Generator) -> list[Shift]:
        pieces = self.grid**2 if towers.has_images else towers.dim
        if self.number > pieces:
            raise ConfigError(f"shifts.number={self.number}: at most {pieces}, one for each piece that changes places")
        orders = derangements(pieces, self.number, rng)
        if not towers.has_images:
            return [lambda rows, order=order: rows[:, order.to(rows.device)] for order in orders]
        return [lambda pixels, order=order: moved_tiles(pixels, self.grid, order) for order in orders]


class Unshifted(Given):
    """No copies: the contrast is that of SCR."""

    kind: Literal["none"] = Field(default="none", description="no copies")

    def shifts(self, towers: Towers, rng: torch.Generator) -> list[Shift]:
        return [lambda pixels: pixels]


Shifts: TypeAlias = Rotations | Permutations | Unshifted


class SdaConfig(Settings):
    """The settings of SDA."""

    tuning: Lora | Projection | Adapter | Frozen = Field(
        default=Lora(), description="what is trained of the tower: lora, projection, adapter or none [I]"
    )
    shifts: Shifts = Field(
        default=Rotations(), description="strong augmentations: rotations, permutations or none [K: CSI]"
    )
    shifted: Literal["apart", "own"] = Field(
        default="apart",
        description="apart: copy a of class y has label (y, a); own: it has that of its class [P: apart]",
    )
    contrast: float = Field(default=1.0, ge=0, description="weight of the contrast; 0: cross entropy alone [I: 1]")
    temperature: float = Field(default=0.07, gt=0, description="tau of the contrast [K: SupCon]")
    width: int = Field(
        default=128, ge=1, description="numbers of h, the projection that the contrast compares [K: SCR]"
    )
    buffer: int = Field(default=1000, ge=1, description="prepared images that are kept at most [P: some]")
    insertion: Insertion = Field(
        default="balanced",
        description="who stays: balanced, of each class as many; reservoir, each with the same chance [K]",
    )
    replayed: int = Field(
        default=32, ge=1, description="images drawn from the buffer for each of both losses, in a step [I]"
    )
    classified: Literal["buffer", "both"] = Field(
        default="buffer",
        description="what the classifier learns from: a draw from the buffer, the batch being in it, or the batch and a draw [P: "
        "sampled; K: OnPro]",
    )
    sampled: int | None = Field(
        default=None,
        ge=1,
        description="images drawn from the buffer for the cross entropy, classes alike; null: as many as replayed [P: sampled]",
    )
    contrasted: Literal["both", "views"] = Field(
        default="both",
        description="both: each image as it is and in a view; views: in a view alone, at half the passes [I]",
    )
    steps: int = Field(
        default=1, ge=1, description="steps for each batch of the stream, each with draws of its own [I]"
    )
    decision: Literal["classifier", "means"] = Field(
        default="classifier",
        description="classifier: C; means: class means of the buffer's embeddings [P: classifier; K: SCR for means]",
    )
    noise: float = Field(
        default=0.3,
        ge=0,
        description="length of the noise on a row that stands for a view, as a share of the row's [I]",
    )
    image_rate: float = Field(default=0.2, gt=0, description="rate of the tower, as a share of the schedule's [I]")
    class_rate: float = Field(default=1.0, gt=0, description="rate of R, as a share of the schedule's [I]")
    schedule: Schedule = Field(
        default=Schedule(epochs=1, batch=10, lr=1e-3, warmup=0, cosine=False),
        description="optimisation; batch: images of the stream in a step [K: 10]",
    )

    _kinds = field_validator("tuning", "shifts", mode="before")(kind_by_name)

    @property
    def alters_images(self) -> bool:
        return True

    @classmethod
    def embedding(cls) -> SdaConfig:
        """The form that needs no image tower: numbers of a row change places, and noise makes a view."""
        return cls(tuning=Adapter(), shifts=Permutations())


class Step(NamedTuple):
    """What one step is made of, beside the labels of `classified`."""

    contrasted: Pixels | None
    """sigma_a(x) and sigma_a(view(x)), one below the other; None without a contrast."""
    groups: Labels
    """Their labels."""
    classified: Pixels


class OnlineBatches:
    """Batches of the stream and what is replayed with them; `buffer` is what has entered it so far.

    In the first pass images come in an order of the task's seeds, and each enters the buffer before its step. Order, entries and
    draws follow from the seeds alone: who goes on with a pass lets those that it leaves out enter again.
    """

    def __init__(
        self, task: Task, towers: Towers, config: SdaConfig, shifts: Sequence[Shift], buffer: Buffer, seeds: Seeds
    ):
        self.towers, self.config, self.shifts, self.buffer, self.seeds = towers, config, shifts, buffer, seeds
        self.loader = Loader(task.train, towers.prepare, lambda prepared: prepared, batch=config.schedule.batch)
        self.entered = 0

    def __len__(self) -> int:
        return len(self.loader) * self.config.steps

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Step, Tensor]]]:
        first = self.config.schedule.epochs - len(rngs)
        for i, rng in enumerate(rngs):
            yield self._first(rng, 0 if i else skip) if first + i == 0 else self._again(rng, 0 if i else skip)

    def _entering(self) -> Iterator[tuple[Tensor, Tensor, Buffer]]:
        """Batches that have not entered the buffer yet, each with the buffer before it; then it is in."""
        batches = self.loader.epoch(self.seeds.generator("order"), self.entered)
        for number, (items, labels) in enumerate(batches, start=self.entered):
            before = self.buffer
            self.buffer = before.add(items, labels, self.seeds.at(batch=number).generator("buffer"))
            self.entered = number + 1
            yield items, labels, before

    def _first(self, rng: torch.Generator, skip: int) -> Iterator[tuple[Step, Tensor]]:
        seed = _seed(rng)
        for number, (items, labels, before) in enumerate(self._entering()):
            yield from self._steps(items, labels, before, seed, number, skip)

    def _again(self, rng: torch.Generator, skip: int) -> Iterator[tuple[Step, Tensor]]:
        """A later pass, for which all are in the buffer."""
        self.all_entered()
        seed, steps = _seed(rng), self.config.steps
        done = skip // steps
        for number, (items, labels) in enumerate(self.loader.epoch(rng, done), start=done):
            yield from self._steps(items, labels, self.buffer, seed, number, skip)

    def all_entered(self) -> Buffer:
        """The buffer behind the first pass, also where nobody went through it."""
        for _ in self._entering():
            pass
        return self.buffer

    def _steps(
        self, items: Tensor, labels: Tensor, before: Buffer, seed: int, number: int, skip: int
    ) -> Iterator[tuple[Step, Tensor]]:
        for step in range(number * self.config.steps, (number + 1) * self.config.steps):
            if step >= skip:
                yield self._step(items, labels, before, torch.Generator().manual_seed(seed + step))

    def _step(self, items: Tensor, labels: Tensor, before: Buffer, rng: torch.Generator) -> tuple[Step, Tensor]:
        x, y = _with(items, labels, before, before.draw(self.config.replayed, rng))
        if self.config.classified == "both":
            own, names = x, y
        else:
            sampled = self.config.sampled or self.config.replayed
            own, names = _with(items[:0], labels[:0], self.buffer, self.buffer.draw(sampled, rng))
        classified = self._view(self.towers.pixels(own), rng)
        if not self.config.contrast:
            return Step(None, y[:0], classified), names
        pixels = self.towers.pixels(x)
        copies = [self._view(pixels, rng)]
        if self.config.contrasted == "both":
            copies.insert(0, pixels)
        S = len(self.shifts)
        shifted = torch.cat([shift(torch.cat(copies)) for shift in self.shifts])
        groups = (y.repeat(len(copies))[None] * S + torch.arange(S)[:, None]).flatten()
        return Step(shifted, groups if self.config.shifted == "apart" else groups // S, classified), names

    def _view(self, pixels: Pixels, rng: torch.Generator) -> Pixels:
        if self.towers.has_images:
            return view(pixels, torch.rand(len(pixels), CHANCES, generator=rng))
        return noisy(pixels, self.config.noise, rng)


class SDA(TrainedVision[ImageEncoder], TunesImageTower, LearnsOnline):
    """argmax_c s cos(f_b(x), C_c), f_b and C trained on the stream and on what a buffer holds of it."""

    card = Card(
        title="SDA: one pass, a buffer of images, altered copies held apart",
        source="Yu and Chiu 2022",
        citation="Yu and Chiu. Mitigating Forgetting in Online Continual Learning via Contrasting Semantically Distinct "
        "Augmentations. 2022. arXiv 2211.05347.",
        config=SdaConfig,
        stages=(
            "for each batch of the stream: it enters the buffer, and what is drawn from there joins it",
            "one step: contrast of images and altered copies of them, cross entropy on a balanced draw from the buffer",
        ),
        trains="vision and classes",
        keeps="buffer",
        bytes=lambda k, d, n, i, w: min(n, 1000) * (i + 8) + 8 * k,
        needs="images; texts help",
        passes="368 for 10 images, with gradients: altered, turned and replayed ones among them",
        text=True,
        moves=True,
        quick={"schedule.epochs": 1, "schedule.batch": 8, "replayed": 4, "shifts": "none"},
    )

    def __init__(self, towers: Towers, config: SdaConfig, *, seed: int):
        super().__init__(towers, config, ImageEncoder(towers, config.tuning, Seeds(seed).generator("encoder")))
        self.head = projection(towers.dim, config.width, Seeds(seed).generator("head")).to(towers.device)
        self.shifts = config.shifts.shifts(towers, Seeds(seed).generator("shifts"))
        self.buffer = Buffer(config.buffer, config.insertion)
        self.residuals = torch.zeros(0, towers.dim)
        self.means = torch.zeros(0, towers.dim)

    @property
    def encoder(self) -> str:
        return f"vision-{self.image.version}"

    @property
    def repeats(self) -> str | None:
        epochs = self.config.schedule.epochs
        return f"schedule.epochs={epochs} goes over images again" if epochs > 1 else None

    @property
    def memory_bytes(self) -> int:
        return self.buffer.bytes + self.means.nbytes

    def learn(self, task: Task, ctx: Context) -> None:
        config = self.config
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        new = self.add_anchors(task, loader, ctx).cpu()
        R = nn.Parameter(torch.cat([self.residuals, torch.zeros_like(new)]).to(self.towers.device))
        batches = OnlineBatches(task, self.towers, config, self.shifts, self.buffer, ctx.seeds)
        self._train(batches, R, ctx)
        self.residuals, self.buffer = R.detach().cpu(), batches.all_entered()
        self.image.version += 1
        if config.decision == "means":
            self.means = self._means()

    def _train(self, batches: OnlineBatches, R: nn.Parameter, ctx: Context) -> None:
        config, s, device, T = self.config, self.towers.logit_scale, R.device, self.anchors.to(R.device)

        def loss(step: Step, y: Tensor) -> Tensor:
            value = class_cross_entropy(unit(self.image(step.classified)), unit(T + R), y.to(device), s)
            if step.contrasted is not None:
                h = unit(self.head(self.image(step.contrasted)))
                value = value + config.contrast * supervised_contrast(h, step.groups.to(device), config.temperature)
            return value

        image = self.image.parameters()
        head = list(self.head.parameters()) if config.contrast else []
        rates = [config.image_rate] * len(image) + [1.0] * len(head) + [config.class_rate]
        fit(loss, [*image, *head, R], batches, config.schedule, ctx, rates=rates, model=self.image)

    @torch.no_grad()
    def _means(self) -> Float[Tensor, "k d"]:
        """Unit means of the buffer's unit embeddings; the classifier's vector of a class of which nothing is left there."""
        z = [unit(self.embed(self.towers.pixels(items))).cpu() for items in self.buffer.items.split(EMBEDDED)]
        sums = torch.zeros_like(self.anchors).index_add(0, self.buffer.labels, torch.cat(z))
        return torch.where(sums.any(1, keepdim=True), unit(sums), self._classifier)

    @property
    def _classifier(self) -> Float[Tensor, "k d"]:
        return unit(self.anchors + self.residuals)

    @property
    def class_matrix(self) -> Features:
        return self.means if self.config.decision == "means" else self._classifier

    def forget(self, c: int) -> None:
        super().forget(c)
        self.residuals = without(self.residuals, c)
        self.means, self.buffer = without(self.means, c), self.buffer.without(c)

    def state_dict(self) -> State:
        head = {name: value.cpu().clone() for name, value in self.head.state_dict().items()}
        held = {"residuals": self.residuals, "means": self.means}
        return super().state_dict() | held | flattened({"head": head, "buffer": self.buffer.state_dict()})

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.residuals, self.means = state["residuals"], state["means"]
        self.head.load_state_dict(part(state, "head"))
        self.buffer = self.buffer.restored(part(state, "buffer"))


def projection(d: int, width: int, rng: torch.Generator) -> nn.Sequential:
    """x -> B relu(A x), A d x d and B width x d, as torch starts layers."""
    layers = nn.Sequential(*(nn.Linear(d, n, device="meta").to_empty(device="cpu") for n in (d, width)))
    for value in layers.parameters():
        nn.init.uniform_(value, -(d**-0.5), d**-0.5, generator=rng)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def derangements(n: int, number: int, rng: torch.Generator) -> list[Int[Tensor, " n"]]:
    """`number` orders of n pieces, the first as they are; in no two of them has a piece the same place."""
    ring = torch.randperm(n, generator=rng)
    orders = []
    for a in range(number):
        order = torch.empty_like(ring)
        order[ring] = ring.roll(-(a * n // number))
        orders.append(order)
    return orders


def moved_tiles(pixels: Float[Tensor, "n c h w"], grid: int, order: Int[Tensor, " g"]) -> Float[Tensor, "n c h w"]:
    """Images of which tile i of a grid, row by row, shows what tile order[i] did; rest that no tile has stays."""
    h, w = (size // grid for size in pixels.shape[2:])
    places = [(slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w)) for i in range(grid) for j in range(grid)]
    moved = pixels.clone()
    for i, j in enumerate(order.tolist()):
        moved[(..., *places[i])] = pixels[(..., *places[j])]
    return moved


def _with(items: Tensor, labels: Tensor, buffer: Buffer, places: Tensor) -> tuple[Tensor, Tensor]:
    """Items and what stands at these places of the buffer."""
    if not len(places):
        return items, labels
    return torch.cat([items, buffer.items[places]]), torch.cat([labels, buffer.labels[places]])


def _seed(rng: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=rng))

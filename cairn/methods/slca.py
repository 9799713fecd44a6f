"""SLCA: the encoder learns slowly, and a linear classifier is aligned afterwards on draws from all classes' Gaussians.

Source: Zhang et al., SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model (ICCV 2023,
arXiv 2303.05118), the sections on the slow learner and on classifier alignment. Per task:
1. Slow learner [P]: the whole image tower and the classifier's rows of the task's classes are trained together by cross
   entropy over those classes alone, the tower at a much smaller learning rate (.0001 against .01).
2. Statistics [P]: mean and covariance of each new class, under the encoder as the task left it. They stay as they are while
   later tasks move it on.
3. Classifier alignment [P]: draws from the Gaussians of all classes seen train the classifier alone. Its logits are
   normalised there, H / (tau N), so that it cannot win by growing: N is the mean over the tasks of the length of H over
   the task's classes [P: published code]. The mean of a class of task t of T (from 1) is drawn as (.9 + .1 t/T) of itself
   [P: published code]. Predictions are by H as it is.

Ours [I]: the classifier sees sqrt(d) z, of the length that a ViT's last layer norm gives (a tower of CLIP has a scale of its
own, and embeddings on disk are often normalised); draws are put back on the sphere; rows of new classes start at zero; half
a cosine in place of steps of the learning rate; fewer epochs.

Letters: f(x) image embedding, z = f(x)/|f(x)|, d wide; (W, b) classifier; H = sqrt(d) W z + b; N(mu_c, S_c) Gaussian of class c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.losses import normalised_cross_entropy
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, kept_bytes
from cairn.memory.protocol import ClassMemory
from cairn.methods.parts.stages import behind_trunk, competing
from cairn.methods.protocol import Card, GaussianScoring, TunesImageTower
from cairn.settings import Settings, kind_by_name
from cairn.towers.protocol import Towers
from cairn.towers.tuning import Adapter, Full, ImageEncoder, Tuning
from cairn.training.context import Context, Seeds
from cairn.training.encode import encode
from cairn.training.fit import BetaAverage, Schedule, fit
from cairn.types import Features, Labels, Pixels, Scores, State, flattened, part


class SlowLearner(Settings):
    """Stage 1: encoder and classifier, each at its own rate."""

    tuning: Tuning = Field(
        default=Full(lr=1e-4, average=None),
        description="what is trained of the encoder: full [P], lora, adapter, ... or none",
    )
    slow: float = Field(
        default=0.01,
        gt=0,
        description="learning rate of the encoder, a multiple of the classifier's; `full` has its own [P; I: 1]",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=5, batch=128, lr=0.01, optimizer="sgd"),
        description="optimisation; lr is the classifier's [P: SGD, .01, 128; K: 20 epochs on CIFAR-100]",
    )

    _kinds = field_validator("tuning", mode="before")(kind_by_name)


class Alignment(Settings):
    """Stage 3: the classifier alone, on draws."""

    per_class: int = Field(default=256, ge=1, description="draws of each class in an epoch [K]")
    temperature: float = Field(default=0.1, gt=0, description="tau of the normalised logits [P]")
    normalise: Literal["tasks", "all"] = Field(
        default="tasks", description="logits by the mean over tasks of their length, or by their length [P: tasks]"
    )
    shrink: float = Field(
        default=0.1, ge=0, lt=1, description="means of task t of T are drawn shrunk by shrink (1 - t/T); 0: off [P: .1]"
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=5, batch=128, lr=0.01, optimizer="sgd"),
        description="optimisation; epochs=0: no alignment [K]",
    )


class SlcaConfig(GaussianSettings):
    """The settings of SLCA."""

    stage1: SlowLearner = Field(default=SlowLearner())
    stage2: Alignment = Field(default=Alignment())

    @classmethod
    def embedding(cls) -> SlcaConfig:
        """The form for precomputed embeddings: a linear adapter in place of the tower, at the classifier's rate [I]."""
        return cls(stage1=SlowLearner(tuning=Adapter(), slow=1.0))


class SLCA(GaussianScoring[GaussianMemory], TunesImageTower):
    """argmax_c H_c, H = sqrt(d) W z + b."""

    card = Card(
        title="SLCA: slow learner, classifier aligned on draws",
        source="Zhang et al. 2023",
        citation="Zhang et al. SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model. "
        "ICCV 2023. arXiv 2303.05118.",
        config=SlcaConfig,
        stages=(
            "stage 1: vision learns slowly, beside a linear classifier of the task's classes",
            "statistics: a Gaussian per class from one pass of the new encoder",
            "stage 2: the classifier alone, on draws of all classes, with normalised logits",
        ),
        trains="vision, then head",
        keeps="gaussians",
        bytes=lambda k, d, n, i, w: kept_bytes(k, d),
        passes="one per image and epoch, with gradients, and one more",
        moves=True,
        older={"stage2": {"normalise": "all", "shrink": 0.0}},
        quick={
            "stage1.schedule.epochs": 1,
            "stage1.schedule.batch": 8,
            "stage1.schedule.lr": 1e-3,
            "stage2.schedule.epochs": 2,
            "stage2.schedule.batch": 8,
        },
    )

    def __init__(self, towers: Towers, config: SlcaConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.image = ImageEncoder(towers, config.stage1.tuning, Seeds(seed).generator("encoder"))
        self.memory = config.memory(towers.dim)
        self.head = torch.zeros(0, towers.dim + 1)
        """Row c is W_c and behind it b_c."""
        self.tasks = torch.zeros(0, dtype=torch.int64)
        """Of each class, the number of the task that it came with."""

    @property
    def encoder(self) -> str:
        return f"vision-{self.image.version}"

    def learn(self, task: Task, ctx: Context) -> None:
        ctx = ctx.at(task=task.index)
        stage1, stage2 = self.config.stage1, self.config.stage2
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=stage1.schedule.batch)
        loader = behind_trunk(loader, self.image, ctx)
        head = torch.cat([self.head, torch.zeros(len(task.names), self.towers.dim + 1)])
        number = int(self.tasks.max()) + 1 if len(self.tasks) else 0
        self.tasks = torch.cat([self.tasks, torch.full((len(task.names),), number)])

        # 1. Slow learner: the task's classes compete among themselves, and old rows stand still.
        present, encoder = loader.labels.unique(), self.image.parameters()
        rows = nn.Parameter(head[present].to(self.image.device))
        classes = competing(present, len(head), ctx.log.at(stage=1))
        others = head[classes[~torch.isin(classes, present)]].to(rows.device)

        def slow_loss(pixels: Pixels, y: Labels) -> Tensor:
            H = _logits(unit(self.image(pixels)), torch.cat([rows, others]))
            return cross_entropy(H, torch.searchsorted(present, y).to(H.device))

        rate, average = stage1.slow, None
        if isinstance(stage1.tuning, Full):
            rate = stage1.tuning.lr / stage1.schedule.lr
            if stage1.tuning.average is not None:
                average = BetaAverage(encoder, stage1.tuning.average)
        rates = [rate] * len(encoder) + [1.0]
        schedule = stage1.schedule if len(classes) > 1 else stage1.schedule.model_copy(update={"epochs": 0})
        fit(
            slow_loss,
            [*encoder, rows],
            loader,
            schedule,
            ctx.at(stage=1),
            rates=rates,
            average=average,
            model=self.image,
        )
        if encoder and schedule.epochs:
            self.image.version += 1
        head[present] = rows.detach().cpu()

        # 2. Statistics of the task's classes under the encoder as it now is.
        with self.image.inference():
            z, y = encode(loader, lambda z, _: z, ctx, "Z", embed=self.embed)
        self.memory = self.memory.add(unit(z), y)

        # 3. Classifier alignment: all classes seen, each drawn as often as any other.
        rows = nn.Parameter(head.to(self.image.device))

        def alignment_loss(z: Features, y: Labels) -> Tensor:
            H = _logits(z.to(rows.device), rows)
            groups = self.tasks if stage2.normalise == "tasks" else None
            return normalised_cross_entropy(H, y.to(rows.device), stage2.temperature, groups)

        draws = _Draws(self.memory, self._shrunk(stage2.shrink), stage2.per_class, stage2.schedule.batch, rows.device)
        fit(alignment_loss, [rows], draws, stage2.schedule, ctx.at(stage=2))
        self.memory.tell_repairs(ctx.log)
        self.head = rows.detach().cpu()

    def _shrunk(self, shrink: float) -> Float[Tensor, "k d"]:
        """shrink (1 - t/T) mu_c, what a draw of class c of task t of T is short of."""
        present, t = self.tasks.unique(return_inverse=True)
        return (shrink * (1 - (t + 1) / len(present)))[:, None] * self.memory.means.float()

    def forget(self, c: int) -> None:
        self.tasks = without(self.tasks, c)
        self.head = without(self.head, c)
        self.memory = self.memory.without(c)

    def embed(self, pixels: Pixels) -> Features:
        return self.image(pixels)

    def row_scores(self, z: Features) -> Scores:
        return _logits(z, self.head.to(z.device))

    def state_dict(self) -> State:
        held = {"head": self.head, "tasks": self.tasks}
        return held | flattened({"image": self.image.state_dict(), "memory": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.head = state["head"]
        self.tasks = state.get(
            "tasks", torch.zeros(len(self.head), dtype=torch.int64)
        )  # older ones do not tell tasks apart
        self.image.load_state_dict(part(state, "image"))
        self.memory = self.memory.restored(part(state, "memory"))


def _logits(z: Float[Tensor, "n d"], rows: Float[Tensor, "k e"]) -> Float[Tensor, "n k"]:
    """H = sqrt(d) W z + b, the rows holding W and b."""
    return z.shape[1] ** 0.5 * z @ rows[:, :-1].T + rows[:, -1]


class _Draws:
    """An epoch is `per_class` draws of every class, made on `device`, less what `shrunk` has for it, on the unit sphere and mixed."""

    def __init__(
        self, memory: ClassMemory, shrunk: Float[Tensor, "k d"], per_class: int, batch: int, device: torch.device
    ):
        self.memory, self.per_class, self.batch, self.device = memory, per_class, batch, device
        self.shrunk = shrunk.to(device)

    def __len__(self) -> int:
        return -(-self.per_class * self.memory.classes // self.batch)

    def epochs(
        self, rngs: Sequence[torch.Generator], skip: int = 0
    ) -> Iterator[Iterator[tuple[Features, Int[Tensor, " n"]]]]:
        """One epoch for each generator; of the first one, `skip` batches are passed over."""
        return (islice(self._epoch(rng), 0 if i else skip, None) for i, rng in enumerate(rngs))

    def _epoch(self, rng: torch.Generator) -> Iterator[tuple[Features, Int[Tensor, " n"]]]:
        (z,), y = self.memory.draws(self.per_class, [rng], device=self.device)
        y = y.to(self.device)
        z = z - self.shrunk[y]
        for rows in torch.randperm(len(y), generator=rng).to(self.device).split(self.batch):
            yield unit(z[rows]), y[rows]

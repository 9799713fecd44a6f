"""APER: the image encoder is adapted to the first task, then stands; class means of its embeddings and the original's.

Source: Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All
You Need (2023), arXiv 2303.07338, section 4.2: adapt, concatenate, average. The adapter form is the default, LoRA and
full tuning are settings; on features files the adapter is a residual linear map behind the tower [I].

Letters: f the encoder as it came, f* the adapted one; x = [f(x) ; f*(x)], p_c the mean of class c in that space.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.similarity import unit
from cairn.memory.means import ClassMeans
from cairn.methods.parts.first_session import adapted
from cairn.methods.parts.stages import behind_trunk
from cairn.methods.protocol import Card
from cairn.settings import Settings, kind_by_name
from cairn.towers.protocol import Towers
from cairn.towers.tuning import Adapter, Bottleneck, ImageEncoder, Tuning
from cairn.training.context import Context, Seeds
from cairn.training.encode import encode
from cairn.training.fit import Schedule
from cairn.types import Features, Pixels, Scores, State, flattened, part


class AperConfig(Settings):
    """The settings of APER."""

    tuning: Tuning = Field(
        default=Bottleneck(),
        description="what is trained on the first task: bottleneck, lora, full, projection, adapter or none",
    )
    schedule: Schedule = Field(
        default=Schedule(epochs=20, batch=48, lr=0.01, optimizer="sgd"), description="optimisation on the first task"
    )

    _kinds = field_validator("tuning", mode="before")(kind_by_name)

    @classmethod
    def embedding(cls) -> AperConfig:
        """The form that needs no image tower."""
        return cls(tuning=Adapter())


class APER:
    """argmax_c s cos([f(x) ; f*(x)], p_c)."""

    card = Card(
        title="APER: class means of the adapted and the original encoder",
        source="Zhou et al. 2023",
        citation="Zhou et al. Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity "
        "are All You Need. arXiv 2303.07338.",
        config=AperConfig,
        stages=("first task alone: the image encoder is adapted", "mean per class of [original ; adapted] embeddings"),
        trains="vision, first task",
        keeps="means",
        bytes=lambda k, d, n, i, w: k * (8 * d + 8),
        passes="two per image; in the first task one per epoch, with gradients",
        moves=True,
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    def __init__(self, towers: Towers, config: AperConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.image = ImageEncoder(towers, config.tuning, Seeds(seed).generator("encoder"))
        self.means = ClassMeans.empty(2 * towers.dim)

    @property
    def encoder(self) -> str:
        return f"adapted-{self.image.version}"

    @property
    def memory_bytes(self) -> int:
        return self.means.bytes

    def learn(self, task: Task, ctx: Context) -> None:
        ctx = ctx.at(task=task.index)
        schedule = self.config.schedule
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=schedule.batch)
        loader = behind_trunk(loader, self.image, ctx)
        z, y = adapted(self.image, self.towers, loader, schedule, ctx.at(stage=1))
        with self.image.inference():
            z1, _ = encode(loader, lambda pixels, _: self.image(pixels), ctx, "Z1")
        self.means = self.means.add(torch.cat([z, z1], 1), y)

    def forget(self, c: int) -> None:
        self.means = self.means.without(c)

    def embed(self, pixels: Pixels) -> Features:
        """[f*(x) ; f(x)]: first comes the image side as it stands."""
        return torch.cat([self.image(pixels), self.towers.image(pixels)], 1)

    def scores(self, features: Features) -> Scores:
        x = features.roll(self.towers.dim, 1)  # as the means have it
        return self.towers.logit_scale * unit(x) @ unit(self.means.means.to(x.device)).T

    def state_dict(self) -> State:
        return flattened({"image": self.image.state_dict(), "means": self.means.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.image.load_state_dict(part(state, "image"))
        self.means = ClassMeans.from_state(part(state, "means"))

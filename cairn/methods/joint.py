"""Joint training: after each task, both stages on the images of *all* tasks so far.

It keeps every image, so it is no class-incremental method: it stands in the tables to measure the others by. How far it is an
upper bound depends on its settings and the data: see docs/measured.md.
"""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import nn

from cairn.config import Settings
from cairn.data.images import Concatenation
from cairn.data.loading import Loader
from cairn.data.stream import Task, without_class
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.protocol import Card, CosineScoring, KeepsImages
from cairn.methods.stages import BOUND, TextStage, VisionStage, align_text, align_vision, class_anchors
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.towers.tuning import ImageEncoder
from cairn.training.checkpoint import Checkpoint
from cairn.training.encode import encode
from cairn.training.log import Log
from cairn.training.schedule import Schedule
from cairn.training.seeds import Seeds
from cairn.types import Features, Pixels


class JointConfig(Settings):
    """Both stages of DMC, given everything at once."""

    stage1: VisionStage = Field(default=BOUND)
    stage2: TextStage = Field(default=TextStage(schedule=Schedule(epochs=3, batch=128, lr=0.2)))
    restart: bool = Field(
        default=False, description="start from the pretrained weights after each task; else train on from the last"
    )

    @classmethod
    def embedding(cls) -> JointConfig:
        return cls(stage1=VisionStage.embedding().model_copy(update={"classes": "seen"}), stage2=TextStage())


class Joint(CosineScoring, KeepsImages):
    """argmax_c s cos(f(x), t_c), f and t trained on all images seen so far."""

    card = Card(
        title="Joint training on all images so far",
        source="the field's baseline",
        citation="The joint-training baseline of the class-incremental literature.",
        config=JointConfig,
        stages=("stage 1 on all images so far", "stage 2 on all images so far"),
        trains="vision, then text",
        keeps="images",
        bytes=lambda k, d, n, i, w: n * i,
        needs="images, all of them, always; texts help",
        passes="one per image so far and epoch, with gradients",
        text=True,
        moves=True,
        quick={
            "stage1.schedule.epochs": 1,
            "stage1.schedule.batch": 8,
            "stage1.schedule.lr": 1e-3,
            "stage2.schedule.epochs": 2,
            "stage2.schedule.batch": 8,
        },
    )

    def __init__(self, towers: Towers, config: JointConfig, *, seed: int, log: Log):
        self.towers, self.config, self.log, self.seeds = towers, config, log, Seeds(seed)
        self.tasks: list[Task] = []
        self.anchors = torch.zeros(0, towers.dim)
        self._start()

    def _start(self) -> None:
        """The pretrained weights."""
        self.image = ImageEncoder(self.towers, self.config.stage1.tuning, self.seeds.generator("encoder"))
        self.texts = self.config.stage2.text.build(self.towers).to(self.towers.device)
        for task in self.tasks:
            self._grow(task)

    def _grow(self, task: Task) -> None:
        rows = self.anchors[task.classes.start : task.classes.stop].to(self.towers.device)
        if task.names:
            self.texts.grow(task.names, rows, self.seeds.at(task=task.index).generator("texts"))

    @property
    def encoder(self) -> str:
        return f"joint-{len(self.tasks)}"

    @property
    def memory_bytes(self) -> int:
        """Every image, as prepared for the tower."""
        tasks = [task for task in self.tasks if len(task.train)]
        return sum(self.towers.prepare(task.train[0]).nbytes * len(task.train) for task in tasks)

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        stage1, stage2, s = self.config.stage1, self.config.stage2, self.towers.logit_scale
        seeds, log = self.seeds.at(task=task.index), self.log.at(task=task.index)
        own = Loader(task.train, self.towers.prepare, self.towers.pixels)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, own, log).cpu()])
        if self.config.restart:
            self._start()
        self.tasks.append(task)
        self._grow(task)

        everything = Concatenation([seen.train for seen in self.tasks])
        loader = Loader(everything, self.towers.prepare, self.towers.pixels, batch=stage1.schedule.batch)
        align_vision(stage1, self.image, self.anchors, loader, s, seeds.at(stage=1), log.at(stage=1), checkpoint)
        with self.image.inference():
            z, y = encode(loader, lambda pixels, _: self.image(pixels), checkpoint, "Z")
        nothing = GaussianMemory(self.towers.dim)
        align_text(stage2, self.texts, unit(z), y, nothing, s, seeds.at(stage=2), log.at(stage=2), checkpoint)

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.texts.forget(c)
        self.tasks = [without_class(task, c) for task in self.tasks]

    def embed(self, pixels: Pixels) -> Features:
        return self.image(pixels)

    @property
    @torch.no_grad()
    def class_matrix(self) -> Features:
        return self.texts()

    def vision(self) -> nn.Module:
        return copy.deepcopy(self.image.module)

    def state_dict(self) -> State:
        parts = {"image": self.image.state_dict(), "texts": self.texts.state()}
        return {"anchors": self.anchors} | flattened(parts)

    def load_state_dict(self, state: State) -> None:
        """For scoring. To learn on it must be given its images again: see `attach_images`."""
        self.anchors = state["anchors"]
        self.image.load_state_dict(part(state, "image"))
        self.texts.restore(part(state, "texts"))

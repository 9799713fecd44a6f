"""CGIL: a small generative model of each class's frozen embeddings, class texts trained on what it draws.

Source: Frascaroli et al., CLIP with Generative Latent Replay: a Strong Baseline for Incremental Learning (BMVC 2024), arXiv
2407.15793. Its abstract was read, its equations were not, so none is cited by number. [P] marks what it states: variational
autoencoders learn class-conditioned distributions in the space of the frozen image encoder, synthetic embeddings are drawn
from them, and class-specific text prompts are trained on those. Sizes, schedules and the likelihood are ours [I].

Letters: x = f(x) / |f(x)| unit embedding of an image; t_c unit text of class c; s scale.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.losses import class_cross_entropy
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory, GaussianSettings
from cairn.memory.generators import GeneratorMemory
from cairn.methods.parts.autoencoders import Vae
from cairn.methods.parts.stages import TextStage, align_text, class_anchors, rename_text
from cairn.methods.protocol import FROZEN, Card, CosineScoring, GaussianScoring, NamesClasses
from cairn.settings import Settings, kind_by_name
from cairn.towers.prompts import Prompts
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.training.encode import encode
from cairn.types import Features, Labels, Pixels, State, flattened, part


class Gaussian(GaussianSettings):
    """A Gaussian per class, the alternative that costs no training [I: its covariance]."""

    kind: Literal["gaussian"] = "gaussian"

    def learned(self, memory: Any, x: Features, y: Labels, *_: object) -> GaussianMemory:
        """`memory` with these rows learned."""
        return memory.add(x, y)


Generator = Annotated[Vae | Gaussian, Field(discriminator="kind")]


class CgilConfig(Settings):
    """The settings of CGIL."""

    generator: Generator = Field(default=Vae(), description="what a class is drawn from: vae or gaussian [P: vae]")
    stage2: TextStage = Field(default=TextStage(text=Prompts(), real_share=0.0))

    _kinds = field_validator("generator", mode="before")(kind_by_name)

    @classmethod
    def embedding(cls) -> CgilConfig:
        """The form for precomputed embeddings: residual class texts."""
        return cls(stage2=TextStage(real_share=0.0))


class CGIL(CosineScoring, GaussianScoring[GaussianMemory | GeneratorMemory], NamesClasses):
    """argmax_c s cos(f(x), t_c), t_c trained on draws of every class seen."""

    card = Card(
        title="CGIL: generators of embeddings, class prompts on draws",
        source="Frascaroli et al. 2024",
        citation="Frascaroli et al. CLIP with Generative Latent Replay: a Strong Baseline for Incremental Learning. BMVC 2024. "
        "arXiv 2407.15793.",
        config=CgilConfig,
        stages=(
            "stage 1: a variational autoencoder per class of the task, on frozen embeddings",
            "stage 2: class texts on draws of all classes seen, new ones too",
        ),
        trains="text",
        keeps="generators",
        bytes=lambda k, d, n, i, w: k * (4 * (64 * (16 + 1) + 66 * d) + 8),
        needs="images; texts help",
        passes="one per image, can be cached",
        text=True,
        quick={"generator.steps": 20, "stage2.schedule.epochs": 2, "stage2.schedule.batch": 8, "stage2.text.shared": 4},
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: CgilConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.texts = config.stage2.text.build(towers).to(towers.device)
        self.memory: GaussianMemory | GeneratorMemory = config.generator.memory(towers.dim)
        self._class_texts = torch.zeros(0, towers.dim)

    def learn(self, task: Task, ctx: Context) -> None:
        config, s = self.config, self.towers.logit_scale
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.stage2.schedule.batch)
        anchors = class_anchors(self.towers, task, loader, ctx.log)
        if task.names:
            self.texts.grow(task.names, anchors, ctx.seeds.generator("texts"))
        x, y = encode(loader, lambda z, _: unit(z), ctx, "X", embed=self.embed)

        # Stage 1: a generator per class of the task [P].
        self.memory = config.generator.learned(self.memory, x, y, self.towers.device, ctx.at(stage=1))

        # Stage 2: class texts move; new classes are drawn like old ones [P].
        align_text(config.stage2, self.texts, x, y, self.memory, s, class_cross_entropy, ctx.at(stage=2))
        self._remember_texts()

    @torch.no_grad()
    def _remember_texts(self) -> None:
        self._class_texts = self.texts().cpu()

    def forget(self, c: int) -> None:
        self.memory = self.memory.without(c)
        self.texts.forget(c)
        self._class_texts = without(self._class_texts, c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The name in the class's prompt, or the text that its residual is added to. What was trained stays."""
        if self.towers.has_text:
            (text,) = self.towers.class_texts(named.names, named.templates)
            rename_text(self.texts, c, named, text, log)
            self._remember_texts()

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    @property
    def class_matrix(self) -> Features:
        return self._class_texts

    def state_dict(self) -> State:
        return flattened({"texts": self.texts.state(), "memory": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.texts.restore(part(state, "texts"))
        self.memory = self.memory.restored(part(state, "memory"))
        if self.memory.classes:
            self._remember_texts()

"""What every method offers, and what some do. The contract is structural: a method inherits nothing.

What only some methods have is a capability, a protocol of its own, asked for with `isinstance`. Each is listed in
`CAPABILITIES`; a row of the table of methods declares those that its method has, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel
from torch import nn

from cairn.data.stream import Task
from cairn.memory.protocol import ClassMemory
from cairn.towers.protocol import Towers
from cairn.towers.state import State
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
from cairn.types import Features, Pixels, Scores

FROZEN = "frozen"
"""The `encoder` of a method whose embeddings are, or begin with, those of the towers as they came."""


class Method(Protocol):
    """A learner of tasks.

    Scoring is split in two, `scores(embed(pixels))`, so that whoever evaluates may keep embeddings while `encoder`
    stays the same string: a frozen tower then sees each test image once, whatever the number of tasks.
    """

    towers: Towers
    config: BaseModel

    def __init__(self, towers: Towers, config: Any, *, seed: int, log: Log): ...

    @property
    def encoder(self) -> str:
        """Names the state of the image side: equal strings, equal embeddings."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes kept of old classes beyond trained parameters."""
        ...

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        """Learn a task's classes from its training images; later tasks are never seen. Images of classes seen before are
        learned on. Called again with the state from before the task, it takes up what `checkpoint` knows of it."""
        ...

    def embed(self, pixels: Pixels) -> Features:
        """What scoring needs of each image, one row: its embedding by the image side as it stands, which is compared with
        class texts where no class was learned, and behind it whatever else the method takes."""
        ...

    def scores(self, features: Features) -> Scores:
        """One column per class seen, in order of arrival."""
        ...

    def forget(self, c: int) -> None:
        """Without class number `c`: its texts and statistics go, later classes move up. What shared weights learned of it
        stays."""
        ...

    def state_dict(self) -> State:
        """What was learned. Later learning does not change it."""
        ...

    def load_state_dict(self, state: State) -> None: ...


class CosineForm(NamedTuple):
    """Scores as one module and one matrix: s cos(vision(pixels), matrix_c)."""

    vision: nn.Module
    """A copy of the image side, up to what is compared with the rows."""
    matrix: Features
    """One row per class."""


@runtime_checkable
class CosineScoring(Protocol):
    """Scores are cosines of an image embedding and class vectors: such a method can be exported."""

    def cosine_form(self) -> CosineForm:
        """Raises ConfigError where the settings add something else to the scores."""
        ...


@runtime_checkable
class GaussianScoring(Protocol):
    """Keeps statistics of rows, from which new ones are drawn, and scores rows that are no images."""

    memory: ClassMemory

    def memory_rows(self, features: Features) -> Features:
        """Rows as the memory holds them."""
        ...

    def on_sphere(self, drawn: Features) -> Features:
        """Draws from the memory, where rows of images lie."""
        ...

    def row_scores(self, z: Features) -> Scores:
        """One column per class seen."""
        ...


@runtime_checkable
class PatchReasons(Protocol):
    """Tells which patches of an image speak for a class, and for which sentence."""

    @property
    def has_reasons(self) -> bool:
        """Whether it does so with its settings."""
        ...

    def reasons(self, pixels: Pixels, best: int = 3) -> list[dict[str, Any]]:
        """For one image, its `best` classes: `class`, `score` and `patches`. Raises ConfigError without `has_reasons`."""
        ...


@runtime_checkable
class DescribedClasses(Protocol):
    """Learns from sentences about classes."""

    @property
    def needs_sentences(self) -> bool:
        """Whether, with its settings, a new class must come with sentences of its own."""
        ...


@runtime_checkable
class KeepsImages(Protocol):
    """Learns again on the images of earlier tasks, which its state does not hold."""

    tasks: list[Task]

    def attach_images(self, tasks: Sequence[Task]) -> None:
        """The tasks learned so far, whose images a state does not hold."""
        ...


CAPABILITIES: tuple[type, ...] = (CosineScoring, GaussianScoring, PatchReasons, DescribedClasses, KeepsImages)

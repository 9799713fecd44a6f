"""What every method offers. The contract is structural: a method inherits nothing."""

from __future__ import annotations

from typing import Any, Protocol

from cairn.data.stream import Task
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
        """What scoring needs of each image, one row: its embedding, and behind it whatever else the method takes."""
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

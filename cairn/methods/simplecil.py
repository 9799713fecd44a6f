"""SimpleCIL: a frozen image tower, class means, cosine.

Source: Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models (2023), section 4.1.
"""

from __future__ import annotations

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.similarity import unit
from cairn.memory.means import ClassMeans
from cairn.methods.protocol import FROZEN, Card, CosineScoring, KeepsSums, LearnsOnline
from cairn.settings import NoSettings
from cairn.towers.protocol import Towers
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.types import Features, Labels, Pixels, State


class SimpleCIL(CosineScoring, KeepsSums, LearnsOnline):
    """argmax_c s cos(f(x), p_c), p_c the mean embedding of the class's training images."""

    card = Card(
        title="SimpleCIL: class means",
        source="Zhou et al. 2023",
        citation="Zhou et al. Revisiting Class-Incremental Learning with Pre-Trained Models. arXiv 2303.07338.",
        stages=("mean embedding per class",),
        trains="nothing",
        keeps="means",
        bytes=lambda k, d, n, i, w: k * (4 * d + 8),
        closed_form=True,
        passes="one per image, can be cached",
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: NoSettings, *, seed: int):
        self.towers, self.config = towers, config
        self.means = ClassMeans.empty(towers.dim)

    @property
    def memory_bytes(self) -> int:
        return self.means.bytes

    def learn(self, task: Task, ctx: Context) -> None:
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels)
        z, y = encode(loader, lambda z, _: z, ctx, "Z", embed=self.embed)
        self.means = self.means.add(z, y)

    def forget(self, c: int) -> None:
        self.means = self.means.without(c)

    def unlearn(self, features: Features, labels: Labels) -> None:
        self.means = self.means.without_rows(features, labels)

    def merge(self, c: int, other: int) -> None:
        self.means = self.means.merged(c, other)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    @property
    def class_matrix(self) -> Features:
        """p_c / |p_c|, one row per class."""
        return unit(self.means.means)

    def state_dict(self) -> State:
        return self.means.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.means = ClassMeans.from_state(state)

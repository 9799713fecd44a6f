"""What a method learns a task with, beside the task: seeds, log and checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cairn.training.checkpoint import Checkpoint
from cairn.training.distributed import World
from cairn.training.log import Log
from cairn.training.seeds import Seeds


@dataclass(frozen=True)
class Context:
    """A place in a run: the seeds of everything random there, the log of its events, the checkpoint of unfinished work.

    `Context(Seeds(1))` is a whole run that logs nothing and keeps nothing.
    """

    seeds: Seeds
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @property
    def world(self) -> World:
        """The processes that make the run together."""
        return self.checkpoint.world

    def at(self, **place: int) -> Context:
        """The place below, e.g. `ctx.at(task=3)` or `ctx.at(stage=1)`: seeds of its own, events that say where they happened."""
        return replace(self, seeds=self.seeds.at(**place), log=self.log.at(**place))

    def logged_at(self, **place: int) -> Context:
        """The same seeds, with events that say where they happened."""
        return replace(self, log=self.log.at(**place))

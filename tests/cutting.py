"""Runs that are cut off between two units of work."""

from __future__ import annotations

from cairn.training.context import Checkpoint


class Cut(BaseException):
    """As sudden as a kill, for what runs in one process."""


class Cutting(Checkpoint):
    """Keeps after every unit of work, whose `names` it remembers, and is cut off after so many of them."""

    def __init__(self, after: int | None = None):
        super().__init__(steps=1)
        self.after, self.names = after, []

    def step(self, name, state):
        super().step(name, state)
        self.names.append(name)
        if self.after is not None and len(self.names) >= self.after:
            raise Cut

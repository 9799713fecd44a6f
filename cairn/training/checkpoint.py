"""What makes learning resumable.

A task is learned by a procedure: passes that encode, stages that train. Everything random in it is derived from the seed
and the place, so a procedure that was cut off is simply run again from the state before the task, and what it had finished
is handed back instead of done again: finished stages, rows already encoded, and the step at which a stage stood.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cairn.errors import Stopped

State = dict[str, Tensor]

SECONDS = 60.0
"""Work that is lost at most, by default."""


class Checkpoint:
    """The work of the task in progress, by name, and when it is to be kept.

    It is due when `seconds` have passed, or `steps` units of work were done, since the last time. Whoever can keep it says
    how with `kept_by`; without that nothing is ever due, and nothing is remembered.
    """

    def __init__(self, seconds: float = SECONDS, steps: int | None = None):
        self.seconds, self.steps = seconds, steps
        self._write: Callable[[dict[str, State]], Any] | None = None
        self._work: dict[str, State] = {}
        self._since, self._counted = time.monotonic(), 0
        self._signal: int | None = None

    def kept_by(self, write: Callable[[dict[str, State]], Any]) -> None:
        """`write` is given all work of the task in progress, by name."""
        self._write = write

    def begin(self, work: dict[str, State] | None = None) -> None:
        """A task, with the work that was already done of it."""
        self._work = dict(work or {})
        if self._due():
            self.save()
        self.poll()

    def work(self, name: str) -> State | None:
        """What is known of a piece of work, None if it was not begun."""
        return self._work.get(name)

    def step(self, name: str, state: Callable[[], State]) -> None:
        """After a unit of work, `state` telling how far it is. Kept if that is due. Raises Stopped if it was asked to stop."""
        self._counted += 1
        if self._write is not None and (self._due() or self._signal):
            self._work[name] = state()
            self.save()
        self.poll()

    def finish(self, name: str, state: Callable[[], State]) -> None:
        """The same at the end of a piece of work: remembered, due or not, until the task is done."""
        if self._write is not None:
            self._work[name] = state()
        self.step(name, lambda: self._work[name])

    def poll(self) -> None:
        """Between units of work that leave nothing to remember. Raises Stopped if it was asked to stop."""
        if self._signal:
            self.save()
            raise Stopped(self._signal)

    def stop(self, number: int) -> None:
        """Ask it to stop after the unit of work that is going on."""
        self._signal = number

    def save(self) -> None:
        """Keep everything now."""
        if self._write is not None:
            self._write(self._work)
        self._since, self._counted = time.monotonic(), 0

    def _due(self) -> bool:
        late = time.monotonic() - self._since >= self.seconds
        return self._write is not None and (late or (self.steps is not None and self._counted >= self.steps))


@contextmanager
def stopped_by_signals(checkpoint: Checkpoint) -> Iterator[None]:
    """SIGINT and SIGTERM finish the step and keep the state; a second one stops at once, at the last state kept."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, before[number])
        checkpoint.stop(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

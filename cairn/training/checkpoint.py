"""What makes learning resumable.

A task is learned by a procedure: passes that encode, stages that train. Everything random in it is derived from the seed
and the place, so a procedure that was cut off is simply run again from the state before the task, and what it had finished
is handed back instead of done again: finished stages, rows already encode, and the step at which a stage stood. None of that
depends on how many processes do it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cairn.errors import GOES_ON, Interrupted
from cairn.training.distributed import ALONE, SyncSchedule, World

State = dict[str, Tensor]

SECONDS = 60.0
"""Work that is lost at most, by default."""

ECHO = 1.0
"""A signal that comes so many seconds after the first is that one again: a launcher passes on what a terminal sends to all."""


class Checkpoint:
    """The work of the task in progress, by name, and when it is to be kept.

    It is due when `seconds` have passed, or `steps` units of work were done, since the last time. Whoever can keep it says
    how with `kept_by`; without that nothing is ever due, and nothing is remembered. Of several processes, `world`, each has
    one of these: they keep, and stop, after the same unit.
    """

    def __init__(self, seconds: float = SECONDS, steps: int | None = None, world: World = ALONE):
        self.seconds, self.steps, self.world = seconds, steps, world
        self._write: Callable[[dict[str, State]], Any] | None = None
        self._work: dict[str, State] = {}
        self._finished: dict[str, State] = {}
        self._since, self._counted = time.monotonic(), 0
        self._signal = 0
        self._sync = SyncSchedule(world)
        self._sample: Tensor | None = None
        self.sampled: Tensor | None = None
        """(m, w): features of the images asked for with `keep_features`, once a pass has embedded them."""

    def kept_by(self, write: Callable[[dict[str, State]], Any]) -> None:
        """`write` is given all work of the task in progress, by name."""
        self._write = write

    def begin(self, work: dict[str, State] | None = None) -> None:
        """A task, with the work that was already done of it."""
        self._work, self._finished = dict(work or {}), {}
        self._sample = self.sampled = None
        self._sync.soon()
        due, signal = self._asked()
        if due:
            self.save()
        self._obey(signal)

    def keep_features(self, rows: Tensor, number: int) -> None:
        """Have what passes over the task's `number` images make of these ones left in `sampled`."""
        self._sample = torch.zeros(number, dtype=torch.bool)
        self._sample[rows] = True
        self.sampled = None

    def sample(self, number: int) -> Tensor | None:
        """Which of so many images, (number,) of bool, are asked for with `keep_features`; None if it was another number."""
        return self._sample if self._sample is not None and len(self._sample) == number else None

    def features_of(self, rows: Tensor) -> Tensor | None:
        """(m, w): features of these images, in their order; None where not all of them were kept."""
        if self._sample is None or self.sampled is None or not self._sample[rows].all():
            return None
        return self.sampled[self._sample.cumsum(0)[rows] - 1]

    def work(self, name: str) -> State | None:
        """What is known of a piece of work, None if it was not begun."""
        return self._work.get(name)

    def step(self, name: str, state: Callable[[], State]) -> None:
        """After a unit of work, `state` telling how far it is. Kept if that is due. Raises Interrupted if it was asked to stop."""
        self._counted += 1
        due, signal = self._asked()
        if due or (signal and self._write is not None):
            self._work[name] = state()
            self.save()
        self._obey(signal)

    def finish(self, name: str, state: Callable[[], State]) -> None:
        """The same at the end of a piece of work: remembered, due or not, until the task is done."""
        done = state()
        self.found_finished(name, done)
        if self._write is not None:
            self._work[name] = done
        self._sync.soon()
        self.step(name, lambda: done)
        self._sync.soon()

    def found_finished(self, name: str, state: State) -> None:
        """That what is known of a piece of work is all of it."""
        self._finished[name] = state

    def trained(self, name: str) -> State | None:
        """What a tower was already trained to in the stage of that name, whatever rows it is asked for with."""
        return None

    def handed_on(self, rows: Tensor, number: int) -> Checkpoint:
        """For a learner of the same task with these of its `number` rows: what towers were trained to, and the passes over
        all rows, cut down to these. Nothing is kept; asked to stop it stops where this one does."""
        return _HandedOn(self, rows, number)

    def poll(self) -> None:
        """Between units of work that leave nothing to remember. Raises Interrupted if it was asked to stop."""
        self._obey(self._asked()[1])

    def stop(self, number: int) -> None:
        """Ask it to stop after the unit of work that is going on."""
        self._signal = number

    def save(self) -> None:
        """Keep everything now."""
        if self._write is not None:
            self._write(self._work)
        self._since, self._counted = time.monotonic(), 0

    def _asked(self) -> tuple[bool, int]:
        """Whether to keep what there is, and the signal to stop by, if any: the same in every process."""
        late, signal = time.monotonic() - self._since >= self.seconds, self._signal
        if self.world.world_size > 1:
            signal, late = self._sync.ask(signal, late)
        return self._write is not None and (late or (self.steps is not None and self._counted >= self.steps)), signal

    def _obey(self, signal: int) -> None:
        if signal:
            self.save()
            raise Interrupted(signal, GOES_ON)


class _HandedOn(Checkpoint):
    def __init__(self, source: Checkpoint, rows: Tensor, number: int):
        super().__init__(world=source.world)
        self._source, self._rows, self._number = source, rows, number

    def work(self, name: str) -> State | None:
        """Of a pass over the rows. One of another number is over other images."""
        state = self._source._finished.get(name, {})
        columns = {key: value for key, value in state.items() if key.startswith("column-")}
        if not columns or any(len(column) != self._number for column in columns.values()):
            return None
        return {"batches": state["batches"]} | {key: column[self._rows] for key, column in columns.items()}

    def trained(self, name: str) -> State | None:
        return self._source._finished.get(name)

    def step(self, name: str, state: Callable[[], State]) -> None:
        self._source.poll()

    def poll(self) -> None:
        self._source.poll()


@contextmanager
def stopped_by_signals(checkpoint: Checkpoint) -> Iterator[None]:
    """SIGINT and SIGTERM finish the step and keep the state; a second one stops at once, at the last state kept."""
    asked: list[float] = []

    def stop(number: int, frame: Any) -> None:
        if not asked:
            asked.append(time.monotonic())
            checkpoint.stop(number)
        elif time.monotonic() - asked[0] > ECHO:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What a method learns with, beside the task: seeds, a log, a checkpoint and the processes that make the run together.

Every random choice is derived from (seed, purpose, place): no hidden state, so nothing to save. A task is learned by a
procedure: passes that encode, stages that train. A procedure that was cut off is simply run again from the state before the
task, and what it had finished is handed back instead of done again: finished stages, rows already encoded, and the step at which
a stage stood. None of that depends on how many processes do it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cairn.errors import GOES_ON, ConfigError, Interrupted
from cairn.types import State

Event = dict[str, Any]
Value = TypeVar("Value")

SECONDS = 60.0
"""Work that is lost at most, by default."""

APART = 0.25
"""Seconds between two meetings of processes."""


@dataclass(frozen=True)
class Seeds:
    """A node in the tree of seeds. Equal paths give equal generators, whatever was drawn before."""

    seed: int
    path: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed}: must be a whole number from 0 to {2**63 - 1}")

    def at(self, **place: int | str) -> Seeds:
        """The node below, e.g. `seeds.at(task=3, stage=1)`; keyword order does not matter."""
        return Seeds(self.seed, (*self.path, *(f"{key}={place[key]}" for key in sorted(place))))

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for one purpose at this node."""
        name = "/".join((str(self.seed), *self.path, purpose))
        value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return torch.Generator(device).manual_seed(value % 2**63)


def _silent(event: Event) -> None:
    """Told to nobody."""


@dataclass(frozen=True)
class Log:
    """Events carry where they happened (`task`, `stage`). `log("notice", text=...)` is shown to the user."""

    keep: Callable[[Event], None] = _silent
    show: Callable[[Event], None] = _silent
    where: Event = field(default_factory=dict)

    def at(self, **where: Any) -> Log:
        return replace(self, where=self.where | where)

    @property
    def place(self) -> str:
        """Where we are, in words, for error messages."""
        return ", ".join(f"{key} {value}" for key, value in self.where.items()) or "training"

    def __call__(self, event: str, **fields: Any) -> None:
        self.keep({"event": event, **self.where, **fields})

    def progress(self, **fields: Any) -> None:
        self.show({**self.where, **fields})


class Processes(Protocol):
    """Those that make a run together, of which this is number `rank` of `world_size`; several, as `torchrun` starts them, are a
    `cairn.training.distributed.World`. Each of them must call the same collectives at the same place."""

    world_size: int
    rank: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def broadcast_from_main(self, act: Callable[[], Value]) -> Value:
        """What `act` gives in the first process, where alone it is called."""
        return act()

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order. Tensors must be on the CPU."""
        return [value]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Their sum over all processes, the same bits in each."""
        return values

    def all_reduce_max(self, *values: int) -> list[int]:
        """Of each the largest in any process."""
        return list(values)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes what it is in the first process."""


@dataclass
class OneProcess(Processes):
    """One alone, with whom every collective is a no-op."""

    world_size: int = 1
    rank: int = 0


class SyncSchedule:
    """When processes side by side ask one another how things stand: about every APART seconds.

    When that is, is counted in calls, which are the same in all of them; how many, the clock of the first one says.
    """

    def __init__(self, world: Processes):
        self.world = world
        self.soon()

    def soon(self) -> None:
        """At the next call: what comes now may take longer than what was."""
        self._calls, self._next, self._since = 0, 1, time.monotonic()

    def ask(self, signal: int, late: bool) -> tuple[int, bool]:
        """The largest `signal` in any process, and whether it is late for the first; between two meetings, nothing."""
        self._calls += 1
        if self._calls < self._next:
            return 0, False
        now = time.monotonic()
        calls = min(2 * self._calls, int(self._calls * APART / max(now - self._since, 1e-6)))
        own = (late, calls) if self.world.is_main else (False, 0)
        signal, any_late, self._next = self.world.all_reduce_max(signal, *own)
        self._calls, self._since = 0, now
        return signal, bool(any_late)


class Checkpoint:
    """The work of the task in progress, by name, and when it is to be kept.

    It is due when `seconds` have passed, or `steps` units of work were done, since the last time. Whoever can keep it says
    how with `kept_by`; without that nothing is ever due, and nothing is remembered. Of several processes, `world`, each has
    one of these: they keep, and stop, after the same unit. Raises ConfigError for negative seconds, and for fewer steps than one.
    """

    def __init__(self, seconds: float = SECONDS, steps: int | None = None, world: Processes | None = None):
        if not seconds >= 0:
            raise ConfigError(f"checkpoint-seconds {seconds}: must be 0 or more")
        if steps is not None and steps < 1:
            raise ConfigError(f"checkpoint-steps {steps}: must be at least 1")
        self.seconds, self.steps = seconds, steps
        self.world: Processes = world or OneProcess()
        self._write: Callable[[dict[str, State]], Any] | None = None
        self._work: dict[str, State] = {}
        self._finished: dict[str, State] = {}
        self._since, self._counted = time.monotonic(), 0
        self._signal = 0
        self._sync = SyncSchedule(self.world)
        self._sample: Tensor | None = None
        self._more = 0
        self.sampled: Tensor | None = None
        """(m, w): features of the images asked for with `keep_features`, once a pass has embedded them."""

    def kept_by(self, write: Callable[[dict[str, State]], Any]) -> None:
        """`write` is given all work of the task in progress, by name."""
        self._write = write

    def begin(self, work: dict[str, State] | None = None) -> None:
        """A task, with the work that was already done of it."""
        self._work, self._finished, self._more = dict(work or {}), {}, 0
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

    def expect_more(self, more: int) -> None:
        """Behind the task's images, passes are over so many others from now on, which nobody asks for."""
        self._more = more
        if self._sample is not None:
            self._sample = torch.cat([self._sample, self._sample.new_zeros(more)])

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
        return _HandedOn(self, rows, number + self._more)

    def named(self, prefix: str) -> Checkpoint:
        """For a second learner of the same task: its work is kept with this one's, under names of its own. No features of images are
        asked of it."""
        return _Named(self, prefix)

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


BESIDE = "beside-"
"""How the name of a pass begins that is over other images than the rows of the task, and is handed on whole."""


class _Named(Checkpoint):
    def __init__(self, source: Checkpoint, prefix: str):
        super().__init__(world=source.world)
        self._source, self._prefix = source, prefix

    def work(self, name: str) -> State | None:
        return self._source.work(self._prefix + name)

    def step(self, name: str, state: Callable[[], State]) -> None:
        self._source.step(self._prefix + name, state)

    def finish(self, name: str, state: Callable[[], State]) -> None:
        self._source.finish(self._prefix + name, state)

    def found_finished(self, name: str, state: State) -> None:
        self._source.found_finished(self._prefix + name, state)

    def poll(self) -> None:
        self._source.poll()


class _HandedOn(Checkpoint):
    def __init__(self, source: Checkpoint, rows: Tensor, number: int):
        super().__init__(world=source.world)
        self._source, self._rows, self._number = source, rows, number

    def work(self, name: str) -> State | None:
        """Of a pass over the rows. One of another number is over other images."""
        state = self._source._finished.get(name, {})
        if name.startswith(BESIDE):
            return state or None
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


@dataclass(frozen=True)
class Context:
    """A place in a run: the seeds of everything random there, the log of its events, the checkpoint of unfinished work.

    `Context(Seeds(1))` is a whole run that logs nothing and keeps nothing.
    """

    seeds: Seeds
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @property
    def world(self) -> Processes:
        """The processes that make the run together."""
        return self.checkpoint.world

    def at(self, **place: int) -> Context:
        """The place below, e.g. `ctx.at(task=3)` or `ctx.at(stage=1)`: seeds of its own, events that say where they happened."""
        return replace(self, seeds=self.seeds.at(**place), log=self.log.at(**place))

    def logged_at(self, **place: int) -> Context:
        """The same seeds, with events that say where they happened."""
        return replace(self, log=self.log.at(**place))

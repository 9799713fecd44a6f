"""What goes to a worker and what comes back. Plain values: a worker sets its threads before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Order:
    """An attempt at a run. `call` is what stands in `call.json`; relative paths in it are meant from `directory`."""

    name: str
    folder: str
    call: dict[str, Any]
    token: str
    number: int
    cpus: int
    directory: str


@dataclass(frozen=True)
class Ended:
    """How an attempt ended. `stopped`: it was asked to, and kept its state; `lost`: its worker is gone."""

    name: str
    state: Literal["finished", "failed", "stopped", "lost"]
    reason: str | None = None
    figures: dict[str, Any] | None = None


class Engine(Protocol):
    """Where attempts are carried out."""

    def slots(self) -> int:
        """Attempts that it can carry out at once."""

    def submit(self, order: Order) -> None: ...

    def next(self, seconds: float) -> Ended | None:
        """An attempt that has ended; None if there is none within so many seconds."""

    def stop(self) -> None:
        """Ask every attempt to keep its state and end."""

    def close(self) -> None: ...

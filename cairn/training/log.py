"""What a run tells of itself while it goes: events that are kept, progress that is only shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Event = dict[str, Any]


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

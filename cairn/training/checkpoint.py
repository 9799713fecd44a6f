"""How a checkpoint is told to stop by the system. What it is stands in `cairn.training.context`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cairn.training.context import SECONDS as SECONDS
from cairn.training.context import Checkpoint as Checkpoint

ECHO = 1.0
"""A signal that comes so many seconds after the first is that one again: a launcher passes on what a terminal sends to all."""


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

"""Attempts one after the other, in this process."""

from __future__ import annotations

import queue
import signal
import threading

from cairn.sweep.attempt import attempted
from cairn.sweep.order import Ended, Order
from cairn.training.checkpoint import Checkpoint


class Serial:
    """A thread works, so that whoever waits for it can look on and be interrupted. It dies with the process, like a kill."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._checkpoint: Checkpoint | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def slots(self) -> int:
        return 1

    def submit(self, order: Order) -> None:
        self._orders.put(order)

    def next(self, seconds: float) -> Ended | None:
        try:
            return self._ended.get(timeout=seconds)
        except queue.Empty:
            return None

    def stop(self) -> None:
        self._stopped = True
        if self._checkpoint is not None:
            self._checkpoint.stop(signal.SIGINT)

    def close(self) -> None:
        self.stop()
        self._orders.put(None)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            self._checkpoint = Checkpoint(order.call["checkpoint_seconds"])
            stopped = Ended(order.name, "stopped")
            self._ended.put(stopped if self._stopped else attempted(order, self._checkpoint))

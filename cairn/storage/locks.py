"""Who may look while somebody writes: nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Many readers or one writer."""

    def __init__(self):
        self._condition, self._readers = threading.Condition(), 0
        self._writer = threading.RLock()

    def __reduce__(self) -> tuple[type[ReadWriteLock], tuple[()]]:
        """A copy, also one by pickle, is a new lock: nobody holds it."""
        return ReadWriteLock, ()

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._writer, self._condition:
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._writer:
            with self._condition:
                self._condition.wait_for(lambda: self._readers == 0)
            yield

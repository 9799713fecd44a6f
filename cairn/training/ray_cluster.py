"""Ray, begun on this machine or joined elsewhere. Nothing heavy is imported here: workers import it before they set their
threads."""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Any

from cairn.errors import ConfigError, one_line
from cairn.storage.distribution import extra_remedy

STORE_BYTES = 100 * 2**20
"""Of Ray's object store: what goes through it is calls, names and a few figures."""


def ray_module(instead: str) -> Any:
    """Raises ConfigError where Ray is not installed. `instead` is what does without it."""
    try:
        import ray
    except ImportError:
        raise ConfigError(f"ray is missing; {extra_remedy('ray')}, or {instead}") from None
    return ray


class Cluster:
    """Ray, begun on this machine or joined at `address`, until it is closed. Where the caller has begun it, it stays.

    That takes seconds, in which others go on: it happens in a thread, which also leaves the process's handlers of signals as
    they are. `ready` waits for it.
    """

    def __init__(self, address: str | None = None, *, cpus: int | None = None, instead: str):
        """On this machine with so many `cpus`, by default its cores; `instead` is what does without Ray.

        Raises ConfigError if Ray is not installed.
        """
        self._ray, self._address, self._cpus, self._instead = ray_module(instead), address, cpus, instead
        self._own = not self._ray.is_initialized()
        self._error: BaseException | None = None
        self._ready, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._keep, daemon=True).start()

    def ready(self) -> Any:
        """The module of Ray. Raises ConfigError if there is no such cluster."""
        self._ready.wait()
        if self._error is None:
            return self._ray
        reason = one_line((str(self._error) or type(self._error).__name__).splitlines()[0])[:300]
        if self._address is None:
            raise ConfigError(f"ray: {reason}; {self._instead} does without it")
        raise ConfigError(f"--address {self._address}: {reason}; `ray start --head` begins a cluster")

    def close(self) -> None:
        self._ready.wait()
        if self._own:
            self._ray.shutdown()
        self._closed.set()

    def _keep(self) -> None:
        self._begin()
        self._ready.set()
        self._closed.wait()  # on Linux Ray's processes are ended with the thread that began them

    def _begin(self) -> None:
        if not self._own:
            return
        # Nothing is told to anybody unless that was asked for
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        here = {"num_cpus": self._cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        try:
            _require_answer(self._address)
            self._ray.init(
                self._address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if self._address else here),
            )
        except BaseException as error:  # Ray also ends processes, which a thread is not
            self._error = error


def _require_answer(address: str | None) -> None:
    """Raises OSError if nobody listens there: Ray itself would wait for minutes, and then end the process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()

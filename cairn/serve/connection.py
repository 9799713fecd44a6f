"""Connections of the service: bounded in number, and in the time that a request may take to arrive.

A request is known once its headers are complete; until then a connection is waiting, and costs whoever opened it as little as
one packet. So no number of waiting connections keeps others out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 100
"""Open at once; where there are more, the one that has waited longest for a request is closed."""

HEADER_SECONDS = 10.0
"""From the opening of a connection, or the end of a response, to the end of the next request's headers."""


class Connection(H11Protocol):
    """HTTP/1.1, closed where the headers of its next request are not complete within HEADER_SECONDS."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limit: asyncio.TimerHandle | None = None

    @property
    def waiting_until(self) -> float | None:
        """When it is closed, on the loop's clock; None while a request is answered."""
        return None if self._limit is None else self._limit.when()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > CONNECTIONS:
            ours = [one for one in self.connections if isinstance(one, Connection)]
            waiting = [(one.waiting_until, i) for i, one in enumerate(ours) if one.waiting_until is not None]
            ours[min(waiting)[1]].close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def close(self) -> None:
        """Without waiting for the other side."""
        self._unwatch()
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        """Start the clock where no request is being answered, unless it runs; stop it where one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._limit is None and not self.transport.is_closing():
            self._limit = self.loop.call_later(HEADER_SECONDS, self.close)

    def _unwatch(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

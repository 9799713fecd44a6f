"""Who may ask for what, how often and how much: looked at before anything of a request is read."""

from __future__ import annotations

import asyncio
import hmac
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cairn.errors import ConfigError

LEARN_TIMES = 20
"""A request that teaches may be so many times `max_bytes` long."""

ROOM = 2**16
"""What a request may have beside its images."""

SILENCE = 30.0
"""Seconds to wait for more of a body."""

ADDRESSES = 10_000
"""Clients whose bucket is remembered."""

TOKEN = re.compile("[!-~]{16,200}")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """On loopback, whoever is on this machine may ask and the token is for changes; elsewhere it is for everything.

    Raises ConfigError for a service on the network to which nobody gave a token, and for a token that can be guessed.
    """

    loopback: bool = True
    host: str = "127.0.0.1"
    token: str | None = None
    max_bytes: int = 10_000_000
    rate: int = 60

    def __post_init__(self):
        if self.token is None and not self.loopback:
            raise ConfigError(f"--host {self.host}: others can reach it; give --token, which they then have to know")
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise ConfigError("--token: must be 16 to 200 letters, digits or signs, without spaces")
        if self.token is None:
            object.__setattr__(self, "token", secrets.token_urlsafe(24))

    def body_limit(self, path: str) -> int:
        return ROOM + self.max_bytes * {"/api/predict": 1, "/api/learn": LEARN_TIMES}.get(path, 0)


@dataclass
class Buckets:
    """A token bucket per client: `rate` requests a minute, and as many at once after a rest."""

    rate: int
    clock: Callable[[], float] = time.monotonic
    _held: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait(self, client: str) -> float:
        """Takes one; the seconds until there is one, 0 if there was."""
        now = self.clock()
        left, since = self._held.pop(client, (float(self.rate), now))
        left = min(self.rate, left + (now - since) * self.rate / 60)
        self._held[client] = (left - 1 if left >= 1 else left, now)
        while len(self._held) > ADDRESSES:
            self._held.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) * 60 / self.rate


class Guard:
    """An application behind the rules. What is refused is `{"error": one line}`; `state.trusted` tells of the token."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules, self.buckets = app, rules, Buckets(rules.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._admit(scope, Headers(scope=scope))
        except HTTPException as refused:
            # Whatever of a body is still to come is not waited for
            headers = {**(refused.headers or {}), "connection": "close"}
            await JSONResponse({"error": refused.detail}, refused.status_code, headers)(scope, receive, sending)
            return
        await self.app(scope, self._limited(receive, self.rules.body_limit(scope["path"])), sending)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        rules, path, method = self.rules, scope["path"], scope["method"]
        host = headers.get("host", "")
        # A name that somebody pointed at this machine would let their page talk to it as if it were theirs
        if rules.loopback and _hostname(host) not in ("localhost", "127.0.0.1", "::1", rules.host):
            raise HTTPException(403, "open this page by the address that was printed when it started")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != host:
            raise HTTPException(403, "requests from other sites are refused")
        scope.setdefault("state", {})["trusted"] = trusted = self._knows_token(headers.get("authorization", ""))
        if not path.startswith("/api/"):
            return
        health = path == "/api/health"
        # Its plain form costs nothing; with a token it would tell whether that is the right one
        if not (health and "authorization" not in headers):
            seconds = self.buckets.wait((scope.get("client") or ("",))[0])
            if seconds:
                seconds = math.ceil(seconds)
                raise HTTPException(429, f"too many requests; wait {seconds} s", {"retry-after": str(seconds)})
        changes = method not in ("GET", "HEAD") and path != "/api/predict"
        if not trusted and (changes or not (rules.loopback or health)):
            raise HTTPException(401, "this needs the access code (token)", {"www-authenticate": "Bearer"})
        if int(headers.get("content-length", 0)) > rules.body_limit(path):
            raise HTTPException(413, self._too_long(rules.body_limit(path)))

    def _knows_token(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.rules.token.encode())

    def _limited(self, receive: Receive, limit: int) -> Receive:
        """Raises while the body comes in, not when it is there."""
        read, more = 0, True

        async def limited() -> Message:
            nonlocal read, more
            if not more:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), SILENCE)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {SILENCE:.0f} s", {"connection": "close"}) from None
            read, more = read + len(message.get("body", b"")), message.get("more_body", False)
            if read > limit:
                raise HTTPException(413, self._too_long(limit), {"connection": "close"})
            return message

        return limited

    @staticmethod
    def _too_long(limit: int) -> str:
        return f"too large: the request has more than {limit / 1e6:.1f} MB"


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

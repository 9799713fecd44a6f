"""Access rules of the service: tokens, refusal of cross-site requests, limits on bodies. Checked before a body is read.

How often an address may ask is not limited here: that is the proxy's (docs/your-images.md).
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from dataclasses import dataclass
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

GRACE, SLOWEST = 30.0, 20_000
"""A body may take so many seconds, and one more for every so many bytes of it that have come."""

TOKEN = re.compile("[!-~]{16,200}")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """On loopback, whoever is on this machine may ask and the token is for changes; elsewhere, and behind a proxy, whose
    address is `public_url`, it is for everything.

    Raises ConfigError for a service that others can reach to which nobody gave a token, for a token that can be guessed, and
    for a public address that is none.
    """

    loopback: bool = True
    host: str = "127.0.0.1"
    token: str | None = None
    max_bytes: int = 10_000_000
    max_pixels: int = 2**24
    public_url: str | None = None

    def __post_init__(self):
        if self.public_url is not None:
            object.__setattr__(self, "public_url", _public(self.public_url))
            if self.token is None:
                raise ConfigError("--public-url: others can reach it; give --token, which they then have to know")
        if self.token is None and not self.loopback:
            raise ConfigError(f"--host {self.host}: others can reach it; give --token, which they then have to know")
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise ConfigError("--token: must be 16 to 200 letters, digits or signs, without spaces")
        if self.token is None:
            object.__setattr__(self, "token", secrets.token_urlsafe(24))

    @property
    def local(self) -> bool:
        """Whether whoever asks is on this machine."""
        return self.loopback and self.public_url is None

    def body_limit(self, path: str) -> int:
        return ROOM + self.max_bytes * {"/api/predict": 1, "/api/learn": LEARN_TIMES, "/api/relabel": LEARN_TIMES}.get(
            path, 0
        )


class Guard:
    """An application behind the rules. What is refused is `{"error": one line}`; `state.trusted` tells of the token."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules = app, rules

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
            # Answered before the body is there. What still comes of it is passed over by the connection, for as long as it
            # waits for a request: were it closed now, a proxy would see a broken connection and not the answer
            answer = JSONResponse({"error": refused.detail}, refused.status_code, refused.headers)
            await answer(scope, receive, sending)
            return
        await self.app(scope, self._limited(receive, self.rules.body_limit(scope["path"])), sending)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Raises HTTPException for what is not let in."""
        rules, path, method = self.rules, scope["path"], scope["method"]
        self._refuse_other_sites(path, headers)
        scope.setdefault("state", {})["trusted"] = trusted = self._knows_token(headers.get("authorization", ""))
        if not path.startswith("/api/"):
            return
        changes = method not in ("GET", "HEAD") and path != "/api/predict"
        if not trusted and (changes or not (rules.local or path == "/api/health")):
            raise HTTPException(401, "this needs the access code (token)", {"www-authenticate": "Bearer"})
        if int(headers.get("content-length", 0)) > rules.body_limit(path):
            raise HTTPException(413, self._too_long(rules.body_limit(path)))

    def _refuse_other_sites(self, path: str, headers: Headers) -> None:
        rules, host, origin = self.rules, headers.get("host", ""), headers.get("origin")
        if rules.local and (by := next(filter(_forwarded, headers), None)):
            raise HTTPException(403, f"forwarded by a proxy ({by}); start the service with --public-url")
        # A name that somebody pointed at this machine would let their page talk to it as if it were theirs
        if rules.local and _hostname(host) not in ("localhost", "127.0.0.1", "::1", rules.host):
            raise HTTPException(403, "open this page by the address that was printed when it started")
        own = origin is None or urlsplit(origin).netloc == host or origin == _origin(rules.public_url)
        # Browsers say where a request comes from, a picture or a form of another page's included
        inside = path.startswith("/api/") and headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if not own or inside:
            raise HTTPException(403, "requests from other sites are refused")

    def _knows_token(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        token = self.rules.token
        if token is None or kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), token.encode())

    def _limited(self, receive: Receive, limit: int) -> Receive:
        """Raises while the body comes in, not when it is there."""
        read, more, began = 0, True, time.monotonic()

        async def limited() -> Message:
            nonlocal read, more
            if not more:
                return await receive()
            left = began + GRACE + read / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError:
                raise HTTPException(408, "the request comes too slowly", {"connection": "close"}) from None
            read, more = read + len(message.get("body", b"")), message.get("more_body", False)
            if read > limit:
                raise HTTPException(413, self._too_long(limit))
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


def _forwarded(header: str) -> bool:
    """Whether a proxy adds it."""
    return header in ("forwarded", "via", "x-real-ip") or header.startswith("x-forwarded-")


def _public(url: str) -> str:
    """The address with a slash at its end."""
    refused = ConfigError(f"--public-url {url}: must be an address such as https://cairn.example.org/")
    try:
        parts = urlsplit(url)
        usual = {"http": 80, "https": 443}[parts.scheme]
        port = "" if parts.port in (None, usual) else f":{parts.port}"
    except (ValueError, KeyError):
        raise refused from None
    if not parts.hostname or parts.username or parts.query or parts.fragment:
        raise refused
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}/"


def _origin(url: str | None) -> str | None:
    """What a browser calls the site of an address."""
    return None if url is None else f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"

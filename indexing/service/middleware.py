"""ASGI layer in front of every route: tokens, allowed origins, rate limits, bounds on bodies,
metrics and the request log.

It judges a request before anything is read or parsed. Queries are private: neither their text nor
the query string of a URL is logged. Knows nothing of the index.
"""

import hmac
import ipaddress
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from http.cookies import CookieError, SimpleCookie
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from indexing.service.access_log import Lines
from indexing.service.rate_limit import Buckets

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
EncodedHeaders = list[tuple[bytes, bytes]]
Refusal = tuple[int, str, dict[str, str]]
"""Status, reason and headers of an answer that the guard gives itself."""

OPEN_PATHS = frozenset({"/", "/search.js", "/search.css", "/icon.svg", "/healthz", "/session"})
"""Paths that need no token: they show nothing of the index, and the page asks for the token."""
PROTOCOL_PATHS = frozenset({"/knn-service", "/metadata"})
"""Paths where clip-retrieval's clients send JSON with another content type, or with none."""
PICTURE_PATHS = frozenset({"/search", "/knn-service"})
"""Paths whose bodies may hold a picture."""
JSON_BYTES = 64 << 10
"""Maximum bytes of JSON in a body, without a picture and an embedding."""
COOKIE = "unclip_token"
THUMBNAIL_COST = 0.1
HELD_BYTES = 128 << 20
"""Maximum bytes of the bodies of all unanswered requests together."""
PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def _encoded(headers: Mapping[str, str]) -> EncodedHeaders:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


ENCODED = _encoded(HEADERS)


@dataclass(frozen=True)
class GuardOptions:
    """Who may send requests, and how many."""

    token: str | None
    """Token that clients must present; None lets in every client that names this machine by a
    loopback name."""
    rate: float
    """Requests per second of one address in the long run; 0 sets no limit."""
    burst: float
    """Requests that one address may send at once."""
    body_bytes: int
    """Maximum bytes of a request body with a picture; others have at most JSON_BYTES."""
    origins: frozenset[str] = frozenset()
    """Origins whose web pages may send requests (CORS): with the token in a header if there is one,
    never with the cookie."""


class Guard:
    """ASGI layer that refuses, bounds, counts and logs requests."""

    def __init__(
        self, app: App, options: GuardOptions, registry: CollectorRegistry, log: TextIO
    ) -> None:
        self.app, self.options, self.lines = app, options, Lines(log)
        self.held_bytes = 0
        self.buckets = Buckets(options.rate, options.burst)
        self.requests = Counter(
            "unclip_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=registry,
        )
        Gauge(
            "unclip_log_lines_dropped",
            "Lines of the request log that nobody read in time.",
            registry=registry,
        ).set_function(lambda: self.lines.writer.dropped)
        self.seconds = Histogram(
            "unclip_request_seconds",
            "Time to answer, by route.",
            ["route"],
            registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        elif scope["type"] == "websocket":  # there are no WebSocket routes
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self.app(scope, receive, send)
            finally:
                self.lines.close()  # the application has ended

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST" and scope["path"] in PROTOCOL_PATHS:
            _declare_json(scope)
        exchange = Exchange(self, scope, receive, send)
        scope = exchange.scope
        try:
            refusal = self._refusal(scope, exchange.headers, exchange.client)
            if refusal:
                await _answer(exchange.send, *refusal)
            elif self._is_preflight(scope, exchange.headers):
                await _answer(exchange.send, 204, "", _preflight_headers(exchange.headers))
            else:
                await self._call_app(exchange)
        finally:
            self._record(exchange)

    async def _call_app(self, exchange: "Exchange") -> None:
        """Run the application; answer a body that is too large, and an error that it raises."""
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except BodyTooLarge:
            pass
        except Exception as error:
            self.lines.add(
                event="error",
                request=exchange.request_id,
                path=exchange.scope["path"],
                error=f"{type(error).__name__}: {error}",
            )
            if not exchange.has_started and not exchange.is_too_large:
                detail = "something went wrong; the log has it under this request's id"
                await _answer(exchange.send, 500, detail, {})
        if exchange.is_too_large and not exchange.has_started:
            exchange.is_too_large = False
            await _answer(exchange.send, *self._body_refusal(exchange))

    def _body_refusal(self, exchange: "Exchange") -> Refusal:
        """Return the refusal of a body, or of all bodies together, that is too large."""
        if exchange.body_bytes > exchange.max_body_bytes:
            return _too_large(exchange.max_body_bytes)
        headers = {"connection": "close", "retry-after": "1"}
        return 503, "too many large requests at once", headers

    def max_body_bytes(self, path: str) -> int:
        """Return the maximum bytes of a body that is sent to a path."""
        limit = self.options.body_bytes
        return limit if path in PICTURE_PATHS else min(limit, JSON_BYTES)

    def _record(self, exchange: "Exchange") -> None:
        """Count and log a request that has ended; release the memory that its body held."""
        self.held_bytes -= exchange.body_bytes
        duration_s = time.perf_counter() - exchange.started_s
        route = getattr(exchange.scope.get("route"), "path", "none")
        self.requests.labels(route, str(exchange.status)).inc()
        self.seconds.labels(route).observe(duration_s)
        self.lines.add(
            event="request",
            request=exchange.request_id,
            method=exchange.method,
            path=exchange.scope["path"],
            status=exchange.status,
            ms=round(duration_s * 1000, 2),
            client=exchange.client,
        )

    def _refusal(self, scope: Scope, headers: dict[str, str], client: str) -> Refusal | None:
        """Return the refusal of a request, judged by its head alone, or None."""
        cost = THUMBNAIL_COST if scope["path"].startswith("/thumbnail/") else 1.0
        wait = self.buckets.take(client, cost, time.monotonic())
        if wait:
            return 429, "too many requests", {"retry-after": str(max(1, round(wait)))}
        if self.options.token is None:
            # Without a token, a page of another site could send requests through a host name that
            # resolves to this machine (DNS rebinding).
            if not is_loopback_name(headers.get("host", "")):
                return 421, "this service answers to loopback names only", {}
        elif (
            scope["path"] not in OPEN_PATHS
            and not self._has_token(headers)
            and not self._is_preflight(scope, headers)
        ):
            detail = "a token is needed: Authorization: Bearer TOKEN"
            return 401, detail, {"www-authenticate": "Bearer"}
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return 400, "content-length is no number", {}
        max_body_bytes = self.max_body_bytes(scope["path"])
        if len(length) > 15 or int(length) > max_body_bytes:
            return _too_large(max_body_bytes)
        return None

    def _is_preflight(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Return whether this is the CORS preflight of a page of an allowed origin: browsers send
        it without a token, and the answer reveals nothing else.
        """
        return (
            scope["method"] == "OPTIONS"
            and headers.get("origin") in self.options.origins
            and "access-control-request-method" in headers
        )

    def _has_token(self, headers: dict[str, str]) -> bool:
        assert self.options.token is not None
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            try:
                morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                morsel = None
            presented = morsel.value if morsel else ""
        return is_token(presented, self.options.token)


class Exchange:
    """One request and its answer, while they pass the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.method = guard, scope["method"]
        # FastAPI's routes know no HEAD: it is answered as GET, without the body.
        self.scope = {**scope, "method": "GET"} if self.method == "HEAD" else scope
        self._receive, self._send = receive, send
        self.request_id = f"{random.getrandbits(48):012x}"
        self.started_s = time.perf_counter()
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        self.client: str = scope["client"][0] if scope.get("client") else "local"
        self.status, self.has_started = 500, False
        self.body_bytes, self.is_too_large = 0, False
        self.max_body_bytes = guard.max_body_bytes(scope["path"])

    async def receive(self) -> Message:
        """Return the next message of the request. Raises BodyTooLarge beyond a bound, whatever
        length the client declared.
        """
        message = await self._receive()
        size = len(message.get("body", b""))
        self.body_bytes += size
        self.guard.held_bytes += size
        is_too_large = self.body_bytes > self.max_body_bytes
        if is_too_large or self.guard.held_bytes > HELD_BYTES:
            self.is_too_large = True
            raise BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the answer, with the headers that every answer has."""
        if self.is_too_large and not self.has_started:
            return  # the framework's own answer to a body that it could not read
        if message["type"] == "http.response.start":
            self.status, self.has_started = message["status"], True
            extra_headers = [*self._cors_headers(), (b"x-request-id", self.request_id.encode())]
            message["headers"] = [*message.get("headers", []), *ENCODED, *extra_headers]
        elif self.method == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)

    def _cors_headers(self) -> EncodedHeaders:
        origin = self.headers.get("origin", "")
        if origin not in self.guard.options.origins:
            return []
        return _encoded({"access-control-allow-origin": origin, "vary": "origin"})


class BodyTooLarge(Exception):  # noqa: N818 (an answer rather than an error)
    """A body that is larger than allowed."""


def is_token(presented: str, token: str) -> bool:
    """Return whether the tokens are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(presented.strip().encode("utf-8", "replace"), token.encode())


@lru_cache(32)
def is_loopback_name(host: str) -> bool:
    """Return whether a Host header names this machine's loopback."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _declare_json(scope: Scope) -> None:
    """Replace the content type by JSON's."""
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    scope["headers"] = [*others, (b"content-type", b"application/json")]


def _too_large(max_body_bytes: int) -> Refusal:
    return 413, f"the body has more than {max_body_bytes} bytes", {"connection": "close"}


def _preflight_headers(headers: Mapping[str, str]) -> dict[str, str]:
    is_private = headers.get("access-control-request-private-network") == "true"
    return {**PREFLIGHT, **({"access-control-allow-private-network": "true"} if is_private else {})}


async def _answer(send: Send, status: int, detail: str, headers: dict[str, str]) -> None:
    body = json.dumps({"detail": detail}).encode() if status != 204 else b""
    if body:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **headers,
        }
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})

"""What stands before every route: who may ask, how often, how much; and what is counted and logged
of it.

One plain ASGI layer, so that nothing is read, parsed or answered before it has judged. Queries are
private: neither their text nor the query string of an URL is logged. Knows nothing of the index.
"""

import hmac
import ipaddress
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from http.cookies import CookieError, SimpleCookie
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram

from indexing.service.access_log import Lines
from indexing.service.rate_limit import Buckets

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/search.js", "/search.css", "/icon.svg", "/healthz", "/session"})
"""Paths that show nothing of the index; the page itself asks for the token."""
PROTOCOL_PATHS = frozenset({"/knn-service", "/metadata"})
"""clip-retrieval's clients send JSON there under other names, or under none."""
COOKIE = "unclip_token"
THUMBNAIL_COST = 0.1
HELD_BYTES = 128 << 20
"""Maximum bytes that the bodies of all unanswered requests hold together."""
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


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


ENCODED = _encoded(HEADERS)


class Guard:
    """The layer. `token` None lets everybody in who names this machine by a loopback name.

    Pages of other `origins` may ask from a browser (CORS), with the token in a header where there
    is one, never with the cookie.
    """

    def __init__(
        self,
        app: App,
        token: str | None,
        rate: float,
        burst: float,
        body_bytes: int,
        registry: CollectorRegistry,
        log: TextIO,
        origins: Sequence[str] = (),
    ) -> None:
        self.app, self.token, self.body_bytes, self.lines = app, token, body_bytes, Lines(log)
        self.origins = frozenset(origins)
        self.held_bytes = 0
        self.buckets = Buckets(rate, burst)
        self.requests = Counter(
            "unclip_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "unclip_request_seconds",
            "Time to answer, by route.",
            ["route"],
            registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # there is none
                await send({"type": "websocket.close", "code": 1008})
                return
            try:
                await self.app(scope, receive, send)
            finally:
                self.lines.write()  # the application's end
            return
        if scope["method"] == "POST" and scope["path"] in PROTOCOL_PATHS:
            others = [
                (name, value) for name, value in scope["headers"] if name.lower() != b"content-type"
            ]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
        started, status, sent, is_too_large = time.perf_counter(), 500, False, False
        request_id = f"{random.getrandbits(48):012x}"
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        client = scope["client"][0] if scope.get("client") else "local"
        origin = headers.get("origin", "")
        shared = (
            {"access-control-allow-origin": origin, "vary": "origin"}
            if origin in self.origins
            else {}
        )

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if is_too_large and not sent:
                return  # the framework's own answer to a body that it could not read
            if message["type"] == "http.response.start":
                status, sent = message["status"], True
                extra_headers = [*_encoded(shared), (b"x-request-id", request_id.encode())]
                message["headers"] = [*message.get("headers", []), *ENCODED, *extra_headers]
            await send(message)

        total = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal total, is_too_large
            message = await receive()
            size = len(message.get("body", b""))
            total += size
            self.held_bytes += size
            if (
                total > self.body_bytes or self.held_bytes > HELD_BYTES
            ):  # whatever length it declared
                is_too_large = True
                raise BodyTooLarge
            return message

        try:
            refusal = self._refusal(scope, headers, client)
            if refusal:
                await _answer(answer, *refusal)
                return
            if self._is_preflight(scope, headers):
                is_private = headers.get("access-control-request-private-network") == "true"
                private_network = (
                    {"access-control-allow-private-network": "true"} if is_private else {}
                )
                await _answer(answer, 204, "", {**PREFLIGHT, **private_network})
                return
            try:
                await self.app(scope, bounded, answer)
            except BodyTooLarge:
                pass
            except Exception as error:
                self.lines.add(
                    event="error",
                    request=request_id,
                    path=scope["path"],
                    error=f"{type(error).__name__}: {error}",
                )
                if not sent and not is_too_large:
                    await _answer(
                        answer,
                        500,
                        "something went wrong; the log has it under this request's id",
                        {},
                    )
            if is_too_large and not sent:
                is_too_large = False
                if total > self.body_bytes:
                    await _answer(
                        answer,
                        413,
                        f"the body has more than {self.body_bytes} bytes",
                        {"connection": "close"},
                    )
                else:
                    await _answer(
                        answer,
                        503,
                        "too many large requests at once",
                        {"connection": "close", "retry-after": "1"},
                    )
        finally:
            self.held_bytes -= total
            took = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self.requests.labels(route, str(status)).inc()
            self.seconds.labels(route).observe(took)
            self.lines.add(
                event="request",
                request=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(took * 1000, 2),
                client=client,
            )

    def _refusal(
        self, scope: Scope, headers: dict[str, str], client: str
    ) -> tuple[int, str, dict[str, str]] | None:
        """Return status, reason and headers of a refusal, or None."""
        cost = THUMBNAIL_COST if scope["path"].startswith("/thumbnail/") else 1.0
        wait = self.buckets.take(client, cost, time.monotonic())
        if wait:
            return 429, "too many requests", {"retry-after": str(max(1, round(wait)))}
        if self.token is None:
            # Without a token a page of another site could ask through a name that it points at this
            # machine (DNS rebinding).
            if not is_loopback_name(headers.get("host", "")):
                return 421, "this service answers to loopback names only", {}
        elif (
            scope["path"] not in OPEN_PATHS
            and not self._has_token(headers)
            and not self._is_preflight(scope, headers)
        ):
            return (
                401,
                "a token is needed: Authorization: Bearer TOKEN",
                {"www-authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return 400, "content-length is no number", {}
        if len(length) > 15 or int(length) > self.body_bytes:
            return 413, f"the body has more than {self.body_bytes} bytes", {"connection": "close"}
        return None

    def _is_preflight(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Say whether a browser asks if a page of an allowed origin may ask: it presents no token
        then, and is told nothing else.
        """
        return (
            scope["method"] == "OPTIONS"
            and headers.get("origin") in self.origins
            and "access-control-request-method" in headers
        )

    def _has_token(self, headers: dict[str, str]) -> bool:
        assert self.token is not None
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            try:
                morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                morsel = None
            presented = morsel.value if morsel else ""
        return is_token(presented, self.token)


class BodyTooLarge(Exception):  # noqa: N818 (an answer rather than an error)
    """A body that is larger than allowed."""


def is_token(presented: str, token: str) -> bool:
    """Compare without telling by the time it takes how much was right."""
    return hmac.compare_digest(presented.strip().encode("utf-8", "replace"), token.encode())


@lru_cache(32)
def is_loopback_name(host: str) -> bool:
    """Say whether a Host header names this machine's loopback."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _answer(send: Send, status: int, detail: str, headers: dict[str, str]) -> None:
    body = json.dumps({"detail": detail}).encode() if status != 204 else b""
    more = {"content-type": "application/json", "content-length": str(len(body))} if body else {}
    more = {**more, **headers}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(more)})
    await send({"type": "http.response.body", "body": body})

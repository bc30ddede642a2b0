"""HTTP/1.1 connections of the service: bounded heads, deadlines, and a maximum of connections per
address.

uvicorn's protocol on httptools has no bound on headers and waits for slow clients for ever. This
subclass refuses heads that are too large (431, 414) and closes connections that are late with a
head, a body or reading an answer. It knows nothing of routes and tokens.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SWEEP_S = 1.0
"""Seconds between checks of the deadlines of all connections."""
REASONS = {414: b"URI Too Long", 431: b"Request Header Fields Too Large"}


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds on what a client may send and how long it may take."""

    max_connections: int = 512
    """Maximum open connections; a new one beyond it closes the longest silent one."""
    address_share: float = 0.25
    """Maximum share of the connections for one client address; more are closed at once."""
    url_bytes: int = 8 << 10
    head_bytes: int = 32 << 10
    """Maximum bytes of the request line and all headers together, and of what a body has besides
    its data in one place: chunk extensions, trailers."""
    headers: int = 100
    head_s: float = 10.0
    """Maximum seconds from a connection, or from a request's first byte, to the end of its head."""
    body_s: float = 60.0
    """Maximum seconds from the end of a head to the end of its body."""
    read_s: float = 30.0
    """Maximum seconds in which a client reads nothing of its answer."""

    @property
    def max_per_address(self) -> int:
        """Maximum open connections of one client address."""
        return max(1, int(self.max_connections * self.address_share))


class Phase(Enum):
    """What a connection waits for: the end of a head, of a body, of an answer, or a new request."""

    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    IDLE = "idle"


class OpenConnections:
    """All open connections of one server, counted by client address."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.connections: set[BoundedProtocol] = set()
        self.by_address: Counter[str] = Counter()
        self.timer: asyncio.TimerHandle | None = None

    def add(self, connection: "BoundedProtocol") -> bool:
        """Count a new connection; return False if its address has too many already."""
        if self.by_address[connection.address] >= self.limits.max_per_address:
            return False
        if len(self.connections) >= self.limits.max_connections - 1:
            self._close_longest_silent()
        self.connections.add(connection)
        self.by_address[connection.address] += 1
        if self.timer is None:
            self.timer = connection.loop.call_later(SWEEP_S, self.sweep, connection.loop)
        return True

    def remove(self, connection: "BoundedProtocol") -> None:
        """Stop counting a connection that has been closed."""
        if connection in self.connections:
            self.connections.remove(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    def sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close all connections that are late."""
        now = loop.time()
        for connection in list(self.connections):
            if connection.is_late(now):
                connection.close_now()
        self.timer = loop.call_later(SWEEP_S, self.sweep, loop) if self.connections else None

    def _close_longest_silent(self) -> None:
        silent = [
            connection
            for connection in self.connections
            if connection.phase in (Phase.HEAD, Phase.IDLE)
        ]
        if silent:
            min(silent, key=lambda connection: connection.phase_started_s).close_now()


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `open_connections` is set by `bounded_protocol`, for one server."""

    open_connections: OpenConnections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = self.open_connections.limits
        self.address = ""
        self.phase, self.phase_started_s = Phase.HEAD, self.loop.time()
        self.head_bytes = 0
        """Bytes received since the head began, while it is not complete."""
        self.framing_bytes = 0
        """Bytes received since the request began or since the last data of its body: the head,
        sizes of chunks, extensions, trailers."""
        self.refusal = 0
        """Status of the refusal, 0 for none; further bytes are not read."""
        self.unread_bytes, self.unread_since_s = 0, 0.0
        """Bytes of an answer that the client has not read, and since when it reads no more."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else "local"
        self._enter(Phase.HEAD)
        if not self.open_connections.add(self):
            self.close_now()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_connections.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.refusal:
            return
        if self.phase is Phase.IDLE:
            self.framing_bytes = 0
            self._enter(Phase.HEAD)
        if self.phase is Phase.HEAD:
            self.head_bytes += len(data)
        self.framing_bytes += len(data)
        super().data_received(data)
        waiting_bytes = {Phase.HEAD: self.head_bytes, Phase.BODY: self.framing_bytes}
        if waiting_bytes.get(self.phase, 0) > self.limits.head_bytes:
            self.refusal = self.refusal or 431
        if self.refusal and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.phase is not Phase.HEAD:  # another request in the same piece of data
            self.head_bytes = self.framing_bytes = 0
            self._enter(Phase.HEAD)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.url_bytes:
            self.refusal = 414

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase is Phase.HEAD:  # trailers of a chunked body have no reader
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.head_bytes or len(self.headers) > self.limits.headers:
            self.refusal = self.refusal or 431
        if self.refusal:
            return
        self.head_bytes = 0
        self._enter(Phase.BODY)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.framing_bytes = 0
        if not self.refusal:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.refusal:
            self._enter(Phase.IDLE if self.cycle.response_complete else Phase.ANSWER)
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.phase is Phase.ANSWER:
            self._enter(Phase.IDLE)
        super().on_response_complete()

    def close_now(self) -> None:
        """Close the connection without an answer and stop counting it."""
        self.open_connections.remove(self)
        self.connections.discard(self)  # uvicorn would count it until the event loop's next turn
        self.transport.abort()

    def is_late(self, now_s: float) -> bool:
        """Return whether the client is late; uvicorn's own timer closes idle connections."""
        if self._has_stopped_reading(now_s):
            return True
        limit_s = {Phase.HEAD: self.limits.head_s, Phase.BODY: self.limits.body_s}.get(self.phase)
        return limit_s is not None and now_s - self.phase_started_s > limit_s

    def _has_stopped_reading(self, now_s: float) -> bool:
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes == 0 or unread_bytes != self.unread_bytes:
            self.unread_bytes, self.unread_since_s = unread_bytes, now_s
        return unread_bytes > 0 and now_s - self.unread_since_s > self.limits.read_s

    def _enter(self, phase: Phase) -> None:
        self.phase, self.phase_started_s = phase, self.loop.time()

    def _refuse(self) -> None:
        if self.phase is Phase.BODY and self.cycle.response_started:
            self.transport.close()  # a second status line would be read as part of the answer
            return
        status = str(self.refusal).encode()
        self.transport.write(
            b"HTTP/1.1 " + status + b" " + REASONS[self.refusal] + b"\r\n"
            b"content-length: 0\r\nconnection: close\r\n\r\n"
        )
        self.transport.close()


def bounded_protocol(limits: ConnectionLimits) -> type[BoundedProtocol]:
    """Return the protocol class of one server, for `uvicorn.Config(http=...)`."""
    return type("ServerProtocol", (BoundedProtocol,), {"open_connections": OpenConnections(limits)})

"""Whatever bytes arrive on a connection: documented statuses, bounded memory, nothing left behind.

The protocol is driven without sockets and without a clock.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from indexing.service.http_protocol import BoundedProtocol, ConnectionLimits, bounded_protocol
from tests.helpers.bounds import bounded

LIMITS = ConnectionLimits(url_bytes=200, head_bytes=1000, headers=10)
PIECE_BYTES = 1 << 16
"""Maximum bytes that a transport hands over at once; asyncio's reads 256 KiB."""
STATUSES = {100, 200, 400, 414, 431}
PARTS = st.one_of(
    st.sampled_from(
        [
            b"GET / HTTP/1.1\r\n",
            b"POST /search HTTP/1.1\r\n",
            b"HEAD / HTTP/1.0\r\n",
            b"CONNECT host:1 HTTP/1.1\r\n",
            b"OPTIONS * HTTP/1.1\r\n",
            b"GET /%ff%00?%zz HTTP/1.1\r\n",
            b"host: x\r\n",
            b"content-length: 5\r\n",
            b"content-length: 99999999999999999999\r\n",
            b"transfer-encoding: chunked\r\n",
            b"transfer-encoding: gzip, chunked\r\n",
            b"expect: 100-continue\r\n",
            b"connection: upgrade\r\nupgrade: websocket\r\n",
            b"connection: close\r\n",
            b"\r\n",
            b"5\r\nhello\r\n",
            b"5;name=value\r\nhello\r\n",
            b"0\r\n",
            b"0\r\n\r\n",
            b"trailer: value\r\n",
            b"hello",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
    ),
    st.builds(lambda byte, count: byte * count, st.binary(min_size=1, max_size=4), st.just(600)),
    st.binary(max_size=40),
)
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class Transport(asyncio.Transport):
    """A transport that keeps what is written and loses its connection when it is closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = bytearray()
        self.is_closed = False

    def write(self, data: Any) -> None:
        if not self.is_closed:
            self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def count_body(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the number of bytes of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Connection:
    """One connection of a server, with its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.errors: list[Any] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        protocol_class = bounded_protocol(LIMITS)
        config = uvicorn.Config(
            count_body, http=protocol_class, ws="none", lifespan="off", log_config=None
        )
        self.state, self.transport = ServerState(), Transport()
        self.protocol: BoundedProtocol = protocol_class(config, self.state, {}, self.loop)
        self.protocol.connection_made(self.transport)

    def feed(self, piece: bytes) -> None:
        """Hand a piece over, and let the application answer."""
        self.protocol.data_received(piece)
        self._run()

    def close(self) -> None:
        """Lose the connection, and let the application end."""
        self.protocol.connection_lost(None)
        self._run()
        if self.protocol.open_connections.timer:
            self.protocol.open_connections.timer.cancel()
        self.loop.close()

    def _run(self) -> None:
        for _ in range(30):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    def held_bytes(self) -> int:
        """Return the bytes of the headers that the connection holds."""
        headers = self.protocol.headers or []
        return sum(len(name) + len(value) for name, value in headers)


@contextmanager
def connection() -> Iterator[Connection]:
    opened = Connection()
    try:
        yield opened
    finally:
        opened.close()
    assert not opened.errors and not opened.state.tasks and not opened.state.connections
    assert not opened.protocol.open_connections.connections, "it still counts"


def answers(written: bytes, methods: list[str]) -> list[tuple[int, bytes]]:
    """Return the statuses and bodies that a client reads, informational answers included."""
    client, found = h11.Connection(h11.CLIENT), []
    client.receive_data(written)
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        status, body = 0, b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return found
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        found.append((status, body))
        if client.states[h11.CLIENT] is not h11.DONE or client.states[h11.SERVER] is not h11.DONE:
            return found
        client.start_next_cycle()
    return found


@example([CHUNKED, b"0\r\n", *[b"a: b\r\n" * 150] * 20])
@example([CHUNKED, b"0\r\na: ", *[b"x" * 600] * 10])
@given(st.lists(PARTS, max_size=25))
def test_any_bytes_are_answered_or_refused_within_bounds(pieces: list[bytes]) -> None:
    with bounded(), connection() as opened:
        for piece in pieces:
            if opened.transport.is_closed:
                break
            opened.feed(piece)
            assert opened.held_bytes() <= LIMITS.head_bytes + len(piece)
        written = bytes(opened.transport.written)
    lines = [line for line in written.split(b"\r\n") if line.startswith(b"HTTP/")]
    assert {int(line.split()[1]) for line in lines} <= STATUSES


@given(
    start=st.sampled_from([b"", b"GET /", b"GET / HTTP/1.1\r\na: ", CHUNKED + b"0\r\na: "]),
    piece=st.binary(min_size=1, max_size=50).map(lambda piece: piece * 20),
)
@example(start=CHUNKED + b"0\r\n", piece=b"a: b\r\n" * 20)
@example(start=CHUNKED, piece=b"1;" + b"x" * 200)
def test_what_never_ends_is_cut_off(start: bytes, piece: bytes) -> None:
    with bounded(), connection() as opened:
        opened.feed(start)
        sent_bytes = 0
        while not opened.transport.is_closed and sent_bytes < 100 * LIMITS.head_bytes:
            opened.feed(piece)
            sent_bytes += len(piece)
            if opened.protocol.phase.value in ("idle", "answer"):
                return  # whole requests: they may go on
        assert opened.transport.is_closed, "it reads on for ever"


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, int]:
    """Return the method, the bytes and the size of the body of a right request."""
    method = draw(st.sampled_from(["GET", "POST", "PUT"]))
    target = draw(st.text("abc/%20?=&", max_size=30))
    names = draw(st.lists(st.text("abc-", min_size=1, max_size=9), max_size=5))
    value = draw(st.text("xyz ,;=\t", max_size=20))
    head = f"{method} /{target} HTTP/1.1\r\nhost: x\r\n"
    head += "".join(f"x{name}: {value}\r\n" for name in names)
    pieces = draw(st.lists(st.binary(min_size=1, max_size=300), max_size=4))
    body = b"".join(pieces)
    if draw(st.booleans()):
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        coded = f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"
    else:
        coded = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    return method, coded, len(body)


@given(st.lists(requests(), min_size=1, max_size=4), st.lists(st.integers(1, 400), max_size=12))
def test_right_requests_are_answered_in_order_however_they_are_cut(
    asked: list[tuple[str, bytes, int]], lengths: list[int]
) -> None:
    data = b"".join(coded for _, coded, _ in asked)
    with bounded(), connection() as opened:
        for length in lengths:
            opened.feed(data[:length])
            data = data[length:]
        opened.feed(data)
        written = bytes(opened.transport.written)
    expected = [(200, str(size).encode()) for _, _, size in asked]
    assert answers(written, [method for method, _, _ in asked]) == expected

"""Connections of the service: no head without bound, no client that holds a place for ever."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn

from indexing.service import http_protocol
from indexing.service.http_protocol import ConnectionLimits, bounded_protocol

LIMIT_S = 60
"""Against a hang."""
PATIENT = ConnectionLimits(head_s=600, body_s=600, read_s=600)
LARGE_BYTES = 64 << 20
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


async def echo_app(
    scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]
) -> None:
    """Answer with the number of bytes of the body; `/large` with many bytes."""
    assert scope["type"] == "http"
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = b"x" * LARGE_BYTES if scope["path"] == "/large" else str(size).encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serve(
    limits: ConnectionLimits, grace_s: int = 5
) -> Iterator[tuple[int, uvicorn.Server, threading.Thread]]:
    """Serve the application on a free port of loopback."""
    config = uvicorn.Config(
        echo_app, port=0, log_config=None, lifespan="off", http=bounded_protocol(limits), ws="none",
        timeout_graceful_shutdown=grace_s, limit_concurrency=limits.max_connections,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + LIMIT_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server, thread
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), LIMIT_S, (source, 0))


def read_all(client: socket.socket) -> bytes:
    """Return what arrives until the server closes the connection."""
    pieces = []
    try:
        while piece := client.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def ask(client: socket.socket, body: bytes = b"abc") -> bytes:
    """Send a whole request on a connection and return the first bytes of the answer."""
    client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return client.recv(1 << 16)


def test_whole_requests_are_answered_one_after_the_other_and_pipelined() -> None:
    with serve(ConnectionLimits()) as (port, *_), connect(port) as client:
        assert ask(client).startswith(b"HTTP/1.1 200") and ask(client, b"x" * 200_000).startswith(
            b"HTTP/1.1 200"
        )
        client.sendall(
            b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 20
            + b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        assert read_all(client).count(b"HTTP/1.1 200") >= 20


@pytest.mark.parametrize(
    ("start", "piece", "status"),
    [
        (b"GET / HTTP/1.1\r\nx: ", b"a" * 4096, b"431"),
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 500, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101, b"\r\n", b"431"),
        (b"GET /", b"a" * 4096, b"414"),
        (b"", b"G" * 4096, b"400"),
        (CHUNKED + b"0\r\n", b"a: b\r\n" * 500, b"431"),
        (CHUNKED + b"0\r\na: ", b"a" * 4096, b"431"),
        (CHUNKED + b"1;", b"a" * 4096, b"431"),
    ],
    ids=[
        "one long header",
        "headers without end",
        "a header too many",
        "a long line",
        "no request",
        "trailers without end",
        "one long trailer",
        "a long chunk extension",
    ],
)
def test_a_head_without_end_is_refused_and_its_connection_closed(
    start: bytes, piece: bytes, status: bytes
) -> None:
    with serve(PATIENT) as (port, *_), connect(port) as client:
        sent = 0
        try:
            client.sendall(start)
            while sent < 8 << 20:
                client.sendall(piece)
                sent += len(piece)
        except OSError:
            pass  # closed, as it should be
        assert sent < 8 << 20, "the server reads on for ever"
    with serve(PATIENT) as (port, *_), connect(port) as client:
        client.sendall(start + piece * (1 + (64 << 10) // len(piece)))
        assert read_all(client).split(b" ")[1] == status


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET / HTTP/1.1\r\nhost: x\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_client_that_is_late_is_closed(beginning: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "SWEEP_S", 0.02)
    with serve(ConnectionLimits(head_s=0.2, body_s=0.2)) as (port, *_), connect(port) as client:
        client.sendall(beginning)
        assert read_all(client) == b""


def test_a_late_second_head_is_closed_too_and_a_waiting_answer_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_protocol, "SWEEP_S", 0.02)
    with serve(ConnectionLimits(head_s=0.3, body_s=0.3)) as (port, *_), connect(port) as client:
        assert ask(client).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET / HT")
        assert read_all(client) == b""


def test_a_client_that_reads_nothing_of_its_answer_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_protocol, "SWEEP_S", 0.02)
    with serve(ConnectionLimits(read_s=0.3)) as (port, server, _), connect(port) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + LIMIT_S
        while not server.server_state.tasks:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while server.server_state.connections:
            assert time.monotonic() < deadline, "it holds its place for ever"
            time.sleep(0.02)
        assert len(read_all(client)) < LARGE_BYTES


def test_an_address_has_no_more_than_its_share_and_others_are_answered() -> None:
    limits = ConnectionLimits(max_connections=16, address_share=0.25, head_s=600)
    with serve(limits) as (port, *_), ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(limits.max_per_address)]
        assert all(ask(client).startswith(b"HTTP/1.1 200") for client in clients)
        assert read_all(stack.enter_context(connect(port))) == b"", "one more than its share"
        assert ask(stack.enter_context(connect(port, "127.0.0.2"))).startswith(b"HTTP/1.1 200")
        clients[0].close()
        deadline = time.monotonic() + LIMIT_S
        while True:  # a place that was given back is free again
            with connect(port) as client:
                try:
                    if ask(client).startswith(b"HTTP/1.1 200"):
                        break
                except OSError:
                    pass
            assert time.monotonic() < deadline


def test_silent_connections_on_all_places_shut_nobody_out() -> None:
    limits = ConnectionLimits(max_connections=16, address_share=0.5, head_s=600)
    with serve(limits) as (port, *_), ExitStack() as stack:
        for number in range(40):
            stack.enter_context(connect(port, f"127.0.0.{number % 10 + 10}"))
        assert ask(stack.enter_context(connect(port, "127.0.0.2"))).startswith(b"HTTP/1.1 200")


def test_it_ends_within_its_grace_whatever_clients_do() -> None:
    halves = (
        b"",
        b"GET / HTT",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf",
        b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n",
    )
    with serve(PATIENT, grace_s=1) as (port, server, thread), ExitStack() as stack:
        for half in halves:
            stack.enter_context(connect(port)).sendall(half)
        assert ask(stack.enter_context(connect(port))).startswith(b"HTTP/1.1 200")
        server.should_exit = True
        thread.join(LIMIT_S)
        assert not thread.is_alive()

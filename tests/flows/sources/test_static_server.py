"""The loopback server gives what lies in its mounts, fast and over kept connections, and nothing
else.
"""

import http.client
import socket
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.sources.static_server import StaticServer, url_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StaticServer]:
    served = tmp_path / "served"
    (served / "deep er").mkdir(parents=True)
    (served / "a.png").write_bytes(b"picture")
    (served / "9k.png").write_bytes(b"x" * 9000)
    (served / "deep er" / "ü #1%?.png").write_bytes(b"odd name")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "served-too").mkdir()
    (tmp_path / "served-too" / "b.txt").write_text("secret")
    (served / "link.png").symlink_to(tmp_path / "secret.txt")
    (served / "loop").symlink_to(served / "loop")
    with StaticServer({"@scope/pictures": served}) as running:
        yield running


def raw(server: StaticServer, target: str, method: str = "GET") -> tuple[int, bytes]:
    """Ask for a target exactly as written, which no client library would send."""
    with socket.create_connection(server.server.server_address, timeout=5) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_files_are_served_by_mount_and_quoted_path(server: StaticServer) -> None:
    for path, body in (("a.png", b"picture"), ("deep er/ü #1%?.png", b"odd name")):
        with urllib.request.urlopen(server.base + url_path("@scope/pictures", path)) as response:
            assert response.read() == body
            assert response.headers["Content-Type"] == "image/png"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "deep%20er/../../secret.txt",
        "../served-too/b.txt",
        "link.png",
        "/etc/passwd",
        "%2fetc/passwd",
        "a.png%00",
        "a" * 300,
        "loop",
        "",
        "deep%20er",
        "missing.png",
    ],
)
def test_nothing_outside_the_mount_is_served(server: StaticServer, path: str) -> None:
    status, body = raw(server, f"/{server.server.secret}/@scope/pictures/{path}")
    assert status == 404
    assert b"secret" not in body


@pytest.mark.parametrize(
    "target", ["/", "/secret.txt", "/@scope", "/@scope/other/a.png", "*", "http://[::1/a"]
)
def test_nothing_outside_all_mounts_is_served(server: StaticServer, target: str) -> None:
    assert raw(server, target)[0] == raw(server, f"/{server.server.secret}{target}")[0] == 404


def test_who_does_not_know_the_secret_of_this_start_gets_nothing(
    server: StaticServer, tmp_path: Path
) -> None:
    with StaticServer({"@scope/pictures": tmp_path / "served"}) as other:
        for secret in ("", "/0", f"/{other.server.secret}"):
            assert raw(server, f"{secret}/@scope/pictures/a.png")[0] == 404
    assert raw(server, f"/{server.server.secret}/@scope/pictures/a.png") == (200, b"picture")


def test_head_gives_the_length_alone(server: StaticServer) -> None:
    assert raw(server, f"/{server.server.secret}/@scope/pictures/a.png", "HEAD") == (200, b"")


def test_a_large_file_is_sent_in_parts(server: StaticServer, tmp_path: Path) -> None:
    (tmp_path / "served" / "large.png").write_bytes(bytes(3 << 20) + b"end")
    tracemalloc.start()
    url = server.base + url_path("@scope/pictures", "large.png")
    with urllib.request.urlopen(url) as response:
        total = sum(len(part) for part in iter(lambda: response.read(1 << 16), b""))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == (3 << 20) + 3 and peak_bytes < 5 << 19


def test_it_listens_on_loopback_only(server: StaticServer) -> None:
    assert server.server.server_address[0] == "127.0.0.1"


def test_it_is_gone_when_the_context_is_left(tmp_path: Path) -> None:
    with StaticServer({"m": tmp_path}) as running:
        pass
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(running.base, timeout=2)


@pytest.mark.parametrize("name", ["a.png", "9k.png"])
def test_kept_connections_carry_many_requests_without_delay(
    server: StaticServer, name: str
) -> None:
    """With Nagle's algorithm against delayed acknowledgements the 9 KB file would come 23 times a
    second.
    """
    threads = threading.active_count()
    connection = http.client.HTTPConnection(*server.server.server_address)
    took_s = []
    for _ in range(4):
        start = time.monotonic()
        for _ in range(50):
            connection.request("GET", f"/{server.server.secret}/@scope/pictures/{name}")
            assert connection.getresponse().read()
            assert threading.active_count() == threads + 1
        took_s.append(time.monotonic() - start)
    assert min(took_s) < 50 / 23 / 2, "a delayed acknowledgement is awaited"
    connection.close()

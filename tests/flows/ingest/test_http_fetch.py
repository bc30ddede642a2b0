"""What the internet does to a fetch comes out as one of a few reasons, within the limits of time,
bytes, pixels and addresses.
"""

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from flows.ingest import http_fetch
from flows.ingest.host_limits import MAX_FAILED_CONNECTIONS, Hosts
from flows.ingest.http_fetch import FetchError, Rules, fetch_image, is_public
from tests.helpers.hostile_server import Server, encoded, picture

RULES = Rules(timeout_s=1.0, retries=0, max_bytes=200_000, max_pixels=10**7, allow_private=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def reason(url: str, rules: Rules = RULES) -> str:
    with pytest.raises(FetchError) as caught:
        fetch_image(url, rules)
    return caught.value.reason


@pytest.mark.parametrize(
    "path",
    [
        "good/1.png",
        "jpeg/1.jpg",
        "redirect/1.png",
        "raw_redirect/1.png",
        "early_hints/1.png",
        "gzip/1.png",
        "x-gzip/1.png",
        "deflate/1.png",
        "raw_deflate/1.png",
        "gzip_twice/1.png",
        "gzip_in_name_only/1.png",
        "other_agent/1.png",
        "flaky/1.png",
    ],
)
def test_a_good_image_arrives_byte_for_byte(server: Server, path: str) -> None:
    suffix = ".jpg" if "jpeg" in path else ".png"
    assert fetch_image(f"{server.base}/{path}", replace(RULES, retries=1)) == encoded(
        picture(1), suffix
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing/1.png", "http_404"),
        ("forbidden/1.png", "http_error"),
        ("dead/1.png", "http_unavailable"),
        ("html/1.png", "not_an_image"),
        ("truncated/1.png", "decode_error"),
        ("truncated_jpeg/1.jpg", "decode_error"),
        ("broken_header/1.png", "decode_error"),
        ("bomb/1.png", "too_large"),
        ("declared_large/1.png", "too_large"),
        ("endless/1.png", "too_large"),
        ("gzip_bomb/1.png", "too_large"),
        ("gzip_cut/1.png", "cut_short"),
        ("endless_hints/1.png", "unreachable"),
        ("slow_body/1.png", "timeout"),
        ("slow_headers/1.png", "timeout"),
        ("silent/1.png", "timeout"),
        ("cut/1.png", "cut_short"),
        ("nonsense/1.png", "unreachable"),
        ("noindex/1.png", "robots"),
        ("loop/1.png", "http_error"),
        ("to_file/1.png", "host_refused"),
    ],
)
@pytest.mark.timeout(30)
def test_every_fault_has_its_reason(server: Server, path: str, expected: str) -> None:
    assert reason(f"{server.base}/{path}") == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///etc/hostname", "host_refused"),
        ("ftp://127.0.0.1/a.png", "host_refused"),
        ("not a url", "host_refused"),
        ("http:///no-such-host.invalid/a.png", "unreachable"),
        ("http:///", "bad_url"),
        ("http://[::1/a.png", "bad_url"),
        ("http://127.0.0.1:99999/a.png", "bad_url"),
        (f"http://{'a' * 300}.test/a.png", "bad_url"),
        ("http://127.0.0.1:1/a.png", "unreachable"),
        ("http://no-such-host.invalid/a.png", "unreachable"),
    ],
)
def test_an_url_that_leads_nowhere_has_its_reason(url: str, expected: str) -> None:
    assert reason(url) == expected


def test_a_404_is_asked_once_and_a_503_again(server: Server) -> None:
    for path in ("/missing/7.png", "/dead/7.png"):
        reason(f"{server.base}{path}", replace(RULES, retries=2, timeout_s=5))
    assert (server.asked["/missing/7.png"], server.asked["/dead/7.png"]) == (1, 3)


def test_an_image_of_more_pixels_than_allowed_is_too_large_whatever_its_bytes(
    server: Server,
) -> None:
    assert (
        reason(f"{server.base}/good/1.png", replace(RULES, max_pixels=48 * 48 - 1)) == "too_large"
    )
    assert fetch_image(f"{server.base}/good/1.png", replace(RULES, max_pixels=48 * 48))


def test_a_picture_that_grows_out_of_bounds_on_its_way_to_its_size_is_too_large(
    server: Server,
) -> None:
    url = f"{server.base}/thread/1.png"  # 1 x 1,000,000
    assert reason(url, replace(RULES, upscaled_side_px=64)) == "too_large"  # 64 x 64,000,000
    assert fetch_image(url, replace(RULES, upscaled_side_px=3)) and fetch_image(url, RULES)


@pytest.mark.parametrize(
    ("value", "is_no"),
    [
        ("noindex", True),
        ("max-image-preview:large, noai", True),
        ("max-snippet: 20, max-video-preview:-1", False),
        ("max-snippet:20, NoImageAI", True),
        ("unavailable_after: Friday, 25-Jun-10 15:00:00 GMT, noindex", True),
        ("unclip: noai", True),
        ("*: none", True),
        ("otherbot: noindex, nofollow", False),
        ("otherbot: noindex, unclip: noai", True),
        ("unclip: nofollow, otherbot: noai", False),
        ("nosnippet, noarchive", False),
    ],
)
def test_x_robots_tag_is_read_with_its_agents_and_values(value: str, is_no: bool) -> None:
    assert http_fetch.is_forbidden([value]) is is_no
    assert http_fetch.is_forbidden(["nosnippet", value]) is is_no


def test_one_connection_serves_many_requests_even_after_errors(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[list[str]] = []
    original = http_fetch.dial

    def dial(addresses: list[str], port: int, deadline: float) -> socket.socket:
        dialled.append(addresses)
        return original(addresses, port, deadline)

    monkeypatch.setattr(http_fetch, "dial", dial)
    http_fetch.connections().clear()
    for number in range(10):
        fetch_image(f"{server.base}/good/{number}.png", RULES)
        reason(f"{server.base}/missing/{number}.png")
    assert len(dialled) == 1


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    with Server() as first:
        fetch_image(f"{first.base}/good/1.png", RULES)
        kept = next(iter(http_fetch.connections().values()))
        assert kept.sock is not None
        kept.sock.shutdown(socket.SHUT_RDWR)
        assert fetch_image(f"{first.base}/good/2.png", RULES) == encoded(picture(2))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2002:a01:203::1",
        "2001:0:808:808:0:0:f5fe:fdfc",
        "64:ff9b:1::808:808",
        "fec0::1",
        "::ffff:10.0.0.1",
    ],
)
def test_reserved_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_open_addresses_are_public(address: str) -> None:
    assert is_public(address)


def test_private_addresses_are_refused_by_name_number_and_redirect(server: Server) -> None:
    port = server.server_address[1]
    rules = replace(RULES, allow_private=False, loopback=f"{server.base}/good")
    assert fetch_image(
        f"{server.base}/good/1.png", rules
    )  # our own static server, below its secret alone
    before = server.asked.total()
    for url in (
        f"{server.base}/jpeg/1.jpg",
        f"{server.base}/good",
        f"{server.base}/goods/1.png",
        f"http://localhost:{port}/good/1.png",
        f"http://2130706433:{port}/jpeg/1.jpg",
        f"http://[::1]:{port}/good/1.png",
    ):
        assert reason(url, rules) == "host_refused"
    assert server.asked.total() == before
    assert (
        reason(f"{server.base}/away/1.png", replace(rules, loopback=f"{server.base}/away"))
        == "host_refused"
    )
    assert server.asked["/good/1.png"] >= 1
    assert server.asked.total() == before + 1  # the redirect itself; its target was never asked


def test_a_name_is_resolved_once_and_the_checked_address_is_dialled(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers with a public address to the check and with a private one to the
    connection (rebinding) gains nothing.
    """
    answers = iter(["93.184.216.34", "127.0.0.1"])
    dialled: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def dial(addresses: list[str], port: int, deadline: float) -> socket.socket:
        dialled.extend(addresses)
        raise OSError("no route")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(http_fetch, "dial", dial)
    assert (
        reason("http://rebinding.test/a.png", replace(RULES, allow_private=False)) == "unreachable"
    )
    assert dialled == ["93.184.216.34"]


def test_a_name_with_one_private_address_among_public_ones_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in ("93.184.216.34", "10.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert reason("http://mixed.test/a.png", replace(RULES, allow_private=False)) == "host_refused"


def test_a_host_to_which_no_connection_comes_about_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_fetch, "hosts", Hosts())
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for _ in range(10):
        assert reason("http://gone.test/a.png", replace(RULES, retries=1)) == "unreachable"
    assert reason("http://other.test/a.png") == "unreachable"
    assert asked == ["gone.test"] * MAX_FAILED_CONNECTIONS + ["other.test"]
    http_fetch.hosts.forget_failures()
    assert reason("http://gone.test/a.png") == "unreachable" and asked[-1] == "gone.test"


def test_an_address_that_does_not_answer_gives_way_to_the_next(server: Server) -> None:
    sock = http_fetch.dial(
        ["127.0.0.9", "127.0.0.1"], server.server_address[1], time.monotonic() + 2
    )
    assert sock.getpeername()[0] == "127.0.0.1"
    sock.close()


class Proxy(BaseHTTPRequestHandler):
    """A proxy that knows one name and forwards what is asked of it to `target`."""

    asked: ClassVar[list[str]] = []
    target = ""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        with urllib.request.urlopen(
            self.path.replace("http://pictures.test:80", self.target)
        ) as got:
            body = got.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_proxy_is_used_where_the_recipe_names_one_and_never_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Proxy.target = server.base
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_address[1]}"
        through = replace(RULES, proxy=address, allow_private=False, loopback=f"{server.base}/good")
        assert fetch_image("http://pictures.test/good/1.png", through) == encoded(picture(1))
        assert Proxy.asked == ["http://pictures.test:80/good/1.png"]
        assert reason("https://pictures.test/good/1.png", through) == "unreachable"
        assert Proxy.asked.pop() == "pictures.test:443"
        for host in ("127.0.0.1", "2130706433", "[::1]", "localhost", "a.localhost", "10.0.0.1"):
            assert reason(f"http://{host}/good/1.png", through) == "host_refused"
        assert fetch_image(f"{server.base}/good/1.png", through)  # our own server needs none
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, address)
        assert reason("http://no-such-host.invalid/good/1.png") == "unreachable"
        assert len(Proxy.asked) == 1
        proxy.shutdown()

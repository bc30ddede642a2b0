"""Fetch one image over HTTP from a host that is not trusted.

Time, bytes and declared pixels are bounded; connections are reused per thread. Every address,
redirect targets included, is checked when a connection is made, and the connection goes to the
checked address, so DNS rebinding does not bypass the check. Failures raise `FetchError` with a
counted reason. Only `Rules.proxy` sets a proxy, never the environment. A proxy resolves names
itself, so only IP addresses in URLs and `localhost` can be checked here.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import zlib
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlsplit

from PIL import Image

from flows.ingest.host_limits import (
    FAILURE_S,
    MAX_FAILED_CONNECTIONS,
    ROBOTS_BYTES,
    Hosts,
    Origin,
    RecentFailureError,
)
from flows.ingest.image_ends import is_whole
from flows.ingest.plain_image import TIFF_STARTS, read_header
from flows.ingest.robots import AGENT
from flows.sources.opt_out import NO_OPT_OUT, OptOut
from infra.canonical_url import SchemeError, Url, parse_url, redirect_target

USER_AGENT = "unclip/0.1 (image-text dataset builder; honours robots.txt and X-Robots-Tag)"
MAX_REDIRECTS, MAX_INFORMATIONAL, MAX_ENCODINGS = 5, 20, 3
ZLIB_WINDOWS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
"""zlib's window bits by Content-Encoding; `deflate` may come with or without a zlib header."""
CHUNK_BYTES = 1 << 16
FORBIDDING_DIRECTIVES = frozenset(("noai", "noimageai", "noindex", "noimageindex", "none"))

VALUE_DIRECTIVES = frozenset(
    ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")
)
"""Directives of X-Robots-Tag with the form `name:value`, which is also that of a user agent."""

TEMPORARY_STATUSES = (408, 425, 429)

TEMPORARY_REASONS = frozenset(("timeout", "unreachable", "http_unavailable", "cut_short"))
"""Reasons for which a later request may succeed."""


class FetchError(Exception):
    """An image could not be fetched: `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str, is_permanent: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
        self.is_permanent = is_permanent or reason not in TEMPORARY_REASONS
        """Whether an immediate retry cannot succeed."""


@dataclass(frozen=True)
class Rules:
    """Limits of one fetch."""

    timeout_s: float
    retries: int
    max_bytes: int
    max_pixels: int
    allow_private: bool
    loopback: str = ""
    """Base URL of our own static server, the only private address that is always allowed. It
    contains a secret, so that no URL list can name it."""
    robots: bool = False
    """Whether robots.txt is checked before a request; X-Robots-Tag is always obeyed."""
    per_host: int = 0
    """Simultaneous requests of this process to one host; 0 sets no limit."""
    is_robots_txt: bool = False
    """Whether robots.txt itself is fetched; its X-Robots-Tag is ignored."""
    upscaled_side_px: int = 0
    """Pixels to which the shorter side of an image will be scaled while the longer side is not
    limited; 0 for resize modes that limit the longer side."""
    proxy: str = ""
    """`http://host:port` of the proxy for all requests except those to our own server."""
    opt_out: OptOut = NO_OPT_OUT
    """Hosts and URLs that are never requested, not even after a redirect."""


def fetch_image(url: str, rules: Rules) -> bytes:
    """Return the bytes of the image at `url`; check its header without decoding it.

    Raises FetchError.
    """
    body = fetch_with_retries(url, rules)
    check_image(body, rules)
    return body


def fetch_with_retries(url: str, rules: Rules) -> bytes:
    """GET `url`; retry temporary failures up to `rules.retries` times.

    The pauses are 0.2 s, 0.4 s, 0.8 s and so on. Raises FetchError.
    """
    for attempt in range(rules.retries):
        try:
            return fetch(url, rules)
        except FetchError as error:
            if error.is_permanent:
                raise
            time.sleep(0.2 * 2**attempt)
    return fetch(url, rules)


def fetch(url: str, rules: Rules) -> bytes:
    """GET `url` within the rules, following redirects; return the body.

    The time that is spent waiting for a slot of the host or for robots.txt does not count towards
    `timeout_s`. Raises FetchError.
    """
    deadline = time.monotonic() + rules.timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        started_s = time.monotonic()
        parsed = parsed_url(url)
        url, origin, target = str(parsed), origin_of(parsed), parsed.target
        if rules.opt_out.covers(url):
            raise FetchError(
                "opted_out", f"{origin[1]} or this URL is on an opt-out list ([data] opt_out)"
            )
        is_ours = bool(rules.loopback) and url.startswith(rules.loopback + "/")
        if rules.robots and not is_ours:
            try:
                if not hosts.allows(origin, target, partial(robots_txt, origin, rules)):
                    raise FetchError("robots", f"robots.txt of {origin[1]} forbids it")
            except RecentFailureError as failure:
                assert isinstance(failure.original, FetchError)
                raise FetchError(
                    failure.original.reason, failure.original.detail, is_permanent=True
                ) from failure
        with hosts.slot(origin, 0 if is_ours else rules.per_host):
            deadline += time.monotonic() - started_s
            own_rules = replace(rules, allow_private=True, proxy="")
            answer = get(parsed, own_rules if is_ours else rules, deadline)
        if isinstance(answer, bytes):
            return answer
        url = redirected_url(url, answer)
    raise FetchError("http_error", f"more than {MAX_REDIRECTS} redirects")


def robots_txt(origin: Origin, rules: Rules) -> str:
    """Return a host's robots.txt; "" if it has none (a 4xx status, RFC 9309, 2.3.1.3).

    Raises FetchError if it cannot be read now; then the image must not be requested either.
    """
    where = f"{base_of(origin)}/robots.txt"
    try:
        body = fetch_with_retries(
            where,
            replace(rules, robots=False, per_host=0, is_robots_txt=True, max_bytes=ROBOTS_BYTES),
        )
        return body.decode(errors="replace")
    except FetchError as error:
        if error.reason in ("http_404", "http_error"):
            return ""
        raise FetchError(error.reason, f"robots.txt: {error.detail}", is_permanent=True) from error


def base_of(origin: Origin) -> str:
    """Return the base URL of an origin, such as `https://example.org:443`."""
    scheme, host, port = origin
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def parsed_url(url: str) -> Url:
    """Parse a URL. Raises FetchError if it is not an http or https URL with a host."""
    try:
        return parse_url(url)
    except SchemeError as error:
        raise FetchError("host_refused", str(error)) from error
    except ValueError as error:
        raise FetchError("bad_url", str(error)) from error


def origin_of(url: Url) -> Origin:
    """Return scheme, host and port of a URL."""
    return url.scheme, url.host, url.port


def redirected_url(url: str, location: str) -> str:
    """Return the URL of a redirect from `url`. Raises FetchError if it is not valid."""
    try:
        return redirect_target(url, location)
    except ValueError as error:
        raise FetchError("bad_url", "the response redirects to an invalid URL") from error


def get(url: Url, rules: Rules, deadline: float) -> bytes | str:
    """Make one request; return the body (bytes) or the target of a redirect (str).

    Raises FetchError.
    """
    try:
        return exchange(origin_of(url), url.target, rules, deadline)
    except FetchError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise FetchError("bad_certificate", error.verify_message) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise FetchError("timeout", f"no complete response in {rules.timeout_s:g} s") from error
        if isinstance(error, http.client.IncompleteRead):
            raise FetchError(
                "cut_short", "the connection was closed before the body was complete"
            ) from error
        raise FetchError("unreachable", str(error) or type(error).__name__) from error
    except ValueError as error:  # also UnicodeError: an invalid host name or port
        raise FetchError("bad_url", str(error)) from error


def exchange(origin: Origin, target: str, rules: Rules, deadline: float) -> bytes | str:
    """Send one request over this thread's connection to the host; return the body or redirect.

    If a reused connection was closed by the host in the meantime, retry on a new one.
    """
    # The key holds the rules of the address check: a connection that was allowed under one rule
    # must not serve a request under another.
    pool_key = (origin, rules.allow_private, rules.proxy)
    if rules.proxy and origin[0] == "http":
        target = f"{base_of(origin)}{target}"
    while True:
        pooled = connections().pop(pool_key, None)
        connection = pooled or connect(origin, rules, deadline)
        sock = connection.sock
        assert sock is not None
        try:
            with closed_at(deadline, sock):
                sock.settimeout(seconds_left(deadline))
                connection.request(
                    "GET", target, headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.1"}
                )
                response = connection.getresponse()
                answer = read(response, sock, rules, deadline)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection.close()
            if pooled is None or time.monotonic() >= deadline:
                raise
            continue
        except BaseException as error:
            if not (isinstance(error, FetchError) and response.isclosed()):
                connection.close()
            elif connection.sock is not None:
                connections()[pool_key] = connection
            raise
        if response.isclosed() and connection.sock is not None:
            connections()[pool_key] = connection
        else:
            connection.close()
        return answer


def read(
    response: http.client.HTTPResponse, sock: socket.socket, rules: Rules, deadline: float
) -> bytes | str:
    """Read a response within the limits; return its body or its redirect target.

    Raises FetchError, TimeoutError.
    """
    if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
        discard_body(response)
        return decode_header(response.headers["Location"])
    if response.status != 200:
        discard_body(response)
        is_temporary = response.status in TEMPORARY_STATUSES or response.status >= 500
        reason = (
            "http_404"
            if response.status in (404, 410)
            else "http_unavailable"
            if is_temporary
            else "http_error"
        )
        raise FetchError(reason, f"HTTP {response.status} {response.reason}")
    if not rules.is_robots_txt and is_forbidden(response.headers.get_all("X-Robots-Tag", [])):
        raise FetchError("robots", "the response's X-Robots-Tag forbids it")
    declared = response.length
    if declared is not None and declared > rules.max_bytes:
        raise FetchError("too_large", f"{declared:,} bytes declared, {rules.max_bytes:,} allowed")
    chunks: list[bytes] = []
    total = 0
    while chunk := response.read1(CHUNK_BYTES):
        chunks.append(chunk)
        total += len(chunk)
        if total > rules.max_bytes:
            raise FetchError("too_large", f"more than the {rules.max_bytes:,} bytes allowed")
        sock.settimeout(seconds_left(deadline))
    seconds_left(deadline)  # raises if the reaper closed the socket: then the body is not complete
    if response.length:
        raise FetchError("cut_short", f"{response.length:,} of {declared:,} bytes are missing")
    response.close()
    return decompress(b"".join(chunks), response.headers.get("Content-Encoding", ""), rules)


def decode_header(value: str) -> str:
    """Return a header's value decoded as UTF-8 if valid; http.client decodes it as Latin-1."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def decompress(body: bytes, encodings: str, rules: Rules) -> bytes:
    """Decompress gzip and deflate, which some hosts send without being asked.

    A body with another encoding is returned unchanged. Raises FetchError if the result has more
    than `max_bytes`, or if the compressed data is truncated.
    """
    names = [name.strip().lower() for name in encodings.split(",")]
    for name in reversed(names[:MAX_ENCODINGS]):
        if name not in ZLIB_WINDOWS:
            continue
        for window in ZLIB_WINDOWS[name]:
            packed = zlib.decompressobj(window)
            try:
                plain = packed.decompress(body, rules.max_bytes + 1)
            except zlib.error:
                continue
            if len(plain) > rules.max_bytes:
                raise FetchError("too_large", f"decompresses to over {rules.max_bytes:,} bytes")
            if not packed.eof:
                raise FetchError("cut_short", f"the {name} data is truncated")
            body = plain
            break
    return body


class Response(http.client.HTTPResponse):
    """A response that skips informational ones, such as 103 Early Hints (RFC 8297)."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INFORMATIONAL):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 < status < 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException(f"more than {MAX_INFORMATIONAL} informational responses")


def discard_body(response: http.client.HTTPResponse) -> None:
    """Read and discard a short body, so that the connection can be reused."""
    if response.length is not None and response.length <= CHUNK_BYTES:
        response.read()


def is_forbidden(values: list[str]) -> bool:
    """Return whether an X-Robots-Tag header forbids this use.

    A directive counts if its line names no user agent, `*` or ours before it; an agent applies
    until the next one in the line.
    """
    for value in values:
        applies_to_us = True
        for piece in value.lower().split(","):
            name, colon, rest = (part.strip() for part in piece.partition(":"))
            # A name with a space is part of a date after a comma, not a user agent.
            if colon and name not in VALUE_DIRECTIVES and " " not in name:
                applies_to_us, name = name in ("*", AGENT), rest
            if applies_to_us and name in FORBIDDING_DIRECTIVES:
                return True
    return False


def connect(origin: Origin, rules: Rules, deadline: float) -> http.client.HTTPConnection:
    """Resolve a host, check all its addresses, and connect to one of them.

    Raises FetchError, OSError.
    """
    scheme, host, port = origin
    if hosts.is_paused(origin):
        raise FetchError(
            "unreachable",
            f"{MAX_FAILED_CONNECTIONS} connections to {host} failed in a row: no request for "
            f"{FAILURE_S} s",
            True,
        )
    addresses = proxy_addresses(origin, rules) if rules.proxy else checked_addresses(origin, rules)
    connect_port = urlsplit(rules.proxy).port or 80 if rules.proxy else port
    try:
        sock = dial(addresses, connect_port, deadline)
    except OSError:
        hosts.record_connection(origin, False)
        raise
    hosts.record_connection(origin, True)
    if rules.proxy and scheme == "https":
        with closed_at(deadline, sock):
            open_tunnel(sock, origin)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if scheme == "https":
        with closed_at(deadline, sock):
            sock = tls().wrap_socket(sock, server_hostname=host)
    connection = http.client.HTTPConnection(host, port)
    connection.response_class = Response
    connection.sock = sock
    connection.auto_open = 0  # http.client must not reconnect without the check of addresses
    return connection


def checked_addresses(origin: Origin, rules: Rules) -> list[str]:
    """Return a host's addresses; raise FetchError if one of them is not allowed."""
    _, host, port = origin
    try:
        address_infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        hosts.record_connection(origin, False)
        raise FetchError("unreachable", f"{host}: {error.strerror}") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in address_infos))
    if not rules.allow_private:
        for address in addresses:
            if not is_public(address):
                raise FetchError(
                    "host_refused",
                    f"{host} is at {address}, a private, loopback or otherwise reserved address",
                )
    return addresses


def proxy_addresses(origin: Origin, rules: Rules) -> list[str]:
    """Return the proxy's addresses.

    Raises FetchError if the host of the URL is a reserved address in any notation, or `localhost`.
    """
    _, host, port = origin
    try:  # AI_NUMERICHOST: this resolves no names
        literal = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        literal = []
    name = host.lower().rstrip(".")
    is_private = name == "localhost" or name.endswith(".localhost")
    is_private = is_private or any(not is_public(str(entry[4][0])) for entry in literal)
    if is_private and not rules.allow_private:
        raise FetchError("host_refused", f"{host} is a private, loopback or reserved address")
    proxy = urlsplit(rules.proxy)
    try:
        address_infos = socket.getaddrinfo(
            proxy.hostname, proxy.port or 80, type=socket.SOCK_STREAM
        )
    except socket.gaierror as error:
        raise FetchError("unreachable", f"proxy {rules.proxy}: {error.strerror}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in address_infos))


def open_tunnel(sock: socket.socket, origin: Origin) -> None:
    """Open a tunnel to a host through the connected proxy (CONNECT, RFC 9110, 9.3.6)."""
    authority = base_of(origin).partition("://")[2]
    sock.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
    answer = Response(sock, method="CONNECT")
    answer.begin()
    if answer.status != 200:
        sock.close()
        raise FetchError("unreachable", f"the proxy answered CONNECT with HTTP {answer.status}")


def dial(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that answers.

    The time until the deadline is divided among the addresses, so that one without an answer leaves
    time for the others. Raises OSError, FetchError.
    """
    for position, address in enumerate(addresses):
        remaining = seconds_left(deadline)
        try:
            return socket.create_connection(
                (address, port), timeout=remaining / (len(addresses) - position)
            )
        except OSError:
            if position == len(addresses) - 1:
                raise
    raise FetchError("unreachable", "the host name has no address")


def is_public(address: str) -> bool:
    """Return whether an address is on the public internet.

    For an IPv6 address that contains an IPv4 address (mapped, 6to4, NAT64, Teredo), the IPv4
    address must be public too.
    """
    address_value = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(address_value, ipaddress.IPv6Address):
        wrapped = [
            address_value.ipv4_mapped,
            address_value.sixtofour,
            *(address_value.teredo or ()),
        ]
        local_nat64 = ipaddress.ip_network("64:ff9b:1::/48")  # RFC 8215
        if address_value.is_site_local or address_value in local_nat64:  # fec0::/10
            return False
        if address_value in ipaddress.ip_network(
            "64:ff9b::/96"
        ) or address_value in ipaddress.ip_network("::/96"):
            wrapped.append(ipaddress.IPv4Address(int(address_value) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(str(inner)) for inner in wrapped):
            return False
        if address_value.ipv4_mapped:
            return True
    return address_value.is_global and not address_value.is_multicast


def check_image(body: bytes, rules: Rules) -> None:
    """Check the format, size and completeness of an image; raise FetchError if one is wrong.

    Only an image without an end marker is decoded, because OpenCV decodes a truncated image without
    an error.
    """
    try:
        header = read_header(body)
    except Image.DecompressionBombError as error:
        raise FetchError("too_large", str(error)) from error
    except Exception as error:  # Pillow's parsers raise many types on hostile bytes
        if body.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", *TIFF_STARTS)):
            raise FetchError("decode_error", "the image's header is broken") from error
        start = body[:40].decode("latin-1").strip()
        raise FetchError(
            "not_an_image", f"{len(body):,} bytes that start with {start!r}"
        ) from error
    width, height = header.width_px, header.height_px
    if width * height > rules.max_pixels:
        raise FetchError(
            "too_large", f"{width} x {height} pixels declared, {rules.max_pixels:,} allowed"
        )
    if min(width, height) and rules.upscaled_side_px**2 * max(
        width, height
    ) > rules.max_pixels * min(width, height):
        raise FetchError(
            "too_large",
            f"{width} x {height} pixels would be over {rules.max_pixels:,} at "
            f"{rules.upscaled_side_px} on the shorter side",
        )
    if not is_whole(header.kind, body):
        raise FetchError("decode_error", f"truncated {header.kind} of {len(body):,} bytes")


hosts = Hosts()
_local = threading.local()
_open_sockets: dict[int, tuple[float, socket.socket]] = {}
_reaper_lock = threading.Lock()


def connections() -> dict[tuple[Origin, bool, str], http.client.HTTPConnection]:
    """Return this thread's idle connections, at most 4."""
    if not hasattr(_local, "connections"):
        _local.connections = {}
    pool: dict[tuple[Origin, bool, str], http.client.HTTPConnection] = _local.connections
    while len(pool) > 4:
        pool.pop(next(iter(pool))).close()
    return pool


def tls() -> ssl.SSLContext:
    """Return this thread's TLS context, which verifies against the system's certificates."""
    if not hasattr(_local, "tls"):
        _local.tls = ssl.create_default_context()
    context: ssl.SSLContext = _local.tls
    return context


def seconds_left(deadline: float) -> float:
    """Return the seconds until the deadline; raise TimeoutError after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class closed_at:  # noqa: N801 (reads as a statement: with closed_at(deadline, sock))
    """Context manager: shut the socket down at the deadline.

    A timeout on the socket alone would not end a peer that sends a byte now and then, in headers or
    in the TLS handshake.
    """

    def __init__(self, deadline: float, sock: socket.socket) -> None:
        self.deadline, self.sock = deadline, sock

    def __enter__(self) -> None:
        start_reaper()
        _open_sockets[id(self)] = (self.deadline, self.sock)

    def __exit__(self, *_: object) -> None:
        _open_sockets.pop(id(self), None)


def start_reaper() -> None:
    """Start the thread that shuts down overdue sockets, unless it runs already."""
    with _reaper_lock:
        if not any(thread.name == "reaper" for thread in threading.enumerate()):
            threading.Thread(target=reap, name="reaper", daemon=True).start()


def reap() -> None:
    """Shut down overdue sockets until the process ends."""
    while True:
        time.sleep(0.25)
        now = time.monotonic()
        for deadline, sock in list(_open_sockets.values()):
            if now >= deadline:
                with contextlib.suppress(OSError):  # closed already
                    sock.shutdown(socket.SHUT_RDWR)

"""Fetch one image over HTTP: polite to hosts and suspicious of their answers.

Time, bytes and declared pixels are bounded; connections are reused per thread. Every address is
checked when a connection is made, redirect targets included, and the connection goes to the checked
address, so a name that later resolves differently gains nothing. Failures raise `FetchError` with
one of the reasons below. Knows nothing of shards. Uses a proxy only where `Rules.proxy` names one,
never by the environment; a proxy resolves names itself, so that only addresses that stand in a URL
and `localhost` can be checked here.
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
from urllib.parse import urljoin, urlsplit

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
from flows.sources.opt_out import NOBODY, OptOut
from flows.sources.url_spelling import request_target

USER_AGENT = "unclip/0.1 (image-text dataset builder; honours robots.txt and X-Robots-Tag)"
MAX_REDIRECTS, MAX_INFORMATIONAL, MAX_ENCODINGS = 5, 20, 3
ZLIB_WINDOWS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
"""zlib's window bits by Content-Encoding; `deflate` comes with a zlib header or without one."""
CHUNK_BYTES = 1 << 16
FORBIDDING = frozenset(("noai", "noimageai", "noindex", "noimageindex", "none"))

VALUED = frozenset(("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"))
"""Directives of X-Robots-Tag that are written `name:value` and so look like a user agent."""

TRY_LATER = (408, 425, 429)

# Reasons that another try may mend.
PASSING = frozenset(("timeout", "unreachable", "http_unavailable", "cut_short"))


class FetchError(Exception):
    """A picture that cannot be had: `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str, is_hopeless: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
        self.is_hopeless = is_hopeless or reason not in PASSING
        """Whether trying again at once is in vain."""


@dataclass(frozen=True)
class Rules:
    """Limits of one fetch."""

    timeout_s: float
    retries: int
    max_bytes: int
    max_pixels: int
    allow_private: bool
    loopback: str = ""
    """URL below which our own static server answers, with a secret in it that no list can name: the
    one private place always allowed."""
    robots: bool = False
    """Ask a host's robots.txt first; X-Robots-Tag is heeded in any case."""
    per_host: int = 0
    """Simultaneous requests of this process to one host; 0 sets no limit."""
    is_robots_txt: bool = False
    grown_px: int = 0
    """Pixels to which the shorter side of a picture will be scaled; 0 where nothing can grow by
    it."""
    proxy: str = ""
    """`http://host:port` through which all but our own server is asked."""
    opt_out: OptOut = NOBODY
    """What is not asked even where a redirect leads there."""


def fetch_image(url: str, rules: Rules) -> bytes:
    """Return the bytes of the image at `url`, looked at but not decoded; raises FetchError."""
    body = retry(url, rules)
    look_at(body, rules)
    return body


def retry(url: str, rules: Rules) -> bytes:
    """GET `url`, again after growing pauses for what may pass."""
    for attempt in range(rules.retries):
        try:
            return fetch(url, rules)
        except FetchError as error:
            if error.is_hopeless:
                raise
            time.sleep(0.2 * 2**attempt)
    return fetch(url, rules)


def fetch(url: str, rules: Rules) -> bytes:
    """GET `url`, following redirects, within the rules; time spent waiting for a host's turn or its
    robots.txt does not count.
    """
    deadline = time.monotonic() + rules.timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        started_s = time.monotonic()
        origin, target = split_origin(url)
        if rules.opt_out.covers(url):
            raise FetchError("opted_out", f"{origin[1]} does not want to be used")
        is_ours = bool(rules.loopback) and url.startswith(rules.loopback + "/")
        if rules.robots and not is_ours:
            try:
                if not hosts.allows(origin, target, partial(robots_txt, origin, rules)):
                    raise FetchError("robots", f"robots.txt of {origin[1]} forbids it")
            except RecentFailureError as still:
                assert isinstance(still.first, FetchError)
                raise FetchError(
                    still.first.reason, still.first.detail, is_hopeless=True
                ) from still
        with hosts.slot(origin, 0 if is_ours else rules.per_host):
            deadline += time.monotonic() - started_s
            ours = replace(rules, allow_private=True, proxy="")
            answer = get(url, ours if is_ours else rules, deadline)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise FetchError("http_error", f"more than {MAX_REDIRECTS} redirects")


def robots_txt(origin: Origin, rules: Rules) -> str:
    """Return a host's robots.txt; "" where it has none (a 4xx, RFC 9309, 2.3.1.3). Where it cannot
    be had now, nor can the picture.
    """
    where = f"{base_of(origin)}/robots.txt"
    try:
        body = retry(
            where,
            replace(rules, robots=False, per_host=0, is_robots_txt=True, max_bytes=ROBOTS_BYTES),
        )
        return body.decode(errors="replace")
    except FetchError as error:
        if error.reason in ("http_404", "http_error"):
            return ""
        raise FetchError(error.reason, f"robots.txt: {error.detail}", is_hopeless=True) from error


def base_of(origin: Origin) -> str:
    """Return the start of all URLs of an origin."""
    scheme, host, port = origin
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def split_origin(url: str) -> tuple[Origin, str]:
    """Return scheme, host and port of a URL, and what is asked of them; raises FetchError for what
    is no such URL.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise FetchError(
                "host_refused",
                f"scheme {parts.scheme or 'none'!r}: only http and https are fetched",
            )
        if not parts.hostname:
            raise FetchError("bad_url", "it names no host")
        target = request_target(parts.path, parts.query)
        return (
            parts.scheme,
            parts.hostname,
            parts.port or (443 if parts.scheme == "https" else 80),
        ), target
    except ValueError as error:
        raise FetchError("bad_url", str(error)) from error


def get(url: str, rules: Rules, deadline: float) -> bytes | str:
    """Make one request; returns the body, or the target of a redirect."""
    try:
        return exchange(*split_origin(url), rules, deadline)
    except FetchError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise FetchError("bad_certificate", error.verify_message) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise FetchError("timeout", f"no whole answer in {rules.timeout_s:g} s") from error
        if isinstance(error, http.client.IncompleteRead):
            raise FetchError(
                "cut_short", "the connection closed before the body was whole"
            ) from error
        raise FetchError("unreachable", str(error) or type(error).__name__) from error
    except ValueError as error:  # UnicodeError too: a host name or port that is none
        raise FetchError("bad_url", str(error)) from error


def exchange(origin: Origin, target: str, rules: Rules, deadline: float) -> bytes | str:
    """Send one request on this thread's connection to the host, and once more on a fresh one if the
    kept one has died meanwhile.
    """
    pool_key = (
        origin,
        rules.allow_private,
        rules.proxy,
    )  # one that was let through the check of addresses serves nobody else
    if rules.proxy and origin[0] == "http":
        target = f"{base_of(origin)}{target}"
    while True:
        pooled = connections().pop(pool_key, None)
        connection = pooled or connect(origin, rules, deadline)
        sock = connection.sock
        assert sock is not None
        try:
            with reaped_at(deadline, sock):
                sock.settimeout(left(deadline))
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
    """Read a response within the limits; returns its body, or its redirect target."""
    if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
        swallow(response)
        return header_text(response.headers["Location"])
    if response.status != 200:
        swallow(response)
        is_passing = response.status in TRY_LATER or response.status >= 500
        reason = (
            "http_404"
            if response.status in (404, 410)
            else "http_unavailable"
            if is_passing
            else "http_error"
        )
        raise FetchError(reason, f"HTTP {response.status} {response.reason}")
    if not rules.is_robots_txt and is_forbidden(response.headers.get_all("X-Robots-Tag", [])):
        raise FetchError("robots", "X-Robots-Tag forbids it")
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
        sock.settimeout(left(deadline))
    left(deadline)  # an end that the reaper made is none
    if response.length:
        raise FetchError("cut_short", f"{response.length:,} of {declared:,} bytes never came")
    response.close()
    return unpacked(b"".join(chunks), response.headers.get("Content-Encoding", ""), rules)


def header_text(value: str) -> str:
    """Return a header's value as UTF-8 where it is; http.client takes its bytes for Latin-1."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def unpacked(body: bytes, encodings: str, rules: Rules) -> bytes:
    """Undo gzip and deflate, which some hosts send unasked; a body that is neither stays as it is.

    Raises FetchError for more than `max_bytes` and for packed data that is cut.
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
                raise FetchError("too_large", f"unpacks to over {rules.max_bytes:,} bytes")
            if not packed.eof:
                raise FetchError("cut_short", f"its {name} data ends early")
            body = plain
            break
    return body


class Response(http.client.HTTPResponse):
    """A response behind any number of informational ones, such as 103 Early Hints (RFC 8297)."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INFORMATIONAL):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 < status < 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException(f"more than {MAX_INFORMATIONAL} informational responses")


def swallow(response: http.client.HTTPResponse) -> None:
    """Read a short body that nobody wants, so that the connection can be used again."""
    if response.length is not None and response.length <= CHUNK_BYTES:
        response.read()


def is_forbidden(values: list[str]) -> bool:
    """Whether an X-Robots-Tag without a user agent, for all or for us forbids this use; an agent
    holds until the next of its line.
    """
    for value in values:
        is_meant = True
        for piece in value.lower().split(","):
            name, colon, rest = (part.strip() for part in piece.partition(":"))
            if (
                colon and name not in VALUED and " " not in name
            ):  # a date behind a comma is no agent
                is_meant, name = name in ("*", AGENT), rest
            if is_meant and name in FORBIDDING:
                return True
    return False


def connect(origin: Origin, rules: Rules, deadline: float) -> http.client.HTTPConnection:
    """Resolve, check every address, and connect to one that was checked."""
    scheme, host, port = origin
    if hosts.is_silent(origin):
        raise FetchError(
            "unreachable",
            f"{MAX_FAILED_CONNECTIONS} connections to {host} failed in a row: left alone for "
            f"{FAILURE_S} s",
            True,
        )
    addresses = proxy_addresses(origin, rules) if rules.proxy else checked_addresses(origin, rules)
    way_port = urlsplit(rules.proxy).port or 80 if rules.proxy else port
    try:
        sock = dial(addresses, way_port, deadline)
    except OSError:
        hosts.connected(origin, False)
        raise
    hosts.connected(origin, True)
    if rules.proxy and scheme == "https":
        with reaped_at(deadline, sock):
            open_tunnel(sock, origin)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if scheme == "https":
        with reaped_at(deadline, sock):
            sock = tls().wrap_socket(sock, server_hostname=host)
    connection = http.client.HTTPConnection(host, port)
    connection.response_class = Response
    connection.sock = sock
    connection.auto_open = 0  # never reconnect behind the check's back
    return connection


def checked_addresses(origin: Origin, rules: Rules) -> list[str]:
    """Return a host's addresses; raises FetchError where one of them may not be asked."""
    _, host, port = origin
    try:
        address_infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        hosts.connected(origin, False)
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
    """Return the proxy's addresses; raises FetchError for a host that is a reserved address in any
    notation, or `localhost`.
    """
    _, host, port = origin
    try:  # no name is resolved by this
        literal = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        literal = []
    name = host.lower().rstrip(".")
    is_private = name == "localhost" or name.endswith(".localhost")
    is_private = is_private or any(not is_public(str(entry[4][0])) for entry in literal)
    if is_private and not rules.allow_private:
        raise FetchError("host_refused", f"{host} is a private, loopback or reserved address")
    way = urlsplit(rules.proxy)
    try:
        address_infos = socket.getaddrinfo(way.hostname, way.port or 80, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise FetchError("unreachable", f"proxy {rules.proxy}: {error.strerror}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in address_infos))


def open_tunnel(sock: socket.socket, origin: Origin) -> None:
    """Ask the proxy at the other end for a connection to a host (RFC 9110, 9.3.6)."""
    authority = base_of(origin).partition("://")[2]
    sock.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
    answer = Response(sock, method="CONNECT")
    answer.begin()
    if answer.status != 200:
        sock.close()
        raise FetchError("unreachable", f"the proxy answered CONNECT with HTTP {answer.status}")


def dial(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that answers; one that is silent leaves time for the others."""
    for position, address in enumerate(addresses):
        remaining = left(deadline)
        try:
            return socket.create_connection(
                (address, port), timeout=remaining / (len(addresses) - position)
            )
        except OSError:
            if position == len(addresses) - 1:
                raise
    raise FetchError("unreachable", "the name has no address")


def is_public(address: str) -> bool:
    """Whether an address lies in the open internet; an IPv4 address wrapped in IPv6 (mapped, 6to4,
    NAT64, Teredo) is judged itself.
    """
    address_value = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(address_value, ipaddress.IPv6Address):
        wrapped = [
            address_value.ipv4_mapped,
            address_value.sixtofour,
            *(address_value.teredo or ()),
        ]
        if address_value.is_site_local or address_value in ipaddress.ip_network(
            "64:ff9b:1::/48"
        ):  # fec0::/10; NAT64 for local use (RFC 8215)
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


def look_at(body: bytes, rules: Rules) -> None:
    """Judge an image by its header and its end; raises FetchError.

    It is decoded only where it lacks its end: OpenCV decodes half an image without complaint.
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
    if min(width, height) and rules.grown_px**2 * max(width, height) > rules.max_pixels * min(
        width, height
    ):
        raise FetchError(
            "too_large",
            f"{width} x {height} pixels would be over {rules.max_pixels:,} at {rules.grown_px} on "
            "the shorter side",
        )
    if not is_whole(header.kind, body):
        raise FetchError("decode_error", f"truncated {header.kind} of {len(body):,} bytes")


hosts = Hosts()
_local = threading.local()
_open_sockets: dict[int, tuple[float, socket.socket]] = {}
_reaper_lock = threading.Lock()


def connections() -> dict[tuple[Origin, bool, str], http.client.HTTPConnection]:
    """This thread's idle connections."""
    if not hasattr(_local, "connections"):
        _local.connections = {}
    pool: dict[tuple[Origin, bool, str], http.client.HTTPConnection] = _local.connections
    while len(pool) > 4:
        pool.pop(next(iter(pool))).close()
    return pool


def tls() -> ssl.SSLContext:
    """This thread's TLS settings: the system's certificates, checked."""
    if not hasattr(_local, "tls"):
        _local.tls = ssl.create_default_context()
    context: ssl.SSLContext = _local.tls
    return context


def left(deadline: float) -> float:
    """Return the seconds until the deadline; raises TimeoutError behind it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class reaped_at:  # noqa: N801 (reads as a statement: with reaped_at(deadline, sock))
    """Context manager: shuts the socket down at the deadline, whatever its peer drips until then
    (headers and TLS included).
    """

    def __init__(self, deadline: float, sock: socket.socket) -> None:
        self.deadline, self.sock = deadline, sock

    def __enter__(self) -> None:
        start_reaper()
        _open_sockets[id(self)] = (self.deadline, self.sock)

    def __exit__(self, *_: object) -> None:
        _open_sockets.pop(id(self), None)


def start_reaper() -> None:
    """Start the one thread that shuts overdue sockets, if it does not run yet."""
    with _reaper_lock:
        if not any(thread.name == "reaper" for thread in threading.enumerate()):
            threading.Thread(target=reap, name="reaper", daemon=True).start()


def reap() -> None:
    """Shut overdue sockets for as long as the process lives."""
    while True:
        time.sleep(0.25)
        now = time.monotonic()
        for deadline, sock in list(_open_sockets.values()):
            if now >= deadline:
                with contextlib.suppress(OSError):  # closed already
                    sock.shutdown(socket.SHUT_RDWR)

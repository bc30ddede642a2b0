"""The canonical form of an http or https URL, in which all parts of unclip compare, request, record
and print URLs.

Parses as browsers do (WHATWG URL Standard): letter case, backslashes, tabs and newlines, IDNA,
IPv4 in any notation, default ports, dot segments. Then normalises percent escapes (RFC 3986,
6.2.2) and leaves out user, fragment and the final dot of the host. Needs no network.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

import idna
import pyarrow as pa
import pyarrow.compute as pc

PORTS = {"http": 80, "https": 443}
PATH_SAFE = "/%:@!$&'()*+,;=~"
QUERY_SAFE = "/%:@!$&'()*+,;=?~"
MAX_PORT = 65535
UNREADABLE_HOST = "the host is not a name or an IP address"

_ENDS = "".join(map(chr, range(33)))
_IGNORED = {ord(character): None for character in "\t\n\r"}
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_ESCAPE = re.compile(r"%([0-9a-fA-F]{2})")
_STRAY_PERCENT = re.compile(r"%(?![0-9a-fA-F]{2})")
_PORT = re.compile(r"0*[0-9]{1,5}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_FORBIDDEN_IN_HOST = re.compile(r"[\x00-\x20\x7f#/:<>?@\[\\\]^|%]")
_IPV4_NUMBER = re.compile(
    r"0[xX](?P<hex>[0-9a-fA-F]*)|0(?P<octal>[0-7]+)|(?P<decimal>0|[1-9][0-9]*)"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_USER = re.compile(r"(https?:[/\\]*|[a-z][a-z0-9+.-]*:[/\\]{2,})[^\s/\\?#]*@", re.IGNORECASE)
_UP_TO_AT = re.compile(r"(https?:[/\\]*).*@", re.IGNORECASE | re.DOTALL)
_SEGMENT = r"(?:[A-Za-z0-9_~!$&'()*+,;=:@-][A-Za-z0-9._~!$&'()*+,;=:@-]*)?"
_QUERY = r"(?:\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]+)?"
PLAIN = rf"https?://(?:[a-z0-9_-]+\.)*[a-z_-][a-z0-9_-]*(?:/{_SEGMENT})+{_QUERY}"
"""Regular expression (Python's and RE2's) for canonical URLs without port and escapes, which need
no parsing; nearly all URLs of a usual list match it."""
_PLAIN = re.compile(PLAIN)


class SchemeError(ValueError):
    """A text is not an http or https URL."""


@dataclass(frozen=True)
class Url:
    """A parsed URL: `str` of it is the canonical form."""

    scheme: str
    host: str
    """In lower-case ASCII, without brackets and final dot."""
    port: int
    target: str
    """Path and query, as they are sent in a request."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


def parse_url(url: str) -> Url:
    """Parse an http or https URL as browsers do.

    Raises SchemeError for other texts and ValueError for an invalid host or port. The messages hold
    no part of the URL, which may contain a password.
    """
    scheme, colon, rest = _cleaned(url).partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in PORTS:
        raise SchemeError("only http and https URLs are read")
    hierarchy, question, query = rest.partition("#")[0].partition("?")
    authority, _, path = hierarchy.replace("\\", "/").lstrip("/").partition("/")
    host, port = _host_and_port(authority.rpartition("@")[2])
    query = f"?{escaped(query, QUERY_SAFE)}" if question and query else ""
    target = without_dots(escaped(path, PATH_SAFE)) + query
    return Url(scheme, host, PORTS[scheme] if port is None else port, target)


def canonical_url(url: str) -> str:
    """Return the canonical form of an http or https URL. Raises ValueError as `parse_url` does."""
    return url if _PLAIN.fullmatch(url) else str(parse_url(url))


def canonical_origin(text: str) -> str:
    """Return the canonical form of a URL; any other text as it is, but without user and password.

    Never raises: a URL that cannot be parsed is reported where it is requested.
    """
    if not text or _PLAIN.fullmatch(text):
        return text
    try:
        return str(parse_url(text))
    except ValueError:
        cleaned = _cleaned(text)  # of an invalid URL it is unclear where a password ends
        return (
            _UP_TO_AT.sub(r"\1[...]", cleaned) if _UP_TO_AT.match(cleaned) else without_user(text)
        )


def without_user(text: str) -> str:
    """Return a text, such as a line of a list, without the user and password of its URLs."""
    return _USER.sub(r"\1", text)


def canonical_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of origins (strings) in canonical form (`canonical_origin`)."""
    is_odd = pc.and_(
        pc.match_substring_regex(column, r"(?i)^[\x00-\x20]*h[\t\r\n]*t"),
        pc.invert(pc.match_substring_regex(column, rf"^{PLAIN}$")),
    )
    is_odd = pc.fill_null(is_odd, False)
    if not pc.any(is_odd).as_py():
        return column
    changed = pa.array([canonical_origin(text) for text in column.filter(is_odd).to_pylist()])
    return pc.replace_with_mask(column, is_odd.combine_chunks(), changed.cast(column.type))


def redirect_target(base: str, location: str) -> str:
    """Return the URL that a Location header names, relative to the canonical URL of its response.

    The result is not checked: `parse_url` does that.
    """
    text = _cleaned(location)
    scheme, _, rest = base.partition("://")
    named = _SCHEME.match(text)
    if named:
        after = text[named.end() :]
        if named[1].lower() != scheme or after[:2].replace("\\", "/") == "//":
            return text
        text = after  # `http:a` is relative to an http URL, as `a` is
    hierarchy = re.split(r"[?#]", text)[0].replace("\\", "/")
    host, _, target = rest.partition("/")
    path = target.partition("?")[0]
    if hierarchy.startswith("//"):
        return f"{scheme}:{text}"
    if hierarchy.startswith("/"):
        path = ""
    elif hierarchy:
        path = f"/{path.rpartition('/')[0]}/"
    else:
        path = f"/{path if text.startswith('?') else target}"
    return f"{scheme}://{host}{path}{text}"


def ascii_host(host: str) -> str:
    """Return a host as it is looked up: lower-case ASCII (UTS 46), an IP address in its usual form,
    without brackets and final dot. Raises ValueError if it is not a host.
    """
    if host.startswith("["):
        return _ipv6(host)
    try:
        name = idna.uts46_remap(unquote(host, errors="replace"), std3_rules=False)
        labels = name.removesuffix(".").split(".")
        labels = [
            label if label.isascii() else "xn--" + label.encode("punycode").decode()
            for label in labels
        ]
    except UnicodeError:
        raise ValueError(UNREADABLE_HOST) from None
    if not all(labels) or any(map(_FORBIDDEN_IN_HOST.search, labels)):
        raise ValueError(UNREADABLE_HOST)
    is_number = labels[-1].isdecimal() or re.fullmatch(r"0[xX][0-9a-fA-F]*", labels[-1])
    return _ipv4(labels) if is_number else ".".join(labels)


def escaped(text: str, safe: str) -> str:
    """Return a part of a URL in ASCII: `safe` and unreserved characters stand for themselves, all
    others are escaped with upper-case digits.
    """
    if "%" in text:
        text = _ESCAPE.sub(_unescaped, _STRAY_PERCENT.sub("%25", text))
    return quote(text, safe=safe)


def without_dots(path: str) -> str:
    """Return an absolute path for one without the first slash; resolve segments `.` and `..`."""
    if "." not in path:
        return f"/{path}"
    segments: list[str] = []
    parts = path.split("/")
    for part in parts:
        if part == "..":
            del segments[-1:]
        elif part != ".":
            segments.append(part)
    if parts[-1] in (".", ".."):
        segments.append("")
    return f"/{'/'.join(segments)}"


def _cleaned(text: str) -> str:
    """Return a text without what URL parsers ignore: outer spaces, tabs and line ends."""
    return _SURROGATES.sub("\ufffd", text).strip(_ENDS).translate(_IGNORED)


def _unescaped(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if _UNRESERVED.fullmatch(character) else escape[0].upper()


def _host_and_port(text: str) -> tuple[str, int | None]:
    """Return the host and the port, None without one. Raises ValueError if one is invalid."""
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        host += bracket
        if rest and not rest.startswith(":"):
            raise ValueError(UNREADABLE_HOST)
        port = rest.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if not host:
        raise ValueError("the URL has no host")
    if not port:
        return ascii_host(host), None
    if not _PORT.fullmatch(port) or int(port) > MAX_PORT:
        raise ValueError(f"the port is not a number up to {MAX_PORT}")
    return ascii_host(host), int(port)


def _ipv6(text: str) -> str:
    if not text.endswith("]") or "%" in text:
        raise ValueError(UNREADABLE_HOST)
    try:
        address = ipaddress.IPv6Address(text[1:-1])
    except ValueError:
        raise ValueError(UNREADABLE_HOST) from None
    mapped = address.ipv4_mapped  # Python 3.13 writes these in another way
    if mapped is not None:
        return f"::ffff:{int(mapped) >> 16:x}:{int(mapped) & 0xFFFF:x}"
    return str(address)


def _ipv4(labels: list[str]) -> str:
    """Return a decimal, octal or hexadecimal IPv4 address of one to four parts as four decimals."""
    matches = [_IPV4_NUMBER.fullmatch(label) for label in labels]
    numbers = [
        int(match["hex"] or "0", 16)
        if match["hex"] is not None
        else int(match["octal"], 8)
        if match["octal"]
        else int(match["decimal"])
        for match in matches
        if match and len(match[0]) <= 64
    ]
    is_valid = len(numbers) == len(labels) <= 4 and all(number < 256 for number in numbers[:-1])
    if not is_valid or numbers[-1] >= 256 ** (5 - len(numbers)):
        raise ValueError("the host is not a valid IPv4 address")
    upper = sum(number << 8 * (3 - position) for position, number in enumerate(numbers[:-1]))
    return str(ipaddress.IPv4Address(upper + numbers[-1]))

"""Normalise URLs that can be written in several ways: international host names, case, default
ports, percent escapes.

Works on strings only, without network access.
"""

import ipaddress
import re
import unicodedata
from urllib.parse import quote, urlsplit

PORTS = {"http": 80, "https": 443}
PATH_SAFE = "/%:@!$&'()*+,;=~"
QUERY_SAFE = "/%:@!$&'()*+,;=?~"
LABEL = re.compile(r"[a-z0-9_-]{1,63}")
ESCAPE = re.compile(r"%[0-9a-fA-F]{2}")


def ascii_hosts(host: str) -> frozenset[str]:
    """Return a host name in lower-case ASCII (`xn--bcher-kva.de`), without a final dot.

    There are two results if the two standards for international names differ (`straße.de`): IDNA
    2003, which is used for look-ups here, and IDNA 2008, which browsers use. A text that is not a
    host name is returned unchanged.
    """
    name = unicodedata.normalize("NFKC", host).lower().rstrip(".")
    try:
        return frozenset((str(ipaddress.ip_address(name)),))
    except ValueError:
        pass
    if name.isascii():
        return frozenset((name,))
    labels = unicodedata.normalize("NFC", host).lower().replace("。", ".").rstrip(".").split(".")
    by_2008 = ".".join(
        label if label.isascii() else "xn--" + label.encode("punycode").decode() for label in labels
    )
    try:
        return frozenset((name.encode("idna").decode(), by_2008))
    except UnicodeError:
        return frozenset((by_2008,))


def is_host_name(name: str) -> bool:
    """Return whether a result of `ascii_hosts` is a valid host name or an IP address."""
    is_name = ":" in name or all(LABEL.fullmatch(label) for label in name.split("."))
    return is_name and len(name) <= 253


def spellings(url: str) -> frozenset[str]:
    """Return an http or https URL in normal form, one for each result of `ascii_hosts`.

    User, fragment and default port are removed; an empty path becomes `/`. Raises ValueError if it
    is not an http or https URL with a host.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not an http or https URL with a host")
    port = "" if parts.port in (None, PORTS[parts.scheme]) else f":{parts.port}"
    target = ESCAPE.sub(lambda escape: escape[0].upper(), request_target(parts.path, parts.query))
    return frozenset(
        f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{target}"
        for host in ascii_hosts(parts.hostname)
    )


def request_target(path: str, query: str) -> str:
    """Return path and query of a URL as they are sent in a request, in ASCII."""
    target = quote(path or "/", safe=PATH_SAFE)
    return f"{target}?{quote(query, safe=QUERY_SAFE)}" if query else target

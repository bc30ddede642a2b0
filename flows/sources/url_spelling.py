"""One spelling for a URL that can be written in several: international host names, case, default
ports, escapes.

Works on strings; asks no network.
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

    There are two results where the two standards of international names differ (`straße.de`): IDNA
    2003, by which names are looked up here, and IDNA 2008, by which browsers do. What is no host
    name is returned as it is.
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
    """Say whether a name of `ascii_hosts` may be that of a host, or is an address."""
    is_name = ":" in name or all(LABEL.fullmatch(label) for label in name.split("."))
    return is_name and len(name) <= 253


def spellings(url: str) -> frozenset[str]:
    """Return an http or https URL in its normal spelling, one for each of `ascii_hosts`.

    Without user, fragment and default port; an empty path is `/`. Raises ValueError for what is no
    such URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is no http or https URL with a host")
    port = "" if parts.port in (None, PORTS[parts.scheme]) else f":{parts.port}"
    target = ESCAPE.sub(lambda escape: escape[0].upper(), request_target(parts.path, parts.query))
    return frozenset(
        f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{target}"
        for host in ascii_hosts(parts.hostname)
    )


def request_target(path: str, query: str) -> str:
    """Return path and query of a URL as a request names them, in ASCII."""
    target = quote(path or "/", safe=PATH_SAFE)
    return f"{target}?{quote(query, safe=QUERY_SAFE)}" if query else target

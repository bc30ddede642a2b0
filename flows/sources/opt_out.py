"""Opt-out lists: hosts and URLs that are never requested.

Text files on any fsspec path, one entry per line; `#` starts a comment. `example.org` matches the
host and its subdomains, `example.org:8080` only that port of them. An entry with a path matches
that URL and, if it ends in `/`, all URLs below it; without a scheme it matches http and https.
Entries and URLs are compared in canonical form. Any other entry is an error.
"""

import hashlib
import ipaddress
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import fsspec

from flows.sources.caption_text import decode_text
from infra.canonical_url import PORTS, Url, parse_url, without_user
from infra.errors import CallerError

MAX_LIST_BYTES = 256 << 20
LABEL = re.compile(r"[a-z0-9_-]{1,63}")


@dataclass(frozen=True)
class OptOut:
    """The entries of all lists, in canonical form."""

    hosts: frozenset[str] = frozenset()
    """`example.org` or `example.org:8080`."""
    urls: frozenset[str] = frozenset()

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """The URLs that end in `/` and match all URLs below them."""
        return tuple(url for url in self.urls if url.endswith("/"))

    def covers(self, url: str) -> bool:
        """Return whether an entry matches this URL or its host."""
        if not self.hosts and not self.urls:
            return False
        try:
            parsed = parse_url(url)
        except ValueError:
            return False  # it is never requested: the download reports it
        text = str(parsed)
        return (
            any(
                domain in self.hosts or f"{domain}:{parsed.port}" in self.hosts
                for domain in _domains(parsed.host)
            )
            or text in self.urls
            or text.startswith(self.prefixes)
        )


def _domains(host: str) -> list[str]:
    """Return a host name and all its parent domains."""
    labels = host.split(".")
    return [".".join(labels[start:]) for start in range(len(labels))]


NO_OPT_OUT = OptOut()


def read_opt_out(paths: Sequence[str]) -> OptOut:
    """Read the lists.

    Raises CallerError if a list cannot be read or an entry is invalid, because skipping an entry
    would ignore somebody's opt-out.
    """
    hosts: set[str] = set()
    urls: set[str] = set()
    for path in paths:
        for number, line in enumerate(_text(path).splitlines(), 1):
            entry = line.partition("#")[0].strip()
            if not entry:
                continue
            try:
                more_hosts, more_urls = parse_entry(entry)
            except ValueError:
                raise CallerError(
                    f"[data] opt_out {without_user(path)!r} line {number}: "
                    f"{without_user(entry)[:80]!r} is neither a host "
                    "nor a URL: write example.org or https://example.org/path/"
                ) from None
            hosts |= more_hosts
            urls |= more_urls
    return OptOut(frozenset(hosts), frozenset(urls))


def parse_entry(entry: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the hosts and the URLs of an entry. Raises ValueError if it is invalid."""
    if any(character.isspace() for character in entry):
        raise ValueError("an entry has no spaces")
    has_scheme = "://" in entry
    bare = entry.partition("://")[2] if has_scheme else entry.removeprefix("*.").lstrip(".")
    parsed = [
        parse_url(url) for url in ([entry] if has_scheme else [f"{s}://{bare}" for s in PORTS])
    ]
    host, target = parsed[0].host, parsed[0].target
    if (
        "@" in re.split(r"[/\\?]", bare)[0]
        or bare.startswith(("/", "\\"))
        or not _is_host_name(host)
    ):
        raise ValueError("it has no valid host, or it is a mail address")
    hosts = {host, _by_idna_2003(host)}
    if not has_scheme and target == "/":
        is_port_given = len({url.port for url in parsed}) == 1  # else they are http's and https's
        port = f":{parsed[0].port}" if is_port_given else ""
        return frozenset(name + port for name in hosts), frozenset()
    if not has_scheme and (_is_address(host) or "." not in host):
        raise ValueError("an IP network or a single word is not a URL")
    return frozenset(), frozenset(
        str(Url(url.scheme, name, url.port, url.target)) for url in parsed for name in hosts
    )


def _is_host_name(host: str) -> bool:
    is_name = ":" in host or all(LABEL.fullmatch(label) for label in host.split("."))
    return is_name and len(host) <= 253


def _by_idna_2003(host: str) -> str:
    """Return a canonical host as older software looks it up: `strasse.de` for `straße.de`."""
    if "xn--" not in host:
        return host
    try:
        labels = [
            label[4:].encode().decode("punycode") if label.startswith("xn--") else label
            for label in host.split(".")
        ]
        return ".".join(labels).encode("idna").decode().lower()
    except UnicodeError:
        return host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def save(lists: OptOut, file: Path) -> None:
    """Write the entries to a JSON file, for the download tasks."""
    file.write_text(json.dumps({"hosts": sorted(lists.hosts), "urls": sorted(lists.urls)}))


@lru_cache(maxsize=1)
def load(file: Path) -> OptOut:
    """Read the entries that `save` wrote."""
    entries = json.loads(file.read_text())
    return OptOut(frozenset(entries["hosts"]), frozenset(entries["urls"]))


def hash_of_lists(paths: Sequence[str]) -> str:
    """Return a hash of the lists' contents (16 hex digits)."""
    return hashlib.sha256("\n".join(_text(path) for path in paths).encode()).hexdigest()[:16]


def _text(path: str) -> str:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            data = file.read(MAX_LIST_BYTES + 1)
        if len(data) > MAX_LIST_BYTES:
            raise ValueError(f"it has more than {MAX_LIST_BYTES >> 20} MiB: divide it")
        return decode_text(data)
    except (OSError, ValueError, EOFError, zlib.error, ImportError) as error:
        raise CallerError(
            f"[data] opt_out {without_user(path)!r} cannot be read: {without_user(str(error))}"
        ) from error

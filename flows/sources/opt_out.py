"""Opt-out lists: hosts and URLs that are never requested.

Text files on any fsspec path, one entry per line; `#` starts a comment. `example.org` matches the
host and its subdomains, `example.org:8080` only that port of them. An entry with a path matches
that URL and, if it ends in `/`, all URLs below it; without a scheme it matches http and https.
International names match in every spelling. Any other entry is an error.
"""

import hashlib
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from flows.sources.caption_text import decode_text
from flows.sources.url_spelling import PORTS, ascii_hosts, is_host_name, spellings
from infra.errors import CallerError


@dataclass(frozen=True)
class OptOut:
    """The entries of all lists, in the spelling of `flows.sources.url_spelling`."""

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
            parts = urlsplit(url)
            port = parts.port or PORTS[parts.scheme]
            names, urls = ascii_hosts(parts.hostname or ""), spellings(url)
        except (ValueError, KeyError):
            return False  # not a valid URL: the download reports it
        return any(
            domain in self.hosts or f"{domain}:{port}" in self.hosts
            for name in names
            for domain in _domains(name)
        ) or any(one in self.urls or one.startswith(self.prefixes) for one in urls)


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
                    f"[data] opt_out {path!r} line {number}: {entry[:80]!r} is neither a host "
                    "nor a URL: write example.org or https://example.org/path/"
                ) from None
            hosts |= more_hosts
            urls |= more_urls
    return OptOut(frozenset(hosts), frozenset(urls))


def parse_entry(entry: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the hosts and the URLs of an entry. Raises ValueError if it is invalid."""
    if any(character.isspace() for character in entry):
        raise ValueError("an entry has no spaces")
    bare = entry if "://" in entry else "//" + entry.removeprefix("*.").lstrip(".")
    parts = urlsplit(bare)
    names = ascii_hosts(parts.hostname or "")
    if not all(is_host_name(name) for name in names) or "@" in parts.netloc:
        raise ValueError("it has no valid host, or it is a mail address")
    if parts.scheme:
        return frozenset(), spellings(entry)
    if parts.path in ("", "/") and not parts.query:
        port = f":{parts.port}" if parts.port else ""
        return frozenset(name + port for name in names), frozenset()
    if any(_is_address(name) or "." not in name for name in names):
        raise ValueError("an IP network or a single word is not a URL")
    return frozenset(), frozenset().union(*(spellings(f"{scheme}:{bare}") for scheme in PORTS))


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
            return decode_text(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise CallerError(f"[data] opt_out {path!r} cannot be read: {error}") from error

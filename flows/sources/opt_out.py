"""Opt-out lists: hosts and URLs that are never requested.

Text files on any fsspec path, one entry per line, `#` starts a comment. `example.org` matches the
host and everything below it; an entry with `://` matches that URL and, if it ends in `/`,
everything below it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from infra.errors import CallerError


@dataclass(frozen=True)
class OptOut:
    """The entries of all lists."""

    hosts: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """Those URLs that stand for all below them too."""
        return tuple(url for url in self.urls if url.endswith("/"))

    def covers(self, url: str) -> bool:
        """Say whether somebody does not want this URL to be used."""
        if not self.hosts and not self.urls:
            return False
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False  # no URL at all: the download says so
        labels = host.split(".")
        above = (".".join(labels[start:]) for start in range(len(labels)))
        return (
            any(domain in self.hosts for domain in above)
            or url in self.urls
            or url.startswith(self.prefixes)
        )


NOBODY = OptOut()


def read_opt_out(paths: Sequence[str]) -> OptOut:
    """Read the lists. Raises CallerError for one that cannot be read: to go on without it would be
    to ignore it.
    """
    entries = [
        line.partition("#")[0].strip() for path in paths for line in _text(path).splitlines()
    ]
    urls = frozenset(entry for entry in entries if "://" in entry)
    hosts = frozenset(entry.lower().strip(".") for entry in entries if entry and "://" not in entry)
    return OptOut(hosts, urls)


def save(lists: OptOut, file: Path) -> None:
    """Write the entries for the download tasks."""
    file.write_text(json.dumps({"hosts": sorted(lists.hosts), "urls": sorted(lists.urls)}))


@lru_cache(maxsize=1)
def load(file: Path) -> OptOut:
    """Return what `save` wrote."""
    entries = json.loads(file.read_text())
    return OptOut(frozenset(entries["hosts"]), frozenset(entries["urls"]))


def content_of_lists(paths: Sequence[str]) -> str:
    """Return a hash of what the lists say."""
    return hashlib.sha256("\n".join(_text(path) for path in paths).encode()).hexdigest()[:16]


def _text(path: str) -> str:
    try:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            return str(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise CallerError(f"[data] opt_out {path!r} cannot be read: {error}") from error

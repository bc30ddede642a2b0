"""The removal log, `ROOT/removals/<time>-<id>.json`: what was taken down, for all later queries and
runs.

One small file per take-down, never rewritten, so that writers cannot lose each other's entries on
any store. An entry names samples by key, by origin, by the SHA-256 of the stored image (list
`sha256`) and, if it is known, by that of the download (list `downloads`). Knows nothing of shards,
embeddings and indexes.
"""

import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.canonical_url import canonical_origin
from infra.errors import DataError
from infra.schemas import DOWNLOAD_SHA256, STORED_SHA256
from infra.storage import store
from infra.storage.store import Root

FOLDER = "removals"
LISTS = {
    "keys": "keys",
    "origins": "origins",
    "stored_sha256": "sha256",
    "download_sha256": "downloads",
}
"""The fields of `Removals`, and the list of an entry's file that holds each."""
COLUMNS = {
    "keys": "key",
    "origins": "origin",
    "stored_sha256": STORED_SHA256,
    "download_sha256": DOWNLOAD_SHA256,
}
"""The fields of `Removals`, and the column that each is compared with."""
COMPARED = (*COLUMNS.items(), ("origins", "url"))
"""In a table of URLs to download, an origin may also be the URL."""
REQUIRED = ("keys", "origins", "sha256")
MEND = "repair it, or take the samples down again and delete it"
ENTRY_BYTES = 1 << 30
"""Largest entry that is read: four million samples."""


@dataclass(frozen=True)
class Removals:
    """Everything that the log names."""

    keys: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    stored_sha256: frozenset[str] = frozenset()
    download_sha256: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.keys or self.origins or self.stored_sha256 or self.download_sha256)

    def __or__(self, other: "Removals") -> "Removals":
        return Removals(*(getattr(self, name) | getattr(other, name) for name in LISTS))

    def __and__(self, other: "Removals") -> "Removals":
        return Removals(*(getattr(self, name) & getattr(other, name) for name in LISTS))

    def __sub__(self, other: "Removals") -> "Removals":
        return Removals(*(getattr(self, name) - getattr(other, name) for name in LISTS))

    def lists(self) -> dict[str, list[str]]:
        """Return the lists of a log entry that names all of it."""
        return {in_file: sorted(getattr(self, name)) for name, in_file in LISTS.items()}

    def texts(self) -> frozenset[str]:
        """Return all keys, origins and digests together."""
        return self.keys | self.origins | self.digests()

    def digests(self) -> frozenset[str]:
        """Return the digests of stored images and of downloads together."""
        return self.stored_sha256 | self.download_sha256

    def has(self, row: Mapping[str, Any]) -> bool:
        """Return whether a sample, a row of schema KEEP or a part of one, was taken down."""
        return any(
            row.get(column) in getattr(self, name)
            for name, column in COLUMNS.items()
            if column in row
        )

    def mask(self, columns: Mapping[str, pa.ChunkedArray]) -> pa.ChunkedArray:
        """Return which rows were taken down.

        `columns` are some of those in `COMPARED`, by name, at least one.
        """
        entries = [
            pc.is_in(columns[column], pa.array(sorted(getattr(self, name)), pa.string()))
            for name, column in COMPARED
            if column in columns
        ]
        mask = entries[0]
        for entry in entries[1:]:
            mask = pc.or_(mask, entry)
        return mask


def write_removal(root: Root, entry: Mapping[str, Any], time: str) -> str:
    """Append an entry and return its name.

    It has the lists `keys`, `origins` and `sha256`, optionally `downloads`, and any other fields.
    """
    assert entry.keys() >= set(REQUIRED)
    name = f"{time.replace(':', '').replace('-', '').replace('.', '')}-{secrets.token_hex(4)}"
    store.write_json(root, f"{FOLDER}/{name}.json", {**entry, "time": time})
    return name


def read_entries(root: Root) -> list[dict[str, Any]]:
    """Return all entries, the oldest first.

    Raises DataError for an entry that cannot be read, because what it names must not come back.
    """
    return [read_entry(root, name) for name in entry_names(root)]


def entry_names(root: Root) -> list[str]:
    """Return the names of the log's files, the oldest first. Other things below FOLDER, such as
    FIFOs, are no entries.
    """
    names = [name for name in store.list_names(root, FOLDER) if name.endswith(".json")]
    if root.folder is None or not names:
        return names
    with os.scandir(root.folder / FOLDER) as entries:
        files = {entry.name for entry in entries if entry.is_file()}
    return [name for name in names if name in files]


def read_entry(root: Root, name: str) -> dict[str, Any]:
    """Return the entry in a file of the log. Raises DataError as `read_entries` does."""
    entry = store.read_json(root, f"{FOLDER}/{name}", ENTRY_BYTES, MEND)
    if not isinstance(entry, dict) or any(
        not _is_texts(entry.get(name, None if name in REQUIRED else [])) for name in LISTS.values()
    ):
        raise DataError(f"{root.uri}/{FOLDER}/{name} is not an entry of the removal log: {MEND}")
    return entry


def read_removals(root: Root) -> Removals:
    """Return everything that the log names. Raises DataError as `read_entries` does."""
    return gather(read_entries(root))


def gather(entries: Iterable[Mapping[str, Any]]) -> Removals:
    """Return everything that some entries name; origins also in canonical form, in which new
    tables hold them.
    """
    listed = list(entries)
    keys, origins, stored, downloads = (
        frozenset(text for entry in listed for text in entry.get(in_file, ()))
        for in_file in LISTS.values()
    )
    return Removals(keys, origins | set(map(canonical_origin, origins)), stored, downloads)


def union(removals: Iterable[Removals]) -> Removals:
    """Return everything that any of the removals names; linear in their number, unlike `|`."""
    parts = list(removals)
    return Removals(
        *(frozenset().union(*(getattr(part, name) for part in parts)) for name in LISTS)
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)

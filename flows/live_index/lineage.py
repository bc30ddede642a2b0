"""The living index of a run, opened from ROOT: the run's own index, what was added to it, and what the removal log takes out.

Manifests say which CLIP made which vectors: the digest of the clip folder is the fingerprint, and folders of another are refused.
"""

import time
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import compress
from operator import not_, or_
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from flows.runs.records import committed_of, find_run
from infra.errors import CallerError
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.removal_log import (
    FOLDER,
    Removals,
    entry_names,
    gather,
    read_entry,
    read_removals,
)
from infra.storage.store import Root

if TYPE_CHECKING:
    from indexing.ann.view import Segment, View

ADDITIONS = "additions"
GRAIN_NS = 50_000_000
"""A folder changed less than this ago may change again without its time doing so."""
READERS = 8
"""Entries of a store's removal log that are read at a time."""


@dataclass(frozen=True)
class Lineage:
    """The committed folders behind a run's index, and the additions that the same CLIP made."""

    record: dict[str, Any]
    ingest: Committed
    clip: Committed
    index: Committed
    additions: tuple[Committed, ...]
    left_out: tuple[Committed, ...] = ()
    """Additions of another CLIP: their vectors mean nothing to this one."""

    @property
    def fingerprint(self) -> str:
        """The CLIP that made every vector of it."""
        return self.clip.digest


def lineage(root: Root, run: str | None) -> Lineage:
    """Return what a run's index is made of. Raises CallerError where the run has none, or its CLIP is not the one that made it."""
    record = find_run(root, run)
    ingest, clip, embed, index = (
        committed_of(root, record, stage) for stage in ("ingest", "clip", "embed", "index")
    )
    made_from = index.manifest["inputs"]["embed"], index.manifest["input_digests"]["embed"]
    stood = {
        (embed.key, digest) for digest in (embed.digest, *embed.manifest.get("compacted_from", ()))
    }  # compaction is under way
    if made_from not in stood or embed.manifest["input_digests"]["clip"] != clip.digest:
        raise CallerError(
            f"the index of run {record['name']} was made by another CLIP than the run's: run `unclip run {record['recipe']} "
            f"--root {root.uri}`"
        )
    added = additions(root)
    is_own = [each.manifest["clip_digest"] == clip.digest for each in added]
    return Lineage(
        record,
        ingest,
        clip,
        index,
        tuple(compress(added, is_own)),
        tuple(compress(added, map(not_, is_own))),
    )


def warnings(known: Lineage) -> list[str]:
    """Say, in a line each, which additions the run's index is searched without, and the mend."""
    return unsearched(known.left_out, known.clip)


def unsearched(added: Iterable[Committed], clip: Committed) -> list[str]:
    """Say, in a line each, which additions another CLIP than this embedded, and the mend."""
    return [
        f"additions/{each.key} ({each.manifest['counts']['out']:,} samples) is not searched: not clip/{clip.key} embedded it; "
        "add its pictures again with `unclip index add FOLDER`"
        for each in added
        if each.manifest["clip_digest"] != clip.digest
    ]


def additions(root: Root) -> list[Committed]:
    """Return the additions that count, whatever CLIP made them, the oldest first: none that another was merged from."""
    return [each for each, is_merged in _with_merged(root) if not is_merged]


def merged_away(root: Root) -> list[Committed]:
    """Return the additions that are there still though a merged one has taken their place."""
    return [each for each, is_merged in _with_merged(root) if is_merged]


def _with_merged(root: Root) -> list[tuple[Committed, bool]]:
    found = [
        each
        for key in store.list_names(root, ADDITIONS)
        if (each := manifests.find(root, ADDITIONS, key))
    ]
    # By content, which compaction may have changed since; the same pictures may be added again later.
    since = {
        digest: str(each.manifest["started"])
        for each in found
        for digest in each.manifest.get("merged_from", ())
    }
    ordered = sorted(found, key=lambda each: str(each.manifest["finished"]))
    return [
        (each, any(each.manifest["started"] < since.get(digest, "") for digest in _digests(each)))
        for each in ordered
    ]


def _digests(committed: Committed) -> list[str]:
    return [committed.digest, *committed.manifest.get("compacted_from", ())]


def open_segments(known: Lineage, opened: "Mapping[str, Segment] | None" = None) -> "list[Segment]":
    """Open the run's index and the additions to it; those that are among `opened`, by name, stay as they are."""
    from indexing.ann.index import Index
    from indexing.ann.view import Segment

    segments = []
    for vectors, pictures in (
        (known.index, known.ingest),
        *((each, each) for each in known.additions),
    ):
        name = " ".join(
            f"{each.stage}/{each.key}/{each.manifest['attempt']}" for each in (vectors, pictures)
        )
        before = opened.get(name) if opened else None
        segments.append(
            before or Segment(Index.open(vectors.local()), pictures.local() / "shards", name)
        )
    return segments


def open_view(root: Root, run: str | None) -> "tuple[View, Lineage]":
    """Open a run's index as it is now, without what was taken down."""
    from indexing.ann.view import View

    known = lineage(root, run)
    return View(open_segments(known), read_removals(root), known.fingerprint), known


def segments_stamp(root: Root, run: str | None) -> Hashable:
    """Return what changes whenever `open_segments` would open something else; without a name, of the run that the pointer names now."""
    known = lineage(root, run)
    folders = (known.ingest, known.clip, known.index, *known.additions, *known.left_out)
    return known.record["name"], *(
        (each.stage, each.key, each.manifest["attempt"]) for each in folders
    )


class SegmentsStamp:
    """Changes whenever `segments_stamp` does, and reads manifests only where a folder that holds some has changed."""

    def __init__(self, root: Root, run: str | None) -> None:
        self.root, self.run = root, run
        self._folders: Hashable = None
        self._stamp: Hashable = None

    def __call__(self) -> Hashable:
        """Return the stamp."""
        if self.root.folder is None:
            return segments_stamp(self.root, self.run)
        folders = tuple(
            _changed(self.root.folder / name)
            for name in ("", "runs", "ingest", "clip", "embed", "index", ADDITIONS)
        )
        if folders != self._folders:
            self._stamp = segments_stamp(self.root, self.run)
            self._folders = folders  # as they were before the manifests were read
        return self._stamp


class RemovalLog:
    """The removal log, whose entries are read once: they are never rewritten.

    `stamp` changes whenever the log does. A local log is looked at on every call; another store's by `look`, which takes its time.
    """

    def __init__(self, root: Root) -> None:
        """Look at the log."""
        self.root = root
        self._reading = Lock()
        self._known: dict[str, Removals] = {}
        self._all = Removals()
        self._listed: tuple[str, ...] = ()
        self._folder = None if root.folder is None else root.folder / FOLDER
        self.look()

    def look(self) -> None:
        """List the log where it is not local."""
        if self.root.folder is None:
            self._listed = tuple(entry_names(self.root))

    def stamp(self) -> Hashable:
        """Return the stamp."""
        return self._listed if self._folder is None else _changed(self._folder)

    def read(self) -> Removals:
        """Return everything that the log names. Raises DataError for an entry that does not read."""
        with self._reading:
            names = self._listed if self.root.folder is None else entry_names(self.root)
            new = [name for name in names if name not in self._known]
            with ThreadPoolExecutor(READERS) as pool:
                found = dict(
                    zip(
                        new,
                        pool.map(lambda name: gather([read_entry(self.root, name)]), new),
                        strict=True,
                    )
                )
            if self._known.keys() - set(names):  # somebody took an entry back
                found = {name: self._known[name] for name in names if name in self._known} | found
                self._known, self._all = {}, Removals()
            self._known |= found
            if found:
                self._all = reduce(or_, found.values(), self._all)
            return self._all


def _changed(folder: Path) -> Hashable:
    try:
        changed = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
    now = time.time_ns()
    return (changed, now) if now - changed < GRAIN_NS else changed

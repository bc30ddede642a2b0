"""The living index of a run, opened from ROOT: the run's own index, what was added to it, and what the removal log takes out.

Manifests say which CLIP made which vectors: the digest of the clip folder is the fingerprint, and folders of another are refused.
"""

import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.runs import committed_of, find_run
from infra import manifests, storage
from infra.errors import CallerError
from infra.manifests import Committed
from infra.removals import FOLDER, read_removals
from infra.storage import Root

if TYPE_CHECKING:
    from indexing.view import Segment, View

ADDITIONS = "additions"
GRAIN_NS = 50_000_000
"""A folder changed less than this ago may change again without its time doing so."""


@dataclass(frozen=True)
class Lineage:
    """The committed folders behind a run's index, and the additions that the same CLIP made."""

    record: dict[str, Any]
    ingest: Committed
    clip: Committed
    index: Committed
    additions: tuple[Committed, ...]

    @property
    def fingerprint(self) -> str:
        """The CLIP that made every vector of it."""
        return self.clip.digest


def lineage(root: Root, run: str | None) -> Lineage:
    """Return what a run's index is made of. Raises CallerError where the run has none, or its CLIP is not the one that made it."""
    record = find_run(root, run)
    ingest, clip, embed, index = (committed_of(root, record, stage) for stage in ("ingest", "clip", "embed", "index"))
    made_from = index.manifest["inputs"]["embed"], index.manifest["input_digests"]["embed"]
    if made_from != (embed.key, embed.digest) or embed.manifest["input_digests"]["clip"] != clip.digest:
        raise CallerError(
            f"the index of run {record['name']} was made by another CLIP than the run's: run `unclip run {record['recipe']} "
            f"--root {root.uri}`"
        )
    return Lineage(record, ingest, clip, index, tuple(each for each in additions(root) if each.manifest["clip_digest"] == clip.digest))


def additions(root: Root) -> list[Committed]:
    """Return all committed additions, whatever CLIP made them, the oldest first."""
    found = (manifests.find(root, ADDITIONS, key) for key in storage.list_names(root, ADDITIONS))
    return sorted((each for each in found if each), key=lambda each: str(each.manifest["finished"]))


def open_segments(known: Lineage) -> "list[Segment]":
    """Open the run's index and the additions to it."""
    from indexing.index import Index
    from indexing.view import Segment

    own = Segment(Index.open(known.index.local()), known.ingest.local() / "shards")
    folders = [each.local() for each in known.additions]
    return [own, *(Segment(Index.open(folder), folder / "shards") for folder in folders)]


def open_view(root: Root, run: str | None) -> "tuple[View, Lineage]":
    """Open a run's index as it is now, without what was taken down."""
    from indexing.view import View

    known = lineage(root, run)
    return View(open_segments(known), read_removals(root), known.fingerprint), known


def segments_stamp(root: Root, run: str) -> Hashable:
    """Return what changes whenever `open_segments` would open something else."""
    known = lineage(root, run)
    return tuple((each.stage, each.key, each.manifest["attempt"]) for each in (known.clip, known.index, *known.additions))


class SegmentsStamp:
    """Changes whenever `segments_stamp` does, and reads manifests only where a folder that holds some has changed."""

    def __init__(self, root: Root, run: str) -> None:
        self.root, self.run = root, run
        self._folders: Hashable = None
        self._stamp: Hashable = None

    def __call__(self) -> Hashable:
        """Return the stamp."""
        if self.root.folder is None:
            return segments_stamp(self.root, self.run)
        folders = tuple(_changed(self.root.folder / name) for name in ("", "runs", "ingest", "clip", "embed", "index", ADDITIONS))
        if folders != self._folders:
            self._stamp = segments_stamp(self.root, self.run)
            self._folders = folders  # as they were before the manifests were read
        return self._stamp


class RemovalsStamp:
    """Changes whenever the removal log does. A local log is looked at on every call; another store's by `look`, which takes its time."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._listed: Hashable = ()
        self.look()

    def look(self) -> None:
        """List the log where it is not local."""
        if self.root.folder is None:
            self._listed = tuple(storage.list_names(self.root, FOLDER))

    def __call__(self) -> Hashable:
        """Return the stamp."""
        if self.root.folder is None:
            return self._listed
        return _changed(self.root.folder / FOLDER)


def _changed(folder: Path) -> Hashable:
    try:
        changed = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
    now = time.time_ns()
    return (changed, now) if now - changed < GRAIN_NS else changed

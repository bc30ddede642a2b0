"""The live index of a run: its own index, the additions to it, and the removal log.

Reads ROOT and writes nothing. The digest of the clip folder is the fingerprint of the CLIP that
embedded the vectors; indexes and additions with another fingerprint are refused or left out.
"""

import time
import weakref
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress
from operator import not_
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from flows.runs.record_schema import RunRecord
from flows.runs.records import committed_of, find_run
from infra.errors import CallerError, CutFileError, DataError, StorageError
from infra.storage import manifests, store
from infra.storage.manifest_schema import MANIFEST, MANIFESTS
from infra.storage.manifests import Committed
from infra.storage.removal_log import (
    FOLDER,
    Removals,
    entry_names,
    gather,
    read_entry,
    read_removals,
    union,
)
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles
from infra.storage.store import Root

if TYPE_CHECKING:
    from indexing.ann.index import IndexConfig
    from indexing.ann.view import Segment, View

ADDITIONS = "additions"
GRAIN_NS = 50_000_000
"""Resolution of modification times: a folder changed more recently may change again unnoticed."""
READERS = 8
"""Number of removal log entries read concurrently from a store."""


@dataclass(frozen=True)
class Lineage:
    """The committed folders behind a run's index, and the additions embedded by the same CLIP."""

    record: RunRecord
    ingest: Committed
    clip: Committed
    index: Committed
    additions: tuple[Committed, ...]
    left_out: tuple[Committed, ...] = ()
    """Additions embedded by another CLIP, whose vectors cannot be compared with this index."""

    @property
    def fingerprint(self) -> str:
        """Digest of the CLIP that embedded all of its vectors."""
        return self.clip.digest


def lineage(root: Root, run: str | None) -> Lineage:
    """Return the folders that a run's index consists of.

    Raises CallerError if the run has no index, or if another CLIP than the run's embedded it.
    """
    record = find_run(root, run)
    ingest, clip, embed, index = (
        committed_of(root, record, stage) for stage in ("ingest", "clip", "embed", "index")
    )
    source = index.manifest["inputs"].get("embed"), index.manifest["input_digests"].get("embed")
    # Accept earlier digests as well: compaction may be under way.
    stood = {
        (embed.key, digest) for digest in (embed.digest, *embed.manifest.get("compacted_from", ()))
    }
    if source not in stood or embed.manifest["input_digests"].get("clip") != clip.digest:
        raise CallerError(
            f"the index of run {record['name']} was made by another CLIP than the run's: "
            f"run `unclip run {record['recipe']} --root {root.uri}`"
        )
    added = additions(root)
    is_same_clip = [addition.manifest["clip_digest"] == clip.digest for addition in added]
    return Lineage(
        record,
        ingest,
        clip,
        index,
        tuple(compress(added, is_same_clip)),
        tuple(compress(added, map(not_, is_same_clip))),
    )


def index_config(
    committed: Committed, unkeyed: Mapping[str, object] = MappingProxyType({})
) -> "IndexConfig":
    """Return the settings of a committed index or addition.

    `unkeyed` holds settings that are not part of its key. Raises StorageError if its manifest lacks
    the settings.
    """
    from indexing.ann.index import IndexConfig

    section = committed.manifest["sections"].get("index") or {}
    try:
        return IndexConfig.model_validate({**unkeyed, **section})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise StorageError(
            f"{committed.uri}/{MANIFEST}: sections.index.{'.'.join(map(str, fault['loc']))}: "
            f"{fault['msg']}: {MANIFESTS.mend}"
        ) from None


def warnings(run_lineage: Lineage) -> list[str]:
    """Return one line for every addition that is not searched, with the fix."""
    return unsearched(run_lineage.left_out, run_lineage.clip)


def unsearched(added: Iterable[Committed], clip: Committed) -> list[str]:
    """Return one line for every addition that another CLIP than `clip` embedded, with the fix."""
    return [
        f"additions/{addition.key} ({addition.manifest['counts']['out']:,} samples) is not "
        f"searched: another CLIP than clip/{clip.key} embedded it; "
        "add its pictures again with `unclip index add FOLDER`"
        for addition in added
        if addition.manifest["clip_digest"] != clip.digest
    ]


def additions(root: Root) -> list[Committed]:
    """Return the additions of any CLIP, oldest first, without those replaced by a merged one."""
    return [addition for addition, is_merged in _with_merged(root) if not is_merged]


def merged_away(root: Root) -> list[Committed]:
    """Return the additions that a merged one has replaced but that still exist."""
    return [addition for addition, is_merged in _with_merged(root) if is_merged]


def _with_merged(root: Root) -> list[tuple[Committed, bool]]:
    committed = [
        addition
        for key in store.list_names(root, ADDITIONS)
        if (addition := manifests.find(root, ADDITIONS, key))
    ]
    for addition in committed:
        if "clip_digest" not in addition.manifest:
            raise StorageError(
                f"{addition.uri}/{MANIFEST} is not that of an addition (clip_digest: Field "
                f"required): {MANIFESTS.mend}"
            )
    # Compare digests from before compaction, too, and times: the same images may be added again.
    since = {
        digest: str(addition.manifest["started"])
        for addition in committed
        for digest in addition.manifest.get("merged_from", ())
    }
    ordered = sorted(committed, key=lambda addition: str(addition.manifest["finished"]))
    return [
        (
            addition,
            any(
                addition.manifest["started"] < since.get(digest, "")
                for digest in _digests(addition)
            ),
        )
        for addition in ordered
    ]


def _digests(committed: Committed) -> list[str]:
    return [committed.digest, *committed.manifest.get("compacted_from", ())]


def _open_segment(vectors: Committed, pictures: StageFiles, name: str) -> "Segment":
    """Open a segment; the local copies of its files go when nobody uses it any more.

    Raises DataError for a file that does not have the manifest's size.
    """
    from indexing.ann.index import INDEX_FILES, Index
    from indexing.ann.view import Segment

    for entry in vectors.manifest["files"]:
        name_in_folder = entry["path"]
        if name_in_folder not in INDEX_FILES:
            continue
        size_bytes = vectors.files.size_bytes(name_in_folder)
        if size_bytes != entry["bytes"]:
            mend = "`unclip index add`" if vectors.stage == ADDITIONS else "`unclip run RECIPE`"
            raise DataError(
                f"{vectors.uri}/{name_in_folder} has {size_bytes:,} bytes, not "
                f"{entry['bytes']:,}: restore the file, or make the folder again with {mend}"
            )
    copies = ExitStack()
    index = Index.open(copies.enter_context(vectors.files.local_copy()))
    segment = Segment(index, ShardReader(pictures), name)
    weakref.finalize(segment, copies.close)
    return segment


def open_segments(
    run_lineage: Lineage, opened: "Mapping[str, Segment] | None" = None
) -> "list[Segment]":
    """Open the run's index and its additions; segments in `opened`, by name, are reused unless a
    file of theirs was cut.
    """
    segments = []
    for vectors, pictures in (
        (run_lineage.index, run_lineage.ingest),
        *((addition, addition) for addition in run_lineage.additions),
    ):
        name = " ".join(
            f"{folder.stage}/{folder.key}/{folder.manifest['attempt']}"
            for folder in (vectors, pictures)
        )
        before = opened.get(name) if opened else None
        if before is None or _is_cut(before):
            before = _open_segment(vectors, pictures.files, name)
        segments.append(before)
    return segments


def _is_cut(segment: "Segment") -> bool:
    try:
        segment.index.check_whole()
    except CutFileError:
        return True
    return False


def open_view(root: Root, run: str | None) -> "tuple[View, Lineage]":
    """Open the current index of a run, without removed samples."""
    from indexing.ann.view import View

    run_lineage = lineage(root, run)
    return View(
        open_segments(run_lineage), read_removals(root), run_lineage.fingerprint
    ), run_lineage


def segments_stamp(root: Root, run: str | None) -> Hashable:
    """Return a value that changes whenever `open_segments` would open other folders.

    Without a run name it is that of the current run.
    """
    run_lineage = lineage(root, run)
    folders = (
        run_lineage.ingest,
        run_lineage.clip,
        run_lineage.index,
        *run_lineage.additions,
        *run_lineage.left_out,
    )
    return run_lineage.record["name"], *(
        (folder.stage, folder.key, folder.manifest["attempt"]) for folder in folders
    )


class SegmentsStamp:
    """Callable `segments_stamp` that reads manifests only after a stage folder has changed."""

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
            self._folders = folders  # the state before the manifests were read
        return self._stamp


class RemovalLog:
    """The removal log. Each entry is read only once, because entries are never rewritten.

    `stamp` changes whenever the log does. A local log is checked on every call; a log in a store
    only by `check`, which is slow.
    """

    def __init__(self, root: Root) -> None:
        """List the log's entries."""
        self.root = root
        self._reading = Lock()
        self._known: dict[str, Removals] = {}
        self._all = Removals()
        self._listed: tuple[str, ...] = ()
        self._folder = None if root.folder is None else root.folder / FOLDER
        self.check()

    def check(self) -> None:
        """List the entries of a log in a store; do nothing for a local log."""
        if self.root.folder is None:
            self._listed = tuple(entry_names(self.root))

    def stamp(self) -> Hashable:
        """Return the stamp."""
        return self._listed if self._folder is None else _changed(self._folder)

    def read(self) -> Removals:
        """Return all removals in the log. Raises DataError for an entry that cannot be parsed."""
        with self._reading:
            names = self._listed if self.root.folder is None else entry_names(self.root)
            new = [name for name in names if name not in self._known]
            with ThreadPoolExecutor(READERS) as pool:
                removals = dict(
                    zip(
                        new,
                        pool.map(lambda name: gather([read_entry(self.root, name)]), new),
                        strict=True,
                    )
                )
            if self._known.keys() - set(names):  # an entry was deleted
                removals = {
                    name: self._known[name] for name in names if name in self._known
                } | removals
                self._known, self._all = {}, Removals()
            self._known |= removals
            if removals:
                self._all = union([self._all, *removals.values()])
            return self._all


def _changed(folder: Path) -> Hashable:
    try:
        changed = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
    now = time.time_ns()
    return (changed, now) if now - changed < GRAIN_NS else changed

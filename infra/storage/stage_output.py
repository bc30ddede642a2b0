"""The unfinished output of a stage: any process on any node can put finished files into ROOT.

In a store, files are put directly below the attempt's prefix, `<stage>/<key>/<attempt>/`. In a
local ROOT, they are renamed into `work/<stage>/<key>/output/`. Readers do not see them before they
are in the manifest (`infra/storage/manifests.py`). A stage that is made in parts records every
finished part in `work/<stage>/<key>/parts/`, so that a process on any node can continue after them.
"""

import io
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from infra.console.progress import transfer
from infra.storage import store
from infra.storage.atomic_files import atomic_file, link_or_copy, sync
from infra.storage.manifest_schema import FileEntry, read_manifest
from infra.storage.node_cache import NodeCache
from infra.storage.stage_files import file_sha256
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder
from infra.storage.typed_json import OPEN, JsonKind, Listed

UPLOAD_THREADS = 8
UNFINISHED_SHARE = 8
OUTPUT, PARTS, ATTEMPT = "output", "parts", "attempt"


@with_config(OPEN)
class PutEntry(FileEntry):
    """A file that was put: its manifest entry, and its etag (version) in the store."""

    etag: NotRequired[str]


@with_config(OPEN)
class Part(TypedDict):
    """The record of a finished part: its files, and facts that the stage needs later."""

    files: Listed[PutEntry]
    facts: Any
    """JSON; every stage has a type of its own for it."""


PART_RECORDS = JsonKind(Part, "the record of a finished part", store.REMOVE, max_bytes=64 << 20)


@dataclass(frozen=True)
class StageOutput:
    """The output of one attempt at a stage. Small and picklable, for use on other nodes."""

    root: Root
    stage: str
    key: str
    attempt: str

    @property
    def folder(self) -> Path:
        """The local folder that will be committed; only for a local ROOT."""
        assert self.root.folder, "a store has no folder"
        return self.root.folder / self.work / OUTPUT

    @property
    def path(self) -> str:
        """Prefix of the files in a store, relative to ROOT."""
        return f"{self.stage}/{self.key}/{self.attempt}"

    @property
    def work(self) -> str:
        """Folder of this attempt's state, relative to ROOT."""
        return _work(self.stage, self.key)

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """Provide an empty folder in this node's scratch folder for unfinished files.

        In a store, copies of other files make room for 1/UNFINISHED_SHARE of the scratch folder.
        Raises StorageError if the folder cannot be created.
        """
        with ExitStack() as stack:
            if not self.root.folder:
                cache = NodeCache(self.root.scratch, self.root.scratch_bytes)
                stack.enter_context(cache.reserve(self.root.scratch_bytes // UNFINISHED_SHARE))
            name = f"{self.stage}-{self.key}-part"
            with store.one_line_errors(self.root.scratch):
                folder = stack.enter_context(writing_folder(self.root.scratch, name))
            yield folder

    def put(self, file: Path, name: str, tell: Callable[[int], None] = lambda _: None) -> PutEntry:
        """Put a finished local file into the output under `name`, and remove the local file.

        An earlier file of that name is replaced atomically. Raises StorageError.
        """
        entry: PutEntry = {
            "path": name,
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        if self.root.folder:
            target = self.folder / name
            with store.one_line_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                _move(file, target)
            return entry
        store.upload(self.root, file, f"{self.path}/{name}", tell)
        etag = store.etag_of(self.root, f"{self.path}/{name}")
        file.unlink()
        return {**entry, "etag": etag} if etag else entry

    @contextmanager
    def local_copy(self, *names: str) -> Iterator[Path]:
        """Provide a local folder with files of this output while the block runs."""
        if self.root.folder:
            yield self.folder
            return
        with self.temporary_folder() as folder:
            for name in names:
                store.download(self.root, f"{self.path}/{name}", folder / name)
            yield folder

    def copy(self, source: str, file: FileEntry) -> PutEntry:
        """Put a committed file into the output under its entry's name, without downloading it.

        `source` is its name relative to ROOT. A local ROOT links the file; a store copies it
        internally. Raises StorageError.
        """
        entry: PutEntry = {"path": file["path"], "bytes": file["bytes"], "sha256": file["sha256"]}
        if self.root.folder:
            target = self.folder / file["path"]
            with store.one_line_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(self.root.folder / source, target)
            return entry
        store.copy(self.root, source, f"{self.path}/{file['path']}")
        etag = store.etag_of(self.root, f"{self.path}/{file['path']}")
        return {**entry, "etag": etag} if etag else entry

    def open(self, name: str) -> BinaryIO:
        """Open a small file of this output; from a store, the whole file is read into memory.

        Raises FileNotFoundError.
        """
        if self.root.folder:
            return (self.folder / name).open("rb")
        return io.BytesIO(store.read_bytes(self.root, f"{self.path}/{name}"))

    def put_tree(self, folder: Path) -> list[PutEntry]:
        """Put all files of a local folder under their relative names, and remove them there."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        total_bytes = 0 if self.root.folder else sum(path.stat().st_size for path in files)
        with (
            store.one_line_errors(folder),
            transfer(f"{self.stage} up", total_bytes) as tell,
            ThreadPoolExecutor(UPLOAD_THREADS) as pool,
        ):
            return list(
                pool.map(lambda path: self.put(path, str(path.relative_to(folder)), tell), files)
            )

    def record(self, part: str, files: Sequence[PutEntry], facts: Mapping[str, object]) -> Part:
        """Record that a part is finished; call this after its files were put."""
        finished = Part(files=list(files), facts=facts)
        store.write_json(self.root, f"{self._parts}/{part}.json", finished)
        return finished

    def finished_parts(self) -> dict[str, Part]:
        """Return the records of all finished parts, by part.

        A part whose files are missing or have changed since they were put is left out.
        """
        names = [
            name for name in store.list_names(self.root, self._parts) if name.endswith(".json")
        ]
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            records = pool.map(
                lambda name: PART_RECORDS.read(self.root, f"{self._parts}/{name}"), names
            )
            finished = {
                name.removesuffix(".json"): record
                for name, record in zip(names, records, strict=True)
                if record is not None
            }
        if not finished:
            return {}
        sizes = store.file_sizes(self.root, self._files)
        versions = {} if self.root.folder else store.etags(self.root, self.path)

        def is_there(file: PutEntry) -> bool:
            is_same = file.get("etag", "") in ("", versions.get(file["path"]))
            return is_same and sizes.get(file["path"]) == file["bytes"]

        return {
            part: record
            for part, record in finished.items()
            if all(is_there(file) for file in record["files"])
        }

    def is_committed(self) -> bool:
        """Return whether this attempt is committed in a store; then its files must not change."""
        if self.root.folder:  # a commit renames the folder, so this one is never committed
            return False
        manifest = read_manifest(self.root, self.stage, self.key)
        return manifest is not None and manifest["attempt"] == self.attempt

    def forget(self, part: str) -> None:
        """Remove the record of a part, so that it is made again."""
        store.remove(self.root, f"{self._parts}/{part}.json")

    @property
    def _files(self) -> str:
        return f"{self.work}/{OUTPUT}" if self.root.folder else self.path

    @property
    def _parts(self) -> str:
        return f"{self.work}/{PARTS}"


def open_output(root: Root, stage: str, key: str) -> StageOutput:
    """Return the output of the running attempt at a stage, or of a new attempt.

    An attempt that is committed already, by a writer that was killed before it removed its records,
    is not continued: its files must not change.
    """
    if root.folder:
        return StageOutput(root, stage, key, OUTPUT)
    name = f"{_work(stage, key)}/{ATTEMPT}"
    fresh = secrets.token_hex(6).encode()
    now = store.change_bytes(root, name, lambda old: fresh if old is None else None)
    assert now, "change_bytes writes our attempt if there is none"
    output = StageOutput(root, stage, key, now.decode())
    if output.is_committed():
        close_output(output)
        return open_output(root, stage, key)
    return output


def close_output(output: StageOutput) -> None:
    """Remove the records of an output after its commit, or after another attempt's commit."""
    store.remove(output.root, _work(output.stage, output.key))


def _work(stage: str, key: str) -> str:
    return f"work/{stage}/{key}"


def _move(file: Path, target: Path) -> None:
    """Rename a file; if it is on another disk, copy it to a temporary name and rename the copy.

    The content is synced to disk before the rename, and the rename before this returns.
    """
    sync(file)
    try:
        file.replace(target)
        sync(target.parent)
    except OSError:
        with atomic_file(target) as part:
            shutil.copyfile(file, part)
        file.unlink()

"""The unfinished output of a stage: any process on any node puts finished files into ROOT.

In a store the files go below the attempt's own prefix, `<stage>/<key>/<attempt>/`, at once; in a
local ROOT into `work/<stage>/<key>/output/` by rename. Nobody reads them before the manifest names
them (`infra/storage/manifests.py`). A stage that is made in parts records every finished part in
`work/<stage>/<key>/parts/`, so that another process, on any node, goes on where one ended.
"""

import io
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

from infra.console.progress import transfer
from infra.storage import store
from infra.storage.atomic_files import atomic_file, link_or_copy, sync
from infra.storage.stage_files import MANIFEST, FileEntry, file_sha256
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder

UPLOAD_THREADS = 8
OUTPUT, PARTS, ATTEMPT = "output", "parts", "attempt"


class PutEntry(FileEntry):
    """A file that was put: its manifest entry, and its version in the store."""

    etag: NotRequired[str]


class Part(TypedDict):
    """The record of a finished part: its files, and what the stage wants to know of it."""

    files: list[PutEntry]
    facts: dict[str, Any]


@dataclass(frozen=True)
class StageOutput:
    """Where an attempt at a stage puts its files. Small; travels between processes and nodes."""

    root: Root
    stage: str
    key: str
    attempt: str

    @property
    def folder(self) -> Path:
        """The local folder that becomes the committed one; only in a local ROOT."""
        assert self.root.folder, "a store has no folder"
        return self.root.folder / self.work / OUTPUT

    @property
    def path(self) -> str:
        """Where the files go in a store, relative to ROOT."""
        return f"{self.stage}/{self.key}/{self.attempt}"

    @property
    def work(self) -> str:
        """Where ROOT keeps this attempt's state, relative to ROOT."""
        return _work(self.stage, self.key)

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """Provide an empty folder in this node's scratch for files that are not finished."""
        with writing_folder(self.root.scratch, f"{self.stage}-{self.key}-part") as folder:
            yield folder

    def put(self, file: Path, name: str, tell: Callable[[int], None] = lambda _: None) -> PutEntry:
        """Make a finished local file the output's file of that name, and remove it.

        A file that was put before under the name is replaced in one step. Raises StorageError.
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
        """Provide a local folder with files that were put, while the block runs."""
        if self.root.folder:
            yield self.folder
            return
        with self.temporary_folder() as folder:
            for name in names:
                store.download(self.root, f"{self.path}/{name}", folder / name)
            yield folder

    def copy(self, source: str, file: FileEntry) -> PutEntry:
        """Make a committed file the output's file of the entry's name, without moving its bytes.

        `source` is its name relative to ROOT. A local ROOT links it, a store copies it itself.
        Raises StorageError.
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
        """Open a small file that was put; a store's is read whole. Raises FileNotFoundError."""
        if self.root.folder:
            return (self.folder / name).open("rb")
        return io.BytesIO(store.read_bytes(self.root, f"{self.path}/{name}"))

    def put_tree(self, folder: Path) -> list[PutEntry]:
        """Put all files of a local folder under their relative names; it is empty afterwards."""
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

    def record(self, part: str, files: Sequence[PutEntry], facts: dict[str, Any]) -> Part:
        """Record that a part is finished; call it after its files were put."""
        finished = Part(files=list(files), facts=facts)
        store.write_json(self.root, f"{self._parts}/{part}.json", finished)
        return finished

    def finished_parts(self) -> dict[str, Part]:
        """Return the records of all finished parts, by part.

        A part whose files are no longer there as they were put counts as not finished.
        """
        names = [
            name for name in store.list_names(self.root, self._parts) if name.endswith(".json")
        ]
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            records = pool.map(
                lambda name: store.read_json(self.root, f"{self._parts}/{name}"), names
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
        """Say whether this attempt is committed in a store: then no file of it may change."""
        if self.root.folder:  # the folder that was committed is no longer this one
            return False
        manifest = store.read_json(self.root, f"{self.stage}/{self.key}/{MANIFEST}")
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
    """Return the output of the attempt at a stage that is under way, or of a new one."""
    if root.folder:
        return StageOutput(root, stage, key, OUTPUT)
    name = f"{_work(stage, key)}/{ATTEMPT}"
    fresh = secrets.token_hex(6).encode()
    now = store.change_bytes(root, name, lambda old: fresh if old is None else None)
    assert now, "where no attempt was, ours is now"
    return StageOutput(root, stage, key, now.decode())


def close_output(output: StageOutput) -> None:
    """Remove the records of an output that was committed, or that another commit has made void."""
    store.remove(output.root, _work(output.stage, output.key))


def _work(stage: str, key: str) -> str:
    return f"work/{stage}/{key}"


def _move(file: Path, target: Path) -> None:
    """Rename a file, or copy it aside and rename the copy where it lies on another disk.

    The content is on the disk before the file gets its name, and its name when this returns.
    """
    sync(file)
    try:
        file.replace(target)
        sync(target.parent)
    except OSError:
        with atomic_file(target) as part:
            shutil.copyfile(file, part)
        file.unlink()

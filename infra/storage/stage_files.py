"""Read the files of a committed stage by name, in any process on any node.

`FolderFiles` reads a local folder. `StoreFiles` reads a store: whole files through the node's
bounded cache, or ranges of files. Both are small and picklable, and hold no open file. Every whole
file from a store is checked against the SHA-256 in the manifest.
"""

import atexit
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from infra.console.progress import transfer
from infra.errors import DataError
from infra.storage import store
from infra.storage.manifest_schema import FileEntry, read_manifest
from infra.storage.node_cache import NodeCache
from infra.storage.store import Root

DOWNLOAD_TRIES = 3
DOWNLOAD_THREADS = 8


class StageFiles(Protocol):
    """The files of one stage folder, by names relative to the folder."""

    @property
    def is_local(self) -> bool:
        """Whether the files are on a local disk, so that small reads are cheap."""

    def names(self, pattern: str = "**/*") -> list[str]:
        """Return the names that match a glob such as `shards/*.tar`, sorted."""

    def open(self, name: str) -> BinaryIO:
        """Open a whole file for reading and seeking. Raises FileNotFoundError, DataError."""

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """Read a range of a file; fewer bytes at its end. Raises FileNotFoundError."""

    def size_bytes(self, name: str) -> int:
        """Return the size of a file. Raises FileNotFoundError."""

    def local_copy(self, *patterns: str) -> AbstractContextManager[Path]:
        """Provide a local folder with the matching files while a block runs.

        The folder may contain other files too. Without patterns, all files match. Raises DataError,
        StorageError.
        """

    def address(self) -> str:
        """Return the path or URI of the files, for messages."""


@dataclass(frozen=True)
class FolderFiles:
    """The files of a local folder."""

    folder: Path

    @property
    def is_local(self) -> bool:
        """See StageFiles."""
        return True

    def names(self, pattern: str = "**/*") -> list[str]:
        """See StageFiles."""
        files = (path for path in self.folder.glob(pattern) if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)

    def open(self, name: str) -> BinaryIO:
        """See StageFiles."""
        return (self.folder / name).open("rb")

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """See StageFiles."""
        with self.open(name) as file:
            return os.pread(file.fileno(), size_bytes, offset)

    def size_bytes(self, name: str) -> int:
        """See StageFiles."""
        return (self.folder / name).stat().st_size

    @contextmanager
    def local_copy(self, *patterns: str) -> Iterator[Path]:
        """See StageFiles."""
        yield self.folder

    def address(self) -> str:
        """See StageFiles."""
        return str(self.folder)


@dataclass(frozen=True)
class StoreFiles:
    """The files of a committed folder in a store; each process reads its manifest once."""

    root: Root
    stage: str
    key: str
    prefix: str
    digest: str

    @property
    def is_local(self) -> bool:
        """See StageFiles."""
        return False

    def names(self, pattern: str = "**/*") -> list[str]:
        """See StageFiles."""
        is_all = pattern == "**/*"
        return sorted(
            name
            for name in self._entries()
            if is_all or PurePosixPath(f"/{name}").match(f"/{pattern}")
        )

    def open(self, name: str) -> BinaryIO:
        """See StageFiles."""
        return self._open(name, lambda _: None)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """See StageFiles."""
        self._entry(name)
        return store.read_range(self.root, self._path(name), offset, size_bytes)

    def size_bytes(self, name: str) -> int:
        """See StageFiles."""
        return self._entry(name)["bytes"]

    @contextmanager
    def local_copy(self, *patterns: str) -> Iterator[Path]:
        """See StageFiles."""
        names = sorted({name for pattern in patterns or ("**/*",) for name in self.names(pattern)})
        total_bytes = sum(self.size_bytes(name) for name in names)
        with ExitStack() as opened:
            with transfer(f"{self.stage} down", total_bytes) as tell:
                self._open_all(names, tell, opened)
            yield self._cache.folder / self._cache_name

    def address(self) -> str:
        """See StageFiles."""
        return store.uri_of(self.root, f"{self.stage}/{self.key}/{self.prefix}".rstrip("/"))

    def _open_all(
        self, names: Sequence[str], tell: Callable[[int], None], stack: ExitStack
    ) -> None:
        guard = threading.Lock()

        def open_one(name: str) -> None:
            file = self._open(name, tell)
            with guard:
                stack.enter_context(file)

        with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
            list(pool.map(open_one, names))

    def _open(self, name: str, tell: Callable[[int], None]) -> BinaryIO:
        entry = self._entry(name)
        with store.one_line_errors(self._cache.folder):
            return self._cache.open(
                f"{self._cache_name}/{name}",
                entry["bytes"],
                lambda path: self._download(entry, path, tell),
            )

    def _download(self, entry: FileEntry, path: Path, tell: Callable[[int], None]) -> None:
        """Download a file; retry if it differs from its manifest entry. Raises DataError."""
        for _ in range(DOWNLOAD_TRIES):
            store.download(self.root, self._path(entry["path"]), path, tell)
            size_bytes = path.stat().st_size
            if size_bytes == entry["bytes"] and file_sha256(path) == entry["sha256"]:
                return
            tell(-size_bytes)
        wrong = (
            "has another checksum"
            if size_bytes == entry["bytes"]
            else f"has {size_bytes:,} bytes, not {entry['bytes']:,}"
        )
        raise DataError(
            f"{self.address()}: {entry['path']} {wrong}; run again to download it again, or remove "
            "the folder to make it again"
        )

    @property
    def _cache(self) -> NodeCache:
        return NodeCache(self.root.scratch, self.root.scratch_bytes)

    @property
    def _cache_name(self) -> str:
        return f"{self.stage}/{self.key}-{self.digest[:8]}"

    def _path(self, name: str) -> str:
        return f"{self.stage}/{self.key}/{self.prefix}/{name}"

    def _entries(self) -> Mapping[str, FileEntry]:
        return _read_entries(self.root, self.stage, self.key, self.digest)

    def _entry(self, name: str) -> FileEntry:
        entry = self._entries().get(name)
        if entry is None:
            raise FileNotFoundError(f"{self.address()} has no file {name}")
        return entry


@lru_cache(maxsize=64)
def _read_entries(root: Root, stage: str, key: str, digest: str) -> Mapping[str, FileEntry]:
    """Return the files of a manifest by name. Raises DataError if its digest has changed."""
    manifest = read_manifest(root, stage, key)
    if manifest is None or manifest["digest"] != digest:
        raise DataError(
            f"{store.uri_of(root, f'{stage}/{key}')} was removed or replaced while it was being "
            "read: run the same command again"
        )
    return {entry["path"]: entry for entry in manifest["files"]}


_PINS = ExitStack()
atexit.register(_PINS.close)


def pinned_copy(files: StageFiles, *patterns: str) -> Path:
    """Return a local folder with the matching files; they are kept until this process ends."""
    return _PINS.enter_context(files.local_copy(*patterns))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a local file in hexadecimal; the file is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

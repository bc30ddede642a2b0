"""The cache of one ROOT on a node: local copies of files of a store, bounded in size.

Copies lie in `cache/` of the ROOT's scratch folder, one file per cached file. A process that uses a
copy holds a shared flock on it, which vanishes with the process; a copy that nobody uses may be
removed at any time, the least recently used first. The bound covers everything in the scratch
folder, unfinished outputs included, and what is being downloaded counts with its final size. All
processes of a node that read one ROOT share one cache; two ROOTs on a node have a cache and a bound
each. Knows nothing of stores: the caller downloads.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from infra.errors import StorageError

FOLDER = "cache"
PART = ".part-"
"""Ends the name of a copy that is being downloaded, followed by its final size in bytes."""
GUARD = "cache.lock"
STATES = "work"
"""The node's copies of the states of stages that are under way (`work_folder.py`)."""
FORGOTTEN_S = 86_400.0
WAIT_S = 60.0
"""Maximum time to wait for copies in use to be released before the node counts as too small."""
POLL_S = 0.1


@dataclass(frozen=True)
class NodeCache:
    """The cache in `scratch`; all of `scratch` may take at most `limit_bytes`."""

    scratch: Path
    limit_bytes: int

    @property
    def folder(self) -> Path:
        """The folder of the copies."""
        return self.scratch / FOLDER

    def open(self, name: str, size_bytes: int, download: Callable[[Path], None]) -> BinaryIO:
        """Open the copy of a file for reading; it stays until the file object is closed.

        `name` is its path below `folder`, and names one content for ever. Where there is no copy,
        `download` writes it to the path that it gets, or raises. Raises StorageError where there is
        no room for `size_bytes` beside what is in use.
        """
        path = self.folder / name
        while True:
            file = _open_shared(path)
            if file:
                os.utime(path)  # the time of the last use
                return file
            self._make(path, size_bytes, download)

    def _make(self, path: Path, size_bytes: int, download: Callable[[Path], None]) -> None:
        """Download a copy, or wait for another process that does."""
        part = path.with_name(f"{path.name}{PART}{size_bytes}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                return  # another process has just finished it, or removed what a killed one left
            try:
                self.make_room(size_bytes, part)
                download(part)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def make_room(self, size_bytes: int, reserved: Path | None = None) -> None:
        """Remove copies that nobody uses until `size_bytes` more fit into the scratch folder.

        `reserved` is a file that already stands for these bytes. Waits for up to WAIT_S while too
        much is in use, then raises StorageError.
        """
        limit_s = time.monotonic() + WAIT_S
        while True:
            with self._guarded():
                missing_bytes = self._free(size_bytes, reserved)
            if missing_bytes <= 0:
                return
            if time.monotonic() >= limit_s:
                raise StorageError(
                    f"the scratch folder {self.scratch} may take {self.limit_bytes:,} bytes, but "
                    f"{self.limit_bytes + missing_bytes:,} are needed at once: set "
                    "UNCLIP_SCRATCH_BYTES to at least that, or make shards smaller"
                )
            time.sleep(POLL_S)

    def _free(self, size_bytes: int, reserved: Path | None) -> int:
        """Remove copies, oldest use first; return how many bytes are still missing (<= 0: none)."""
        used_bytes, copies = 0, []
        for path, stat in _files(self.scratch):
            if path == reserved:
                continue
            final_bytes = _final_bytes(path, stat.st_size)
            used_bytes += final_bytes
            if self.folder in path.parents or self._is_forgotten(path, stat):
                copies.append((stat.st_mtime_ns, path, final_bytes))
        missing_bytes = used_bytes + size_bytes - self.limit_bytes
        for _, path, copy_bytes in sorted(copies):
            if missing_bytes <= 0:
                break
            if _remove_unused(path):
                missing_bytes -= copy_bytes
        return missing_bytes

    def _is_forgotten(self, path: Path, stat: os.stat_result) -> bool:
        """Say whether a file is the state of a stage that nobody has worked on here for a day."""
        return self.scratch / STATES in path.parents and time.time() - stat.st_mtime > FORGOTTEN_S

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let one process at a time decide what goes."""
        locks = self.scratch / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / GUARD).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def used_bytes(scratch: Path) -> int:
    """Return the bytes of all files below a scratch folder."""
    return sum(stat.st_size for _, stat in _files(scratch))


def _open_shared(path: Path) -> BinaryIO | None:
    """Open a copy and keep it from being removed; None where there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if _is_at(file, path):
        return file
    file.close()  # it was removed between opening and locking
    return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Say whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a copy, or what a killed process left of one, unless a process uses it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _final_bytes(path: Path, size_bytes: int) -> int:
    _, mark, final = path.name.rpartition(PART)
    return max(size_bytes, int(final)) if mark and final.isdigit() else size_bytes


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every file below a folder that is still there when it is looked at."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                yield path, path.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue

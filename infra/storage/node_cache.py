"""The cache of one node for one ROOT: local copies of a store's files, of bounded size.

Copies are in `SCRATCH/cache/`, one file per cached file; each ROOT has its own scratch folder, so
the bound is per ROOT on a node. A process that uses a copy holds a shared flock on it, which ends
with the process; unused copies may be removed at any time, the least recently used first. The bound
covers all files in the scratch folder, including unfinished outputs; a running download counts with
its final size. All processes of a node share the cache of a ROOT. The caller downloads the files.
"""

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from infra.errors import StorageError

FOLDER = "cache"
PART = ".part-"
"""Suffix of a copy that is being downloaded, followed by its final size in bytes."""
GRANTED = 0o700
"""Mode of such a file once there is room for it. Before that it counts with what it holds, so that
two that wait for room do not wait for each other."""
GUARD = "cache.lock"
STATES = "work"
"""Folder of the node's copies of the states of running stages (`work_folder.py`)."""
ABANDONED_S = 86_400.0
"""Seconds after its last change at which a file of a stage's state may be removed."""
WAIT_S = 60.0
"""Maximum seconds to wait for copies in use to be released; then StorageError is raised."""
POLL_S = 0.1


@dataclass(frozen=True)
class NodeCache:
    """The cache in `scratch`, the scratch folder of one ROOT on this node.

    All files in `scratch` together may take at most `limit_bytes`.
    """

    scratch: Path
    limit_bytes: int

    @property
    def folder(self) -> Path:
        """The folder of the copies."""
        return self.scratch / FOLDER

    def open(self, name: str, size_bytes: int, download: Callable[[Path], None]) -> BinaryIO:
        """Open the copy of a file for reading; it is kept until the file object is closed.

        `name` is its path below `folder`; a name always has the same content. If there is no copy,
        `download` is called with the path to write it to. Raises StorageError if `size_bytes` do
        not fit beside the files in use, and any error of `download`.
        """
        path = self.folder / name
        while True:
            file = _open_shared(path)
            if file and os.fstat(file.fileno()).st_size == size_bytes:
                os.utime(path)  # the time of the last use
                return file
            if file:  # something has cut it; who reads it keeps what is left
                with file:
                    if _is_at(file, path):
                        path.unlink()
            self._make(path, size_bytes, download)

    def _make(self, path: Path, size_bytes: int, download: Callable[[Path], None]) -> None:
        """Download a copy, or wait for another process that is downloading it."""
        part = path.with_name(f"{path.name}{PART}{size_bytes}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            while not _try_lock(file):
                time.sleep(POLL_S)
                # A finished download is renamed, and its readers may hold the same file for long.
                if not _is_at(file, part):
                    return
            if not _is_at(file, part):
                return  # another process has just finished it, or removed an unfinished one
            if path.exists():  # finished after we looked, before we made the file of the part
                part.unlink()
                return
            try:
                self.make_room(size_bytes, part)
                download(part)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def make_room(self, size_bytes: int, reserved: Path | None = None) -> None:
        """Remove unused copies until `size_bytes` more fit into the scratch folder.

        `reserved` is the file that will take these bytes, named with PART; from now on it counts
        with them. Waits up to WAIT_S while too much is in use, then raises StorageError.
        """
        limit_s = time.monotonic() + WAIT_S
        while True:
            with self._guarded():
                missing_bytes = self._free(size_bytes, reserved)
                if missing_bytes <= 0:
                    if reserved:
                        reserved.chmod(GRANTED)
                    return
            if time.monotonic() >= limit_s:
                raise StorageError(
                    f"the scratch folder {self.scratch} is limited to {self.limit_bytes:,} bytes, "
                    f"but {self.limit_bytes + missing_bytes:,} are needed at once: set "
                    "UNCLIP_SCRATCH_BYTES to at least that, or make shards smaller"
                )
            time.sleep(POLL_S)

    def _free(self, size_bytes: int, reserved: Path | None) -> int:
        """Remove unused copies, least recently used first.

        Returns the number of bytes that are still missing; 0 or less if none are.
        """
        used_bytes, copies = 0, []
        for path, stat in _files(self.scratch):
            if path == reserved:
                continue
            final_bytes = _final_bytes(path, stat)
            used_bytes += final_bytes
            if self.folder in path.parents or self._is_abandoned(path, stat):
                copies.append((stat.st_mtime_ns, path, final_bytes))
        missing_bytes = used_bytes + size_bytes - self.limit_bytes
        for _, path, copy_bytes in sorted(copies):
            if missing_bytes <= 0:
                break
            if _remove_unused(path):
                missing_bytes -= copy_bytes
        return missing_bytes

    def _is_abandoned(self, path: Path, stat: os.stat_result) -> bool:
        """Return whether a file is the state of a stage that has not changed here for a day."""
        return self.scratch / STATES in path.parents and time.time() - stat.st_mtime > ABANDONED_S

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Keep `size_bytes` of the scratch folder free for other files while the block runs."""
        held = self.folder / "reserved" / f"{secrets.token_hex(8)}{PART}{size_bytes}"
        held.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with self._guarded():  # unlocked, the file would be removed as a killed process's
                fcntl.flock(stack.enter_context(held.open("ab")), fcntl.LOCK_EX)
            try:
                self.make_room(size_bytes, held)
                yield
            finally:
                held.unlink(missing_ok=True)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hold a lock, so that one process at a time decides which copies to remove."""
        locks = self.scratch / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / GUARD).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def used_bytes(scratch: Path) -> int:
    """Return the bytes of all files below a scratch folder."""
    return sum(stat.st_size for _, stat in _files(scratch))


def _open_shared(path: Path) -> BinaryIO | None:
    """Open a copy with a shared lock, so that it is not removed; None if there is no copy."""
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
    """Return whether `path` is still the path of the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a copy or an unfinished one, unless a process uses it; return whether it is gone."""
    try:
        with path.open("rb") as file:
            if not _try_lock(file):
                return False
            if _is_at(file, path):
                path.unlink()
    except FileNotFoundError:
        pass
    return True


def _try_lock(file: BinaryIO) -> bool:
    """Take an exclusive lock on an open file unless another holds one; return whether it is ours.

    Raises OSError.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _final_bytes(path: Path, stat: os.stat_result) -> int:
    """Return the size that a file has now, or will have if room was made for it."""
    _, mark, final = path.name.rpartition(PART)
    is_granted = stat.st_mode & 0o777 == GRANTED
    return (
        max(stat.st_size, int(final)) if mark and final.isdigit() and is_granted else stat.st_size
    )


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield (path, stat) of every file below a folder; skip files that others remove."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                yield path, path.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue

"""Temporary folders of writers, `SCRATCH/aside/<name>`, each with a lock that its writer holds.

The lock, `SCRATCH/locks/writing-<name>.lock`, is a flock: it vanishes with its process, SIGKILL
included, and names process and host. A folder's writer is dead if nobody holds its lock and the
lock names this host. Without a lock file, or with a lock of another host (whose locks the file
system may not show), the writer is dead once nothing in the folder has changed for a day. Every new
writer removes the folders of dead ones. Knows nothing of what the folders hold.
"""

import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from infra.storage.locks import write_holder

FOLDER = "aside"
PREFIX, SUFFIX = "writing-", ".lock"
REPLACED = ".replaced"
"""Suffix of a committed folder that a writer moved away to replace it; `commits.recover` restores
or removes it."""
UNTOUCHED_S = 86_400
"""Seconds without a change after which a folder is dead, if its lock does not tell."""


@contextmanager
def writing_folder(scratch: Path, name: str) -> Iterator[Path]:
    """Create an empty temporary folder whose name begins with `name`.

    Removes the folders of dead writers first, and this one at the end of the block unless it was
    committed. Raises OSError.
    """
    remove_dead(scratch)
    folder = scratch / FOLDER / f"{name}-{secrets.token_hex(4)}"
    lock = _lock_of(folder)
    handle = _hold(lock)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(_parts(folder)):  # else the lock tells the next writer that this one is dead
            lock.unlink(missing_ok=True)
        os.close(handle)


def dead_folders(scratch: Path) -> list[Path]:
    """Return the folders that dead writers left, sorted, including those for `recover`."""
    parent = scratch / FOLDER
    return (
        [folder for folder in sorted(parent.iterdir()) if folder.is_dir() and is_dead(folder)]
        if parent.is_dir()
        else []
    )


def remove_dead(scratch: Path) -> None:
    """Remove the folders and locks of dead writers, except those for `recover`."""
    for folder in dead_folders(scratch):
        if not folder.name.endswith(REPLACED):
            shutil.rmtree(folder, ignore_errors=True)
    for lock in sorted((scratch / "locks").glob(f"{PREFIX}*{SUFFIX}")):
        folder = scratch / FOLDER / lock.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        with _unheld(lock) as is_unheld:
            if is_unheld and not any(_parts(folder)):
                lock.unlink(missing_ok=True)


def is_dead(folder: Path) -> bool:
    """Return whether the writer of a temporary folder is dead, by the rule above."""
    with _unheld(_lock_of(folder)) as is_unheld:
        if not is_unheld:
            return False
    is_local = _host_in(_lock_of(folder)) == socket.gethostname()
    return is_local or time.time() - last_change(folder) > UNTOUCHED_S


def last_change(folder: Path) -> float:
    """Return when a folder or anything below it changed last, in seconds since 1970.

    Returns 0 if the folder does not exist.
    """
    changes = [0.0]
    for path in (folder, *folder.rglob("*")):
        try:
            changes.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue  # removed meanwhile
    return max(changes)


def _parts(folder: Path) -> Iterator[Path]:
    return (
        candidate
        for candidate in (folder, folder.with_name(f"{folder.name}{REPLACED}"))
        if candidate.exists()
    )


def _lock_of(folder: Path) -> Path:
    return folder.parent.parent / "locks" / f"{PREFIX}{folder.name.removesuffix(REPLACED)}{SUFFIX}"


def _hold(lock: Path) -> int:
    """Create and hold a lock file, and write the holder into it; return its open handle."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)  # others share it only for a moment, to test it
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            break
        os.close(handle)  # another process took it for a dead writer's and removed it
    with os.fdopen(os.dup(handle), "r+") as file:
        write_holder(file)
    return handle


@contextmanager
def _unheld(lock: Path) -> Iterator[bool]:
    """Yield whether nobody holds a lock file; nobody can take it while the block runs."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        is_unheld = True
    except BlockingIOError:
        is_unheld = False
    try:
        yield is_unheld
    finally:
        os.close(handle)


def _host_in(lock: Path) -> str | None:
    try:
        holder: Any = from_json(lock.read_bytes())
    except (FileNotFoundError, ValueError):  # no lock, or its writer died before it wrote to it
        return None
    return holder.get("host") if isinstance(holder, dict) else None

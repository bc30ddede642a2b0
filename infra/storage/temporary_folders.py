"""Temporary folders of writers, `SCRATCH/aside/<name>`, each with a lock that its writer holds.

The lock, `SCRATCH/locks/writing-<name>.lock`, is a flock: it vanishes with its process, SIGKILL
included, and names process and host. The rule by which a folder is a dead writer's: nobody holds
its lock, and the lock names this host. A folder without a lock file, or whose lock names another
host (a file system may not pass locks on), is dead once nothing in it has changed for a day. Every
new writer removes what dead ones left. Knows nothing of what the folders hold.
"""

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.storage.locks import write_holder

FOLDER = "aside"
PREFIX, SUFFIX = "writing-", ".lock"
REPLACED = ".replaced"
"""Ends the name of a committed folder that its writer moved away to put another in its place:
`commits.recover` knows what to do."""
UNTOUCHED_S = 86_400
"""Time without a change after which a folder is dead whose lock says nothing here."""


@contextmanager
def writing_folder(scratch: Path, name: str) -> Iterator[Path]:
    """Make an empty temporary folder whose name begins with `name`; it goes when the block ends,
    unless it was committed by then.

    Removes what dead writers left first. Raises OSError.
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
        if not any(_parts(folder)):  # else the next writer has to know that this one is gone
            lock.unlink(missing_ok=True)
        os.close(handle)


def dead_folders(scratch: Path) -> list[Path]:
    """Return the folders that dead writers left, sorted; those that `recover` may have to put back
    included.
    """
    parent = scratch / FOLDER
    return (
        [folder for folder in sorted(parent.iterdir()) if folder.is_dir() and is_dead(folder)]
        if parent.is_dir()
        else []
    )


def remove_dead(scratch: Path) -> None:
    """Remove the folders and locks of dead writers; those that `recover` may have to put back
    stay.
    """
    for folder in dead_folders(scratch):
        if not folder.name.endswith(REPLACED):
            shutil.rmtree(folder, ignore_errors=True)
    for lock in sorted((scratch / "locks").glob(f"{PREFIX}*{SUFFIX}")):
        folder = scratch / FOLDER / lock.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        with _unheld(lock) as is_unheld:
            if is_unheld and not any(_parts(folder)):
                lock.unlink(missing_ok=True)


def is_dead(folder: Path) -> bool:
    """Say whether the writer of a temporary folder is dead, by the rule above."""
    with _unheld(_lock_of(folder)) as is_unheld:
        if not is_unheld:
            return False
    is_local = _host_in(_lock_of(folder)) == socket.gethostname()
    return is_local or time.time() - last_change(folder) > UNTOUCHED_S


def last_change(folder: Path) -> float:
    """Return when a folder or anything below it changed last, in seconds since 1970; 0 where it is
    no longer there.
    """
    changes = [0.0]
    for path in (folder, *folder.rglob("*")):
        try:
            changes.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue  # its writer, or another that clears, has removed it meanwhile
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
    """Make a lock file, hold it and name the holder in it; return its open handle."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)  # nobody shares it longer than it takes to look
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            break
        os.close(handle)  # who looked took it for a dead writer's, and has removed it
    with os.fdopen(os.dup(handle), "r+") as file:
        write_holder(file)
    return handle


@contextmanager
def _unheld(lock: Path) -> Iterator[bool]:
    """Say whether nobody holds a lock file, and keep it so while the block runs."""
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
        holder: Any = json.loads(lock.read_text())
    except (FileNotFoundError, ValueError):  # no lock, or its writer died before it wrote its name
        return None
    return holder.get("host") if isinstance(holder, dict) else None

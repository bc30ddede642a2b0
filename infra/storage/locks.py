"""Locks among the processes of one machine: one writer per stage folder, and none while it is read.

A second writer waits and reports the holder. Writers use POSIX record locks: they vanish with the
process that holds them, SIGKILL included, and a forked child does not keep them. Between machines
the conditional commit decides. Readers share a lock of another kind (flock), because several
threads of a process may read the same folder.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pydantic_core import from_json

POLL_S = 0.2
HOLDER_BYTES = 1 << 12

_threads_guard = threading.Lock()
_threads: dict[Path, threading.Lock] = {}  # record locks do not exclude threads of one process


def lock_file(scratch: Path, stage: str, key: str) -> Path:
    """Return the lock file of the writer of a stage's folder."""
    return scratch / "locks" / f"{stage}-{key}.lock"


def reading_file(scratch: Path, stage: str, key: str) -> Path:
    """Return the lock file that the readers of a stage's folder share."""
    return scratch / "locks" / f"{stage}-{key}.reading"


@contextmanager
def reader_lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Share the lock file `path` with other readers while the block runs.

    Waits, and reports it once through `say`, while a writer holds it.
    """
    with _flock(path, fcntl.LOCK_SH, f"{what} is being changed by", say):
        yield


@contextmanager
def unread_lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Exclude the readers that share the lock file `path` while the block runs.

    Waits, and reports it once through `say`, while there are readers.
    """
    with _flock(path, fcntl.LOCK_EX, f"{what} is being read by", say):
        yield


@contextmanager
def turn_lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time start something while the block runs.

    Waits, and reports it once through `say`, while another process holds the lock file `path`.
    """
    with _flock(path, fcntl.LOCK_EX, f"{what} is being started by", say):
        yield


def is_being_read(path: Path) -> bool:
    """Return whether a reader shares the lock file `path` now."""
    if not path.exists():
        return False
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _flock(path: Path, kind: int, use: str, say: Callable[[str], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:  # closing it releases the lock
        _take(lambda: fcntl.flock(file, kind | fcntl.LOCK_NB), path, use, say)
        write_holder(file)
        yield


def _take(attempt: Callable[[], None], path: Path, use: str, say: Callable[[str], None]) -> None:
    """Try to take a lock until it succeeds; report the holder once.

    `use` is the message up to the holder, such as `curate 0123 is being made by`.
    """
    is_reported = False
    while True:
        try:
            return attempt()
        except (BlockingIOError, PermissionError):  # POSIX allows either for lockf
            if not is_reported:
                is_reported = True
                say(f"{use} {_holder(path)}: waiting until it has finished")
            time.sleep(POLL_S)


def write_holder(file: TextIO) -> None:
    """Write the process, the host and the time into a lock file."""
    file.seek(0)
    file.truncate()
    json.dump(
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
        file,
    )
    file.flush()


@contextmanager
def writer_lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Waits, and reports it once through `say`, while another run holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _threads_guard:
        in_process = _threads.setdefault(path.resolve(), threading.Lock())
    with in_process, path.open("a+") as file:
        _take(
            lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            path,
            f"{what} is being made by",
            say,
        )
        write_holder(file)
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def _holder(path: Path) -> str:
    # Opening the file again and closing it would drop this process's own record locks on it; it
    # holds none here.
    try:
        holder = from_json(path.read_bytes()[:HOLDER_BYTES])
        return f"another run (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # a cut file, or another JSON value
        return "another run"

"""One writer at a time for a stage's folder, among the processes and threads of one machine.

A second writer waits, and says for whom. POSIX record locks: they vanish with the process that holds them, SIGKILL included, and a
forked child (a download worker that outlived its parent, say) does not keep them. Between machines the conditional commit decides.
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

POLL_S = 0.2

_threads_guard = threading.Lock()
_threads: dict[Path, threading.Lock] = {}  # record locks do not exclude threads of one process


@contextmanager
def writer_lock(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; while another run holds it, wait and `say` so once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _threads_guard:
        in_process = _threads.setdefault(path.resolve(), threading.Lock())
    with in_process, path.open("a+") as file:
        waiting = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if not waiting:
                    waiting = True
                    say(f"{what} is being made by {_holder(path)}: waiting until it has finished")
                time.sleep(POLL_S)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
        file.flush()
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def _holder(path: Path) -> str:
    # Opening the file again and closing it would drop this process's own record locks on it; it holds none here.
    try:
        holder = json.loads(path.read_text())
        return f"another run (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError):
        return "another run"

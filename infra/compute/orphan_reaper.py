"""Kill the processes of a run's Ray once the run is dead: `python orphan_reaper.py PID MARK`.

Ray's own processes notice the end of a killed driver one by one; workers that were just starting
look for it for a minute. `infra/compute/cluster.py` starts this program beside a local Ray. It
waits until its parent, the process PID, has gone, and then kills every process of this user that
has MARK in its environment. Needs `/proc`; imports nothing that takes time.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.5
SCANS, EMPTY_SCANS = 20, 3
"""Scans at most, and without a process before it ends: one that is killed may just have started
another."""


def marked(mark: bytes) -> list[int]:
    """Return the other processes of this user that have `mark` in their environment."""
    processes = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if mark in (folder / "environ").read_bytes():
                    processes.append(int(folder.name))
    return processes


def main(parent: int, mark: bytes) -> None:
    """Wait for the end of the parent and kill what it has left."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    empty_scans = 0
    for _ in range(SCANS):
        processes = marked(mark)
        empty_scans = 0 if processes else empty_scans + 1
        if empty_scans == EMPTY_SCANS:
            return
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(int(sys.argv[1]), os.fsencode(sys.argv[2]))

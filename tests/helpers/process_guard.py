"""Ends what the tests started when pytest ends, also when pytest is killed or interrupted.

Every process below pytest inherits a mark in its environment. A guard process waits for the end of
pytest, by whatever signal, and
then kills all processes that carry the mark: servers, Ray nodes and runs that a schedule started,
in sessions of their own or not.
"""

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MARK = "UNCLIP_TEST_RUN"
ROUNDS = 5
"""Number of searches for marked processes: one may start another while it is looked for."""


def pytest_configure(config: pytest.Config) -> None:
    """Start the guard, once for a pytest and its xdist workers."""
    if MARK in os.environ:
        return
    os.environ[MARK] = secrets.token_hex(8)
    command = [sys.executable, __file__, str(os.getpid()), os.environ[MARK]]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)


def marked_processes(mark: str) -> list[int]:
    """Return the ids of the processes that carry this mark."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            ):
                pids.append(int(folder.name))
        except OSError:
            continue  # it ended, or is another user's
    return pids


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll()


def main() -> None:
    """Wait for pytest (argument 1: its id) to end, then kill what carries the mark (argument 2)."""
    wait_for_end(int(sys.argv[1]))
    for _ in range(ROUNDS):
        for pid in marked_processes(sys.argv[2]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


if __name__ == "__main__":
    main()

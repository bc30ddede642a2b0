"""A lock keeps the second writer out and vanishes with the process that held it, however that
ended.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from infra.storage.locks import writer_lock

HOLD = """
import os, sys, time
from pathlib import Path
from infra.storage.locks import writer_lock
with writer_lock(Path(sys.argv[1]), "clip abc", print):
    if len(sys.argv) > 2 and os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(60)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


def holder(path: Path, *more: str) -> "subprocess.Popen[str]":
    """Start a process that holds the lock, and wait until it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *more],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout
    return process


def test_a_second_process_waits_says_for_whom_and_goes_on_after_a_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "clip-abc.lock"
    process = holder(path)
    assert process.stdout and process.stdout.readline() == "held\n"
    said: list[str] = []
    threading.Timer(0.6, process.kill).start()
    clock = time.monotonic()
    with writer_lock(path, "clip abc", said.append):
        waited = time.monotonic() - clock
    process.wait()
    assert 0.4 < waited < 5
    assert (
        len(said) == 1
        and f"clip abc is being made by another run (process {process.pid} on " in said[0]
    )


def test_a_forked_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    process = holder(path, "fork")
    assert process.stdout
    said = {process.stdout.readline().strip() for _ in range(2)}
    child = int((said - {"held"}).pop())
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # still there
        with writer_lock(path, "clip abc", print):
            os.kill(child, 0)  # and still
    finally:
        os.kill(child, signal.SIGKILL)


def test_threads_and_processes_take_turns(tmp_path: Path) -> None:
    path, log = tmp_path / "a.lock", tmp_path / "log"
    workers = [threading.Thread(target=_turn, args=(path, log)) for _ in range(3)]
    workers += [
        multiprocessing.get_context("spawn").Process(target=_turn, args=(path, log))
        for _ in range(2)
    ]  # type: ignore[list-item]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert log.read_text() == "in out " * 15


def _turn(path: Path, log: Path) -> None:
    for _ in range(3):
        with writer_lock(path, "x", lambda line: None), log.open("a") as file:
            file.write("in ")
            file.flush()
            time.sleep(0.02)
            file.write("out ")

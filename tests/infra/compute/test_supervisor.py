"""A worker that crashes is started again, one that ends by itself is not, and none outlives its
supervisor.
"""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SUPERVISOR = """
import subprocess, sys
from infra.compute import supervisor
supervisor.FIRST_PAUSE_S = 0.05
start = lambda: subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
sys.exit(supervisor.Supervisor(start, lambda line: print(line, flush=True)).run())
"""
WORKER = """
import os, signal, sys, time
from infra.compute.supervisor import end_with
end_with(0)
print("works", os.getpid(), flush=True)
time.sleep(600)
"""


def supervise(worker: str) -> "subprocess.Popen[str]":
    """Start a supervisor with a Ctrl-C that a shell's background jobs have ignored."""
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_pid(supervisor: "subprocess.Popen[str]") -> int:
    assert supervisor.stdout
    word, pid = supervisor.stdout.readline().split()
    assert word == "works"
    return int(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_crashed_worker_is_started_again_until_a_signal_ends_both(number: int) -> None:
    supervisor = supervise(WORKER)
    assert supervisor.stdout
    os.kill(read_pid(supervisor), signal.SIGBUS)
    assert "crashed (SIGBUS, which a file that is cut" in supervisor.stdout.readline()
    again = read_pid(supervisor)
    supervisor.send_signal(number)
    assert supervisor.wait(60) == -number
    assert not Path(f"/proc/{again}").exists()


def test_a_worker_ends_with_its_supervisor() -> None:
    supervisor = supervise(WORKER)
    worker = os.pidfd_open(read_pid(supervisor))
    supervisor.kill()
    supervisor.communicate()
    assert select.select([worker], [], [], 60)[0], "it has ended"


def test_a_worker_that_ends_by_itself_is_not_started_again() -> None:
    supervisor = supervise("print('once'); raise SystemExit(3)")
    assert supervisor.communicate(timeout=60)[0] == "once\n" and supervisor.returncode == 3

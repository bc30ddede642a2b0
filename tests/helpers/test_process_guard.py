"""Nothing that a test started outlives pytest, however pytest ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.process_guard import MARK, marked_processes

HERE = Path(__file__).parents[2]
STARTING = """
import os, subprocess, time

def test_starts_a_server_and_waits():
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print("MARK", os.environ["UNCLIP_TEST_RUN"], flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=lambda ending: ending.name)
def test_a_process_of_a_session_of_its_own_ends_with_pytest(
    ending: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "test_starting.py").write_text(STARTING)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != MARK and not name.startswith("PYTEST")
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-p",
        "tests.helpers.process_guard",
        "-c",
        os.devnull,
        str(tmp_path),
    ]
    with subprocess.Popen(
        command,
        env=environment | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that runs the tests in the background has Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as run:
        assert run.stdout
        try:
            mark = next(line.split("MARK ")[1].split()[0] for line in run.stdout if "MARK " in line)
            assert len(marked_processes(mark)) == 1, "the server, and neither pytest nor its guard"
        finally:
            run.send_signal(ending)
    limit = time.monotonic() + 60
    while marked_processes(mark):
        assert time.monotonic() < limit, f"a server outlives a pytest that {ending.name} ended"
        time.sleep(0.05)

"""What libraries print goes to the log; what we say goes to the terminal and stands in the log
too.
"""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from infra.console import log_redirect

CHATTER = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from infra.console.log_redirect import quiet_terminal
print("before")
with quiet_terminal(Path(sys.argv[1])):
    print("from print")
    os.write(1, b"from fd 1\\n")
    os.write(2, b"from fd 2\\n")
    subprocess.run(["sh", "-c", "echo from child; echo from child err >&2"])
    logging.getLogger("lib").warning("from logging")
    warnings.warn("from warnings")
    print("said", file=sys.stderr)
    print("\\r\\x1b[2Kprogress 1", end="", file=sys.stderr)
    print("\\r\\x1b[2Kprogress done", file=sys.stderr)
    if len(sys.argv) > 2:
        raise RuntimeError("boom")
print("after")
os.write(2, b"after err\\n")
"""


def chatter(log: Path, *more: str) -> tuple[str, str]:
    """Run the program above; return its stdout and stderr as they are, carriage returns too."""
    command = [sys.executable, "-c", CHATTER, str(log), *more]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True)
    return done.stdout.decode(), done.stderr.decode()


def test_only_our_own_lines_reach_the_terminal(tmp_path: Path) -> None:
    out, err = chatter(tmp_path / "logs" / "run.log")
    assert out == "before\nafter\n"
    assert err == "said\n\r\x1b[2Kprogress 1\r\x1b[2Kprogress done\nafter err\n"
    log = (tmp_path / "logs" / "run.log").read_text()
    for line in ("print", "fd 1", "fd 2", "child", "child err", "logging", "warnings"):
        assert f"from {line}" in log
    assert (
        "said\n" in log and "progress done\n" in log and "progress 1" not in log and "\r" not in log
    )
    assert "before" not in log and "after" not in log


def test_the_terminal_is_back_after_an_error(tmp_path: Path) -> None:
    out, err = chatter(tmp_path / "run.log", "boom")
    assert out == "before\n" and "RuntimeError: boom" in err


def test_the_log_gets_a_rewritten_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_, log, clock = io.StringIO(), io.StringIO(), iter([0.0, 1.0, 12.0, 12.0, 13.0])
    monkeypatch.setattr(log_redirect.time, "monotonic", lambda: next(clock))
    tee = log_redirect._Tee(terminal_, log)
    for percent in (1, 2, 3):
        tee.write(f"\r\x1b[2K{percent} %")
    tee.write("\r\x1b[2K100 %\n")
    assert log.getvalue() == "2 %\n100 %\n"
    assert terminal_.getvalue() == "\r\x1b[2K1 %\r\x1b[2K2 %\r\x1b[2K3 %\r\x1b[2K100 %\n"

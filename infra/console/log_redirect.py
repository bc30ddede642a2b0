"""Redirect what libraries and child processes print from the terminal to a log file.

While `quiet_terminal` is open, file descriptors 1 and 2 (and so every child process and C++
library) write to the log, as does `print`; only what our code writes to `sys.stderr` reaches the
terminal, with a copy in the log. In `terminated`, SIGTERM ends the block as Ctrl-C does;
`noting_interrupts` remembers a Ctrl-C that a library turned into another error.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOBase
from pathlib import Path
from types import FrameType
from typing import TextIO

from infra.console.progress import LOG_EVERY_S

CLEAR_LINE = "\x1b[2K"
INTERRUPTED = threading.Event()
"""Set by a Ctrl-C within `noting_interrupts`; after it nothing is retried, whatever is raised."""


class _Log(TextIOBase):
    """The log file as a stream whose writes never fail, so that a full disk can be reported."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(self.handle, text.encode(errors="backslashreplace"))
        return len(text)

    def fileno(self) -> int:
        return self.handle

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self.handle)


class _Tee(TextIOBase):
    """Writes to the terminal, and whole lines to the log.

    A line that is rewritten on the terminal is written to the log every LOG_EVERY_S seconds.
    """

    def __init__(self, terminal: TextIO, log: TextIOBase) -> None:
        self.terminal, self.log = terminal, log
        self.line = ""
        self.noted_s = time.monotonic()

    def write(self, text: str) -> int:
        self.terminal.write(text)
        *whole, self.line = (self.line + text).split("\n")
        for line in whole:
            self.log.write(_as_last_written(line) + "\n")
        if "\r" in self.line:
            self.line = "\r" + _as_last_written(self.line)
            if time.monotonic() - self.noted_s >= LOG_EVERY_S:
                self.log.write(self.line[1:] + "\n")
                self.noted_s = time.monotonic()
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def fileno(self) -> int:
        return self.log.fileno()


def _as_last_written(line: str) -> str:
    return line.rpartition("\r")[2].removeprefix(CLEAR_LINE)


@contextmanager
def quiet_terminal(log_path: Path) -> Iterator[Path]:
    """Append everything but our own `sys.stderr` lines to `log_path` while the block runs."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved_stdout, saved_stderr = os.dup(1), os.dup(2)
    root_logger = logging.getLogger()
    with closing(_Log(log_path)) as log, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        root_logger.addHandler(handler)
        logging.captureWarnings(True)
        raises, logging.raiseExceptions = logging.raiseExceptions, False
        try:
            with redirect_stdout(log), redirect_stderr(_Tee(terminal, log)):
                yield log_path
        finally:
            logging.raiseExceptions = raises
            logging.captureWarnings(False)
            root_logger.removeHandler(handler)
            os.dup2(saved_stdout, 1)
            os.dup2(saved_stderr, 2)
            os.close(saved_stdout)
            os.close(saved_stderr)


@contextmanager
def terminated() -> Iterator[None]:
    """End the block on SIGTERM, which service managers send, as on Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Let Ctrl-C set INTERRUPTED before it raises, and end the block as KeyboardInterrupt.

    Prefect, Ray and Arrow may turn it into an error of their own, depending on the line that it
    hits.
    """

    def note(number: int, frame: FrameType | None) -> None:
        INTERRUPTED.set()
        signal.default_int_handler(number, frame)

    INTERRUPTED.clear()
    # A shell's background job ignores SIGINT.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""Lines for a log that are written in a thread: a reader that does not read stops nobody.

Lines that do not fit into the queue are dropped and counted.
"""

import io
import logging
import os
import time
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from typing import TextIO

BATCH_S = 0.1
"""Seconds that lines are collected before they are written together."""
MAX_WAITING_CHARS = 1 << 20
"""Maximum characters in the queue."""
CLOSE_S = 1.0
"""Maximum seconds that `close` waits for the reader."""


class LineWriter:
    """Writes lines in a thread of its own, which begins with the first of them."""

    def __init__(
        self, write: Callable[[Sequence[str]], None], name_dropped: Callable[[int], str]
    ) -> None:
        """`write` writes lines and may block; `name_dropped` returns the line that tells how many
        were dropped.
        """
        self._write, self._name_dropped = write, name_dropped
        self._changed = Condition()
        self._waiting: list[str] = []
        self._waiting_chars = self._untold = 0
        self._is_closed = False
        self._thread: Thread | None = None
        self.dropped = 0
        """Lines that were dropped since the start."""

    def put(self, line: str) -> None:
        """Add a line without waiting, or drop it."""
        with self._changed:
            if self._waiting_chars + len(line) > MAX_WAITING_CHARS:
                self.dropped += 1
                self._untold += 1
                return
            self._waiting.append(line)
            self._waiting_chars += len(line)
            if self._thread is None:
                self._thread = Thread(target=self._work, name="write-log", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Write the lines that wait, if the reader takes them within CLOSE_S; end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while lines := self._next():
            try:
                self._write(lines)
            except (OSError, ValueError):  # the reader has gone, or the stream is closed
                with self._changed:
                    self.dropped += len(lines)

    def _next(self) -> list[str]:
        """Wait for lines and return them; return none once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            self._changed.wait_for(lambda: self._is_closed, BATCH_S)
            lines, self._waiting, self._waiting_chars = self._waiting, [], 0
            if self._untold:
                lines.append(self._name_dropped(self._untold))
                self._untold = 0
            return lines


class LineHandler(logging.Handler):
    """Puts the records of `logging` into a LineWriter."""

    def __init__(self, lines: LineWriter) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Add a record."""
        self.lines.put(self.format(record))


def write_lines(log: TextIO, lines: Sequence[str]) -> None:
    """Write lines to a text stream, past its buffer: a thread that blocks holds no lock of it, on
    which the end of the process would wait.
    """
    text = "".join(f"{line}\n" for line in lines)
    try:
        descriptor = log.fileno()
    except (AttributeError, io.UnsupportedOperation):
        log.write(text)
        log.flush()
        return
    data = text.encode("utf-8", "replace")
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another process made the pipe non-blocking
            time.sleep(BATCH_S)

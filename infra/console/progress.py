"""Progress of a long step: a line that is rewritten on a terminal, or regular lines in a log file.

Writes to stderr only, so that `--json` output on stdout stays clean. Knows nothing of stages, Ray
or Prefect.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

TERMINAL_EVERY_S = 0.2
MB = 10**6
MIN_PROGRESS_BYTES = 100 * MB
"""Smaller transfers show no progress."""
LOG_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """Format seconds for people: `8 s`, `2 min 6 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Shows the count, rate and remaining time of a step.

    `update(done)` takes the absolute count. The rate counts from the first update of this process,
    so that a resumed step does not include earlier work. `note` is a short text after the figures,
    such as a loss.
    """

    def __init__(
        self, label: str, total: int | None, unit: str = "images", stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.started_s = self.shown_s = time.monotonic()
        self.done = 0
        self.first: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._show("", last=True)
        elif self.is_terminal:
            self.stream.write("\n")

    def update(self, done: int, note: str = "") -> None:
        """Set the number of finished units; print it if the last line is old enough."""
        if self.first is None:
            self.first = done
        self.done = done
        every = TERMINAL_EVERY_S if self.is_terminal else LOG_EVERY_S
        if time.monotonic() - self.shown_s >= every:
            self._show(note)

    def _show(self, note: str, last: bool = False) -> None:
        now = time.monotonic()
        elapsed = max(now - self.started_s, 1e-9)
        rate = (self.done - (self.first or 0)) / elapsed
        parts = [
            f"{self.label:<10}",
            f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}",
            self.unit,
        ]
        if self.total:
            parts.append(f"{self.done / self.total:4.0%}")
        if rate > 0:
            parts.append(f"{rate:,.1f}/s" if rate < 10 else f"{rate:,.0f}/s")
        if last:
            parts.append(f"in {duration(elapsed)}")
        elif self.total and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        if note:
            parts.append(note)
        line = "  ".join(parts)
        if self.is_terminal:
            self.stream.write(f"\r\x1b[2K{line}" + ("\n" if last else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
        self.shown_s = now


@contextmanager
def transfer(
    label: str, total_bytes: int, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """Show the progress of a large transfer while the block runs.

    Yields a function that takes the number of bytes moved since its last call, from any thread.
    """
    if total_bytes < MIN_PROGRESS_BYTES:
        yield lambda _: None
        return
    guard = threading.Lock()
    moved_total = 0
    with Progress(label, total_bytes // MB, "MB", stream) as progress:
        progress.update(0)

        def tell(moved_bytes: int) -> None:
            nonlocal moved_total
            with guard:
                moved_total += moved_bytes
                progress.update(moved_total // MB)

        yield tell

"""Memory that this process holds itself: its own pages, without those of mapped files.

Reads /proc; the figures are 0 on systems without it.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

STATUS = Path("/proc/self/status")
LOOK_S = 0.02


def held_bytes() -> int:
    """Return the bytes of memory that this process holds itself now."""
    if not STATUS.exists():
        return 0
    return next(
        (
            int(line.split()[1]) * 1024
            for line in STATUS.read_text().splitlines()
            if line.startswith("RssAnon")
        ),
        0,
    )


class PeakMemory:
    """Measures the memory of this process fifty times a second inside the block."""

    def __init__(self) -> None:
        self.bytes = 0
        """Maximum of the bytes held, minus the bytes held at the start of the block."""

    def __enter__(self) -> Self:
        self._before, self._over = held_bytes(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._over.wait(LOOK_S)
            self.bytes = max(self.bytes, held_bytes() - self._before)

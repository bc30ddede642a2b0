"""The request log: JSON lines, written ten times a second."""

import asyncio
import json
import time
from typing import Any, TextIO

LOG_S = 0.1


class Lines:
    """A log of JSON lines, written together LOG_S after the first of them at most: the event loop
    waits for every write.
    """

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._waiting: list[str] = []

    def add(self, **facts: Any) -> None:
        """Add a line."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(LOG_S, self.write)
        line = json.dumps(
            {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}, ensure_ascii=True
        )
        self._waiting.append(line + "\n")

    def write(self) -> None:
        """Write what has been added."""
        if not self._waiting:
            return
        lines, self._waiting = "".join(self._waiting), []
        self._log.write(lines)
        self._log.flush()

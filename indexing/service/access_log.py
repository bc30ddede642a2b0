"""The request log: JSON lines, written ten times a second."""

import asyncio
import json
import time
from typing import Any, TextIO

LOG_S = 0.1


class Lines:
    """A log of JSON lines, which are written together at most LOG_S after the first of them."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._waiting: list[str] = []

    def add(self, **fields: Any) -> None:
        """Add a line."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(LOG_S, self.write)
        line = json.dumps(
            {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields},
            ensure_ascii=True,
        )
        self._waiting.append(line + "\n")

    def write(self) -> None:
        """Write the lines that were added."""
        if not self._waiting:
            return
        lines, self._waiting = "".join(self._waiting), []
        self._log.write(lines)
        self._log.flush()

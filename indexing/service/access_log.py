"""The request log: JSON lines, written in a thread and dropped if nobody reads them."""

import json
import time
from functools import partial
from typing import TextIO

from infra.console.line_log import LineWriter, write_lines

Field = str | int | float


class Lines:
    """A log of JSON lines."""

    def __init__(self, log: TextIO) -> None:
        self.writer = LineWriter(partial(write_lines, log), _dropped_line)

    def add(self, **fields: Field) -> None:
        """Add a line."""
        self.writer.put(_line(fields))

    def close(self) -> None:
        """Write what was added and end the thread."""
        self.writer.close()


def _line(fields: dict[str, Field]) -> str:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": now, **fields}, ensure_ascii=True)


def _dropped_line(count: int) -> str:
    return _line({"event": "dropped", "lines": count})

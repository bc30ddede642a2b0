"""A log that nobody reads stops nobody: lines are dropped, counted and told of."""

import io
import logging
import os
from functools import partial
from pathlib import Path

import pytest

from infra.console.line_log import LineHandler, LineWriter, write_lines


def dropped(count: int) -> str:
    return f"{count} lines were dropped"


def test_lines_that_nobody_reads_are_dropped_counted_and_told_of() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as log:
        lines = LineWriter(partial(write_lines, log), dropped)
        for number in range(3000):
            lines.put(f"{number} {'x' * 1000}")
        assert lines.dropped > 1500
        told = f"{lines.dropped} lines were dropped"
        seen = []
        while not seen or seen[-1] != told:
            seen.append(reader.readline().decode().rstrip("\n"))
        numbers = [int(line.split()[0]) for line in seen[:-1]]
        assert numbers == list(range(len(numbers))) and len(numbers) + lines.dropped == 3000
        lines.put("and on")
        assert reader.readline() == b"and on\n"
        lines.close()


def test_a_reader_that_has_gone_does_no_harm() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as log:
        os.close(reading)
        lines = LineWriter(partial(write_lines, log), dropped)
        lines.put("to nobody")
        lines.close()
    assert lines.dropped == 1


@pytest.mark.parametrize("is_file", [True, False])
def test_closing_writes_what_waits(tmp_path: Path, is_file: bool) -> None:
    log = (tmp_path / "log").open("w+") if is_file else io.StringIO()
    lines = LineWriter(partial(write_lines, log), dropped)
    handler = LineHandler(lines)
    handler.emit(logging.LogRecord("a", logging.WARNING, "", 0, "h\u00fcgel %s", ("b",), None))
    lines.put("last")
    lines.close()
    log.seek(0)
    assert log.read() == "h\u00fcgel b\nlast\n"
    log.close()

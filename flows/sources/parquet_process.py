"""Reads parquet lists with `flows.sources.parquet_reader`, a process of limited memory.

One process reads all files of a list, one after another. Knows nothing of recipes.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

import flows.sources.parquet_reader as parquet_reader
from flows.sources.parquet_reader import BATCH, END, ERROR, GROUP, HEAD, MEMORY, MISSING, NAMES
from infra.canonical_url import without_user
from infra.errors import DataError

MEMORY_BYTES = 2 << 30
"""Maximum address space of the process; about a sixth is taken before it reads a file."""


class ParquetProcess:
    """The process, which starts with the first file and ends with the `with` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def read(self, file: Any, wanted: Sequence[str]) -> Iterator[list[str] | pa.RecordBatch]:
        """Yield the names of a file's columns; then, if all wanted ones are there, its rows.

        `file` is fsspec's OpenFile. A batch has the wanted columns, and `row_bytes`; the columns of
        rows with more than MAX_ROW_BYTES are null. Raises ArrowInvalid for a file that cannot be
        parsed, FileNotFoundError, and DataError where its rows do not fit into the process.
        """
        self._process = self._process or _start()
        assert self._process.stdin and self._process.stdout
        pickle.dump((file, list(wanted)), self._process.stdin)
        self._process.stdin.flush()
        where = "the footer"
        while True:
            kind, payload = self._message()
            if kind == NAMES:
                yield list(json.loads(payload))
            elif kind == GROUP:
                where = f"row group {payload.decode()}"
            elif kind == BATCH:
                with pa.ipc.open_stream(payload) as batches:
                    yield from batches
            elif kind == ERROR:
                raise pa.ArrowInvalid(payload.decode())
            elif kind == MISSING:
                raise FileNotFoundError(file.path)
            elif kind == END:
                return
            else:
                raise DataError(
                    f"URL list {without_user(file.path)}: {where} cannot be read within "
                    f"{MEMORY_BYTES >> 20:,} MiB of memory: write the file with smaller row "
                    "groups and values"
                )

    def _message(self) -> tuple[bytes, bytes]:
        """Return kind and payload of the next message; MEMORY if the process has died."""
        assert self._process and self._process.stdout
        head = self._process.stdout.read(HEAD.size)
        if len(head) < HEAD.size:
            return MEMORY, b""
        kind, size_bytes = HEAD.unpack(head)
        return kind, self._process.stdout.read(size_bytes)


def _start() -> "subprocess.Popen[bytes]":
    # The system's allocator reserves no more address space than it uses.
    settings = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", parquet_reader.__file__, str(MEMORY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | settings | threads,
    )

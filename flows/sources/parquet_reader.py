"""Reads untrusted parquet files, in a process that `flows.sources.parquet_process` starts.

A few kilobytes of parquet can hold gigabytes. Here they cost at most this process, whose memory is
limited. Run as a script with a number of bytes of address space, it reads requests from stdin
(pickled tuples from its parent) and writes messages to stdout (HEAD and a payload). Rows of more
than MAX_ROW_BYTES become nulls; the last column of a batch is the size of each row. Knows nothing
of recipes.
"""

import json
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

HEAD = struct.Struct("<cI")
"""Kind of a message and bytes of its payload."""
NAMES, GROUP, BATCH = b"N", b"G", b"B"
"""Kinds of messages: the file's column names (JSON), the number of the row group that follows, rows
(an Arrow stream)."""
ERROR, MISSING, MEMORY, END = b"E", b"F", b"M", b"."
"""The last message about a file: an error (text), no such file, out of memory, the file's end."""
MAX_ROW_BYTES = 64 << 10
"""Maximum bytes of the columns of one row that are read."""
BATCH_ROWS, BATCH_BYTES = 10_000, 32 << 20
"""Rows and, by the sizes that the file declares, bytes that are read at a time."""
MESSAGE_BYTES = 8 << 20
PIECE_BYTES = 1 << 20
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)


def open_bounded(file: Any, wanted: Sequence[str]) -> pq.ParquetFile:
    """Open a parquet file so that it holds one batch of rows in memory, and equal texts once."""
    # Without pre_buffer and with buffer_size, column chunks are read piece by piece.
    options: dict[str, Any] = {"buffer_size": PIECE_BYTES, "pre_buffer": False}
    opened = pq.ParquetFile(file, **options)
    texts = _text_leaves(opened.schema, wanted)
    return pq.ParquetFile(file, metadata=opened.metadata, read_dictionary=texts, **options)


def read_group(opened: pq.ParquetFile, wanted: list[str], number: int) -> Iterator[pa.RecordBatch]:
    """Yield the wanted columns of a row group, and the size of each row in bytes."""
    group = opened.metadata.row_group(number)
    declared = sum(
        max(0, group.column(column).total_uncompressed_size)
        for column in range(group.num_columns)
        if _is_part(group.column(column).path_in_schema, wanted)
    )
    rows = BATCH_BYTES * max(1, group.num_rows) // max(1, declared)
    for batch in opened.iter_batches(
        min(BATCH_ROWS, max(1, rows)), [number], wanted, use_threads=False
    ):
        yield from _bounded(batch.select(wanted))


def _text_leaves(schema: pq.ParquetSchema, wanted: Sequence[str]) -> list[str]:
    """Return the paths of the wanted columns' leaves that hold texts or bytes."""
    leaves = (schema.column(number) for number in range(len(schema)))
    return [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY"
        and leaf.logical_type.type in ("STRING", "NONE")
        and _is_part(leaf.path, wanted)
    ]


def _is_part(path: str, columns: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield the rows in pieces of about MESSAGE_BYTES, without dictionaries and large values."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += row_sizes(column)
    is_small = sizes <= MAX_ROW_BYTES
    row_numbers = pa.array(np.arange(batch.num_rows), mask=~is_small)
    ends = np.cumsum(np.where(is_small, sizes, 0) + 1)
    start = 0
    while start < batch.num_rows:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + MESSAGE_BYTES, side="right")))
        rows = row_numbers.slice(start, stop - start)
        columns = [plain(column.take(rows)) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(
            [*columns, pa.array(sizes[start:stop])], [*batch.schema.names, "row_bytes"]
        )
        start = stop


def row_sizes(column: pa.Array) -> np.ndarray:
    """Return the bytes of each value of a column, int64 (N,): those of its texts; for every other
    value and every element of a list about 8.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        sizes = row_sizes(column.dictionary)
        indices = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
        is_valid = column.is_valid().to_numpy(zero_copy_only=False)
        return (
            np.where(is_valid, sizes[indices], 0) if len(sizes) else np.zeros(len(column), np.int64)
        )
    if any(is_text(kind) for is_text in TEXTS):
        return _numbers(pc.binary_length(column))
    if any(is_list(kind) for is_list in LISTS):
        lengths = _numbers(pc.list_value_length(column))
        sums = np.concatenate([[0], np.cumsum(row_sizes(column.flatten()) + 8)])
        ends = np.cumsum(lengths)
        return np.asarray(sums[ends] - sums[ends - lengths], np.int64)
    if pa.types.is_nested(kind):  # never a caption: it only must not be large
        return np.array([_nested_size(column.slice(n, 1)) for n in range(len(column))], np.int64)
    return np.full(len(column), 8, np.int64)


def _nested_size(value: pa.Array) -> int:
    return len(str(value[0].as_py()))


def _numbers(column: pa.Array) -> np.ndarray:
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def plain(column: pa.Array) -> pa.Array:
    """Return a column without dictionaries, which may hold values of rows that are left out."""
    kind = plain_type(column.type)
    return column if kind == column.type else column.cast(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return a type with the values' type in place of every dictionary."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    return kind


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""

    def send(kind: bytes, payload: bytes | memoryview = b"") -> None:
        answers.write(HEAD.pack(kind, len(payload)))
        answers.write(payload)
        answers.flush()

    while True:
        try:
            opener, wanted = pickle.load(requests)
        except EOFError:
            return
        except Exception as error:  # a file system whose code only the parent finds
            send(ERROR, f"its file system cannot be opened: {error}".encode())
            return
        try:
            with opener as file:
                _answer(file, wanted, send)
        except FileNotFoundError:
            send(MISSING)
        except MemoryError:
            send(MEMORY)
        except Exception as error:  # hostile files raise many types, all for one reason
            send(ERROR, (str(error) or type(error).__name__).splitlines()[0].encode())


def _answer(file: Any, wanted: list[str], send: Callable[..., None]) -> None:
    opened = open_bounded(file, wanted)
    names = opened.schema_arrow.names
    send(NAMES, json.dumps(names).encode())
    for number in range(opened.num_row_groups) if set(wanted) <= set(names) else ():
        send(GROUP, str(number).encode())
        for batch in read_group(opened, wanted, number):
            buffer = pa.BufferOutputStream()
            with pa.ipc.new_stream(buffer, batch.schema) as writer:
                writer.write_batch(batch)
            send(BATCH, memoryview(buffer.getvalue()))
    send(END)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    serve(sys.stdin.buffer, sys.stdout.buffer)

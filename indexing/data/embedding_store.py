"""Reads the embed stage's folder: vectors, memory-mapped from `.npy` parts, and their metadata from
parquet files.

Row i of the metadata belongs to vector i, over all files in the order of their names. Legend: N
rows, D dimensions, B rows of a call.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.errors import DataError
from infra.schemas import open_parquet

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

CHUNK_ROWS = 65_536
"""Rows that are read at a time."""


def read_facts(embed: Path) -> tuple[str, int, int]:
    """Return (clip_key, count, dim) of an embed folder, from its facts.json."""
    facts = json.loads((embed / "facts.json").read_text())
    return facts["clip_key"], int(facts["count"]), int(facts["dim"])


def part_files(folder: Path) -> list[Path]:
    """Return the `.npy` files of a folder in the order of their rows."""
    return sorted(folder.glob("*.npy"))


def open_rows(file: Path) -> NDArray[Any]:
    """Memory-map one file of vectors (n, D)."""
    rows: NDArray[Any] = np.load(file, mmap_mode="r")
    return rows


def open_parts(folder: Path, count: int, dim: int) -> list[NDArray[Any]]:
    """Memory-map the `.npy` files of a folder in the order of their rows.

    Raises DataError unless together they hold `count` vectors of `dim` dimensions.
    """
    parts = [open_rows(file) for file in part_files(folder)]
    is_wrong_dim = any(part.ndim != 2 or part.shape[1] != dim for part in parts)
    if is_wrong_dim or sum(len(part) for part in parts) != count:
        raise DataError(
            f"{folder}: the arrays have the shapes {[part.shape for part in parts]}, but "
            f"facts.json says {count} vectors of {dim}"
        )
    return parts


def chunks(parts: Sequence[NDArray[Any]], first: int = 0) -> Iterator[Floats]:
    """Yield all rows from `first` on in order, at most CHUNK_ROWS at a time, as float32 (n, D)."""
    for part in parts:
        skipped = min(first, len(part))
        first -= skipped
        for start in range(skipped, len(part), CHUNK_ROWS):
            yield np.ascontiguousarray(part[start : start + CHUNK_ROWS], dtype=np.float32)


def take(parts: Sequence[NDArray[Any]], rows: Rows) -> Floats:
    """Return the vectors (..., D) of rows of any shape (...), as float32."""
    ends = np.cumsum([len(part) for part in parts])
    taken = np.empty((*rows.shape, parts[0].shape[1]), np.float32)
    for part, end in zip(parts, ends, strict=True):
        inside = (rows >= end - len(part)) & (rows < end)
        taken[inside] = part[rows[inside] - (end - len(part))]
    return taken


def unit(vectors: Floats) -> Floats:
    """Return the vectors (..., D) scaled to length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def read_metadata(folder: Path, columns: Sequence[str], count: int) -> pa.Table:
    """Read columns of the metadata, one row for each vector.

    Raises DataError unless there are `count` rows.
    """
    table = pa.concat_tables(
        [pq.read_table(file, columns=list(columns)) for file in sorted(folder.glob("*.parquet"))]
    )
    if table.num_rows != count:
        raise DataError(f"{folder}: {table.num_rows} rows of metadata for {count} vectors")
    return table


def metadata_batches(folder: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield columns of the metadata in the order of rows, at most CHUNK_ROWS rows at a time."""
    for file in sorted(folder.glob("*.parquet")):
        with open_parquet(file) as opened:
            yield from opened.iter_batches(CHUNK_ROWS, columns=list(columns))


def metadata_of(folder: Path, rows: Rows, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return columns of the rows (B,), in their order; only one batch of the metadata is in memory
    at a time.
    """
    records: dict[int, dict[str, Any]] = {}
    distinct, start = np.unique(rows), 0
    for batch in metadata_batches(folder, columns):
        inside = distinct[(distinct >= start) & (distinct < start + batch.num_rows)]
        records |= zip(
            inside.tolist(), batch.take(pa.array(inside - start)).to_pylist(), strict=True
        )
        start += batch.num_rows
    return [records[row] for row in rows.tolist()]

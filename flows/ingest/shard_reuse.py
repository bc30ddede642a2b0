"""Copies the images of URLs that are unchanged in the list from the previous ingest's shards.

A row is unchanged if everything that the list says of it is. Only URLs are reused: a file in a
local folder may have changed under its name and is read over loopback anyway. Rows that the list no
longer has are removed from the shards. Memory: 8 bytes per row.
"""

import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.row_hash import row_hashes
from infra.schemas import URLS, open_parquet
from infra.storage.atomic_files import atomic_file, link_or_copy, put

SAME = (
    "image_size_px",
    "resize",
    "encode",
    "images_per_shard",
    "max_image_bytes",
    "max_image_pixels",
    "allow_private",
    "robots",
)
"""Fields of [data] that decide what becomes of a URL."""
COMPARED = tuple(name for name in URLS.names if name not in ("key", "url"))
BATCH_ROWS = 10_000


def is_renewable(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Say whether shards made under the section `before` are what the section `now` would make of
    the same URLs.
    """
    return all(name in before and before[name] == now[name] for name in SAME)


def take_over(previous: Path, table: Path, shards: Path) -> int:
    """Put the shards of a former ingest into `shards`, without the rows that `table` (urls.parquet)
    lacks; return their number.

    They keep their numbers, so that new ones follow. What stands there under a final name is whole,
    so a killed call is repeated.
    """
    shards.mkdir(parents=True, exist_ok=True)
    listed = np.sort(
        np.concatenate(
            [marks(batch) for batch in open_parquet(table).iter_batches(BATCH_ROWS)]
            or [np.empty(0, np.uint64)]
        )
    )
    files = sorted((previous / "shards").glob("*.parquet"), key=lambda file: int(file.stem))
    for file in files:
        if not (shards / f"{file.stem}.tar").exists():
            rows = pq.read_table(file)
            _copy(file, rows, np.isin(marks(rows), listed) & is_url(rows), shards)
    return int(files[-1].stem) + 1 if files else 0


def unknown_rows(table: Path, shards: Path, count: int, out: Path) -> Path:
    """Write the rows of `table` that none of the first `count` shards holds, as `out`; return
    it.
    """
    hashes = [
        marks(pq.read_table(file))
        for file in (shards / f"{number:05d}.parquet" for number in range(count))
        if file.exists()
    ]
    sorted_hashes = np.sort(np.concatenate(hashes or [np.empty(0, np.uint64)]))
    with atomic_file(out) as part, pq.ParquetWriter(part, URLS) as writer:
        for batch in open_parquet(table).iter_batches(BATCH_ROWS):
            writer.write_batch(batch.filter(pa.array(~np.isin(marks(batch), sorted_hashes))))
    return out


def marks(rows: pa.RecordBatch | pa.Table) -> np.ndarray:
    """Return a 64-bit hash of what the list says of each row."""
    columns = [rows.column(name).to_pylist() for name in COMPARED]
    return row_hashes(json.dumps(values).encode() for values in zip(*columns, strict=True))


def is_url(rows: pa.Table) -> np.ndarray:
    """Say of each row whether its picture came from the network."""
    return np.array(
        [
            origin.startswith(("http://", "https://"))
            for origin in rows.column("origin").to_pylist()
        ],
        bool,
    )


def _copy(file: Path, rows: pa.Table, is_reused: np.ndarray, shards: Path) -> None:
    """Put one shard under its name, its tar last: linked where all of it is kept, else written anew
    without the rest.
    """
    target = shards / file.name
    if is_reused.all():
        link_or_copy(file, target)
        link_or_copy(file.with_suffix(".tar"), target.with_suffix(".tar"))
        return
    keys = set(rows.filter(pa.array(is_reused)).column("key").to_pylist())
    part = shards / f".{file.stem}.renewed"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    pq.write_table(rows.filter(pa.array(is_reused)), part / file.name)
    with (
        tarfile.open(file.with_suffix(".tar"), "r:") as old,
        tarfile.open(part / f"{file.stem}.tar", "w:", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in old:
            if member.name.partition(".")[0] in keys:
                new.addfile(member, old.extractfile(member))
    put(part, [file.name, f"{file.stem}.tar"], shards)
    part.rmdir()

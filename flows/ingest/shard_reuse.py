"""Reuse the shards of the previous ingest for rows that are unchanged in the list.

A row is unchanged if all its columns in the list are the same. Only rows with http(s) URLs are
reused: a local file may have changed under the same name, and reading it over loopback is cheap.
Rows that are no longer in the list are removed from the shards. A shard that keeps all rows is
linked or copied inside the store; a Ray task rewrites one that loses rows. Memory: 8 bytes per row.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.ingest.row_outcomes import ShardFacts, count_outcomes
from infra.compute.cluster import Cluster, spread
from infra.row_hash import row_hashes
from infra.schemas import URLS, open_parquet
from infra.storage.atomic_files import atomic_file
from infra.storage.manifests import Committed
from infra.storage.stage_files import StageFiles
from infra.storage.stage_output import StageOutput

IMAGE_FIELDS = (
    "image_size_px",
    "resize",
    "encode",
    "images_per_shard",
    "max_image_bytes",
    "max_image_pixels",
    "allow_private",
    "robots",
)
"""Fields of [data] that determine the stored image of a URL."""
LISTED_COLUMNS = tuple(name for name in URLS.names if name not in ("key", "url"))
BATCH_ROWS = 10_000


def is_reusable(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two [data] sections give the same shards for the same URLs."""
    return all(name in before and before[name] == now[name] for name in IMAGE_FIELDS)


class CopiedFacts(ShardFacts):
    """Facts in the record of a shard that was taken over."""

    copied_from: str
    """Digest of the ingest that it was copied from."""


def take_over(previous: Committed, table: Path, output: StageOutput, cluster: Cluster) -> int:
    """Put the shards of `previous` into `output`, without rows that are not in `table`
    (urls.parquet); return the first free shard number.

    The shards keep their numbers and are recorded as parts; new shards follow. Shards that an
    earlier, killed call finished are kept if they come from the same ingest.
    """
    finished = output.finished_parts()
    for part in list(finished):
        if finished[part]["facts"].get("copied_from", previous.digest) != previous.digest:
            output.forget(part)
            del finished[part]
    listed = np.sort(
        np.concatenate(
            [listing_hashes(batch) for batch in open_parquet(table).iter_batches(BATCH_ROWS)]
            or [np.empty(0, np.uint64)]
        )
    )
    numbers = [int(PurePosixPath(name).stem) for name in previous.files.names("shards/*.parquet")]
    changed = _copy_unchanged(
        previous, [n for n in sorted(numbers) if f"{n:05d}" not in finished], listed, output
    )
    first = next(changed, None)
    if first:
        cluster.start()
        for _ in spread(cluster.config, _rewrite, chain([first], changed)):
            pass
    return max(numbers, default=-1) + 1


Rewriting = tuple[StageOutput, StageFiles, int, np.ndarray, str]


def _copy_unchanged(
    previous: Committed, numbers: list[int], listed: np.ndarray, output: StageOutput
) -> Iterator[Rewriting]:
    """Copy and record shards that keep all rows; yield `_rewrite`'s arguments for the others."""
    files = {file["path"]: file for file in previous.manifest["files"]}
    for number in numbers:
        rows = _read_rows(previous.files, number)
        is_reused = np.isin(listing_hashes(rows), listed) & is_url(rows)
        if not is_reused.all():
            yield output, previous.files, number, is_reused, previous.digest
            continue
        names = [f"shards/{number:05d}{suffix}" for suffix in (".parquet", ".tar")]
        entries = [output.copy(f"{previous.path}/{name}", files[name]) for name in names]
        output.record(f"{number:05d}", entries, dict(_facts(rows, previous.digest)))


def _rewrite(
    output: StageOutput, files: StageFiles, number: int, is_reused: np.ndarray, digest: str
) -> None:
    """Write a shard with only the reused rows, and record it. Runs as a Ray task."""
    name = f"{number:05d}"
    rows = _read_rows(files, number).filter(pa.array(is_reused))
    keys = set(rows.column("key").to_pylist())
    with output.temporary_folder() as folder:
        parquet, tar = folder / f"{name}.parquet", folder / f"{name}.tar"
        pq.write_table(rows, parquet)
        with (
            files.open(f"shards/{name}.tar") as source,
            tarfile.open(fileobj=source, mode="r:") as old,
            tarfile.open(tar, "w:", format=tarfile.USTAR_FORMAT) as new,
        ):
            for member in old:
                if member.name.partition(".")[0] in keys:
                    new.addfile(member, old.extractfile(member))
        entries = [output.put(file, f"shards/{file.name}") for file in (parquet, tar)]
    output.record(name, entries, dict(_facts(rows, digest)))


def _read_rows(files: StageFiles, number: int) -> pa.Table:
    with files.open(f"shards/{number:05d}.parquet") as file:
        return pq.read_table(file)


def _facts(rows: pa.Table, digest: str) -> CopiedFacts:
    # The previous ingest may have requested a row in several shards.
    return {"outcomes": dict(count_outcomes(rows)), "is_first": False, "copied_from": digest}


def new_rows(table: Path, output: StageOutput, numbers: list[int], file: Path) -> Path:
    """Write the rows of `table` that are in none of these shards of `output` to `file`; return
    `file`.
    """
    hashes = []
    for number in numbers:
        with output.open(f"shards/{number:05d}.parquet") as opened:
            hashes.append(listing_hashes(pq.read_table(opened)))
    sorted_hashes = np.sort(np.concatenate(hashes or [np.empty(0, np.uint64)]))
    with atomic_file(file) as part, pq.ParquetWriter(part, URLS) as writer:
        for batch in open_parquet(table).iter_batches(BATCH_ROWS):
            writer.write_batch(
                batch.filter(pa.array(~np.isin(listing_hashes(batch), sorted_hashes)))
            )
    return file


def listing_hashes(rows: pa.RecordBatch | pa.Table) -> np.ndarray:
    """Return a 64-bit hash of each row's columns in the list (LISTED_COLUMNS)."""
    columns = [rows.column(name).to_pylist() for name in LISTED_COLUMNS]
    return row_hashes(json.dumps(values).encode() for values in zip(*columns, strict=True))


def is_url(rows: pa.Table) -> np.ndarray:
    """Return a mask of the rows whose origin is an http or https URL."""
    return np.array(
        [
            origin.startswith(("http://", "https://"))
            for origin in rows.column("origin").to_pylist()
        ],
        bool,
    )

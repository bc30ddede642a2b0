"""Checks once before a job which images of a table can be read from the shards; all its workers and
attempts use the result.

Compares ingest's `shards/` with the keep list's positions and SHA-256; writes `left_out.json` into
the job's work folder. Memory: some 150 bytes for each pair.
"""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.errors import DataError
from infra.storage.atomic_files import atomic_file
from infra.storage.shard_reader import ShardReader
from infra.storage.work_folder import WorkFolder
from training.data.image_reader import MEND, READERS
from training.sections.loop_section import OnBroken

LEFT_OUT = "left_out.json"
READ = ["key", "shard", "offset", "size_bytes", "sha256"]
"""Columns of a keep list that are needed here."""


def settle(
    table: pa.Table, shards: ShardReader, on_broken: OnBroken, work: WorkFolder
) -> dict[str, int]:
    """Check every shard of a table with the columns READ; return the number of unreadable images by
    reason.

    `stop`: a missing or truncated shard raises DataError here, an altered image when it is read.
    `skip`: every image is read and compared with its SHA-256, and `work/left_out.json` names the
    broken ones (`shard_missing`, `shard_truncated`, `checksum`); `is_readable` tells the workers.
    The result of a killed attempt is reused. Raises DataError if no image can be read.
    """
    decided = work.fetch(LEFT_OUT)
    if not decided:
        names = table["shard"].dictionary_encode().combine_chunks()
        by_shard = np.argsort(names.indices.to_numpy(), kind="stable")
        ends = np.cumsum(np.bincount(names.indices.to_numpy(), minlength=len(names.dictionary)))
        parts = zip(names.dictionary.to_pylist(), np.split(by_shard, ends[:-1]), strict=True)
        with ThreadPoolExecutor(READERS) as readers:
            faults = list(
                readers.map(
                    lambda part: _broken(shards, part[0], table.take(part[1]), on_broken == "skip"),
                    parts,
                )
            )
        left_out = {key: reason for part in faults for key, reason in part.items()}
        if left_out and on_broken == "stop":
            shard, first = next(
                (shard, part)
                for shard, part in zip(names.dictionary.to_pylist(), faults, strict=True)
                if part
            )
            reason = next(iter(first.values())).removeprefix("shard_")
            raise DataError(
                f"shard {shard} in {shards} is {reason} ({len(left_out)} of {table.num_rows} "
                f"pictures are lost): {MEND}"
            )
        decided = work.path(LEFT_OUT)
        with atomic_file(decided) as part_file:
            part_file.write_text(json.dumps(left_out))
        work.publish(LEFT_OUT)
    counts = Counter(json.loads(decided.read_text()).values())
    if counts.total() == table.num_rows:
        raise DataError(
            f"none of {table.num_rows} pictures in {shards} can be read ({dict(counts)}): delete "
            "that ingest folder and run again"
        )
    return dict(sorted(counts.items()))


def is_readable(table: pa.Table, work: WorkFolder) -> NDArray[np.bool_]:
    """Return for every row, bool (rows,), whether `settle` found it readable."""
    return is_left_in(table, left_out_keys(work))


def left_out_keys(work: WorkFolder) -> pa.Array:
    """Return the keys of the images that `settle` found unreadable."""
    return pa.array(list(json.loads(work.fetched(LEFT_OUT).read_text())), pa.string())


def is_left_in(table: pa.Table, left_out: pa.Array) -> NDArray[np.bool_]:
    """Return for every row, bool (rows,), whether its key is not among those left out."""
    return pc.invert(pc.is_in(table["key"], left_out)).to_numpy()


def _broken(shards: ShardReader, shard: str, members: pa.Table, is_read: bool) -> dict[str, str]:
    """Return the reason for every unreadable image of a shard.

    is_read: also compare each image's SHA-256, which reads the whole file.
    """
    try:
        size_bytes = shards.size_bytes(shard)
    except FileNotFoundError:
        return dict.fromkeys(members["key"].to_pylist(), "shard_missing")
    is_cut = pc.greater(pc.add(members["offset"], members["size_bytes"]), size_bytes)
    reasons = dict.fromkeys(members.filter(is_cut)["key"].to_pylist(), "shard_truncated")
    if is_read:
        for member in members.filter(pc.invert(is_cut)).to_pylist():
            data = shards.read(shard, member["offset"], member["size_bytes"])
            if hashlib.sha256(data).hexdigest() != member["sha256"]:
                reasons[member["key"]] = "checksum"
    return reasons

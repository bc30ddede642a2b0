"""Shards lie: which pictures of a table can be read at all, decided once before a job, and the same
for all its workers and attempts.

Reads ingest's `shards/` and compares with the keep list's places and SHA-256; writes
`left_out.json` into the job's work folder. Memory: the table's places, some 150 bytes a pair.
"""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.errors import DataError
from training.data.image_reader import MEND, READERS
from training.optim.step import OnBroken

LEFT_OUT = "left_out.json"
READ = ["key", "shard", "offset", "size_bytes", "sha256"]
"""The columns of a keep list that are read here."""


def settle(table: pa.Table, shards: Path, on_broken: OnBroken, work: Path) -> dict[str, int]:
    """Look at every shard of a table with READ once before a job; return how many pictures are left
    out, by reason.

    `stop`: a shard that is missing or too short raises DataError here, an altered picture when it
    is read. `skip`: every picture is read and compared with its SHA-256, and `work/left_out.json`
    names those that are broken (`shard_missing`, `shard_truncated`, `checksum`); `is_kept` tells
    the workers. What a killed attempt decided stands.
    """
    decided = work / LEFT_OUT
    if not decided.exists():
        names = table["shard"].dictionary_encode().combine_chunks()
        by_shard = np.argsort(names.indices.to_numpy(), kind="stable")
        ends = np.cumsum(np.bincount(names.indices.to_numpy(), minlength=len(names.dictionary)))
        parts = zip(names.dictionary.to_pylist(), np.split(by_shard, ends[:-1]), strict=True)
        with ThreadPoolExecutor(READERS) as readers:
            faults = list(
                readers.map(
                    lambda part: _broken(
                        shards / part[0], table.take(part[1]), on_broken == "skip"
                    ),
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
        tmp_path = work / f"{LEFT_OUT}.{os.getpid()}.tmp"
        tmp_path.write_text(json.dumps(left_out))
        tmp_path.replace(decided)
    counts = Counter(json.loads(decided.read_text()).values())
    if counts.total() == table.num_rows:
        raise DataError(
            f"none of {table.num_rows} pictures in {shards} can be read ({dict(counts)}): delete "
            "that ingest folder and run again"
        )
    return dict(sorted(counts.items()))


def is_readable(table: pa.Table, work: Path) -> NDArray[np.bool_]:
    """Say of every row, bool (rows,), whether `settle` kept it."""
    left_out = pa.array(list(json.loads((work / LEFT_OUT).read_text())), pa.string())
    return pc.invert(pc.is_in(table["key"], left_out)).to_numpy()


def _broken(shard: Path, members: pa.Table, is_read: bool) -> dict[str, str]:
    """Return the reason for every picture of a shard that cannot be had; whole files are only read
    where `is_read`.
    """
    if not shard.is_file():
        return dict.fromkeys(members["key"].to_pylist(), "shard_missing")
    size_bytes = shard.stat().st_size
    is_cut = pc.greater(pc.add(members["offset"], members["size_bytes"]), size_bytes)
    reasons = dict.fromkeys(members.filter(is_cut)["key"].to_pylist(), "shard_truncated")
    if is_read:
        with shard.open("rb") as file:
            for member in members.filter(pc.invert(is_cut)).to_pylist():
                file.seek(member["offset"])
                if hashlib.sha256(file.read(member["size_bytes"])).hexdigest() != member["sha256"]:
                    reasons[member["key"]] = "checksum"
    return reasons

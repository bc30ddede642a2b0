"""Shards lie: which pictures of a table can be read at all, decided once before a job, and the same for all its workers and attempts.

Reads ingest's `shards/` and compares with the keep list's places and SHA-256; writes `left_out.json` into the job's work folder.
Memory: the table's places.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra.errors import DataError
from training.loop import OnBroken
from training.pictures import MEND, READERS

LEFT_OUT = "left_out.json"


def settle(table: pa.Table, shards: Path, on_broken: OnBroken, work: Path) -> dict[str, int]:
    """Look at every shard of the table once before a job; return how many pictures are left out, by reason.

    `stop`: a shard that is missing or too short raises DataError here, an altered picture when it is read. `skip`: every picture is read
    and compared with its SHA-256, and `work/left_out.json` names those that are broken (`shard_missing`, `shard_truncated`,
    `checksum`); `is_kept` tells the workers. What a killed attempt decided stands.
    """
    decided = work / LEFT_OUT
    if not decided.exists():
        places = [(row["key"], row) for row in table.select(["key", "shard", "offset", "size_bytes", "sha256"]).to_pylist()]
        by_shard: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for key, place in places:
            by_shard.setdefault(place["shard"], []).append((key, place))
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(lambda name: _broken(shards / name, by_shard[name], on_broken == "skip"), by_shard)
            left_out = {key: reason for part in found for key, reason in part.items()}
        if left_out and on_broken == "stop":
            key, reason = next(iter(left_out.items()))
            shard = next(place["shard"] for other, place in places if other == key)
            raise DataError(
                f"shard {shard} in {shards} is {reason.removeprefix('shard_')} ({len(left_out)} of {len(places)} pictures are lost): {MEND}"
            )
        aside = work / f"{LEFT_OUT}.{os.getpid()}.tmp"
        aside.write_text(json.dumps(left_out))
        aside.replace(decided)
    counts = Counter(json.loads(decided.read_text()).values())
    if counts.total() == table.num_rows:
        raise DataError(
            f"none of {table.num_rows} pictures in {shards} can be read ({dict(counts)}): delete that ingest folder and run again"
        )
    return dict(sorted(counts.items()))


def is_kept(table: pa.Table, work: Path) -> NDArray[np.bool_]:
    """Say of every row, bool (rows,), whether `settle` kept it."""
    left_out = json.loads((work / LEFT_OUT).read_text())
    return np.array([key not in left_out for key in table["key"].to_pylist()], bool)


def _broken(shard: Path, places: Sequence[tuple[str, dict[str, Any]]], is_read: bool) -> dict[str, str]:
    """Return the reason for every picture of a shard that cannot be had; whole files are only read where `is_read`."""
    if not shard.is_file():
        return {key: "shard_missing" for key, _ in places}
    size_bytes, found = shard.stat().st_size, {}
    with shard.open("rb") as file:
        for key, place in places:
            if place["offset"] + place["size_bytes"] > size_bytes:
                found[key] = "shard_truncated"
            elif is_read:
                file.seek(place["offset"])
                if hashlib.sha256(file.read(place["size_bytes"])).hexdigest() != place["sha256"]:
                    found[key] = "checksum"
    return found

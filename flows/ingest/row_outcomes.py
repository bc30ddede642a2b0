"""Outcomes of an ingest's rows, read from the tables of its shards one by one.

Says which rows to try again, and which were dropped and why. A row may appear in several shards;
the last one counts. Memory: 12 bytes per failure and the table of one shard.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.ingest.http_fetch import PASSING
from infra.schemas import DROPPED, URLS, open_parquet, shard_rows
from infra.storage.atomic_files import atomic_file

GROUP_ROWS = 65_536


@dataclass
class Outcomes:
    """Return the final state of the rows of the first `count` shards."""

    shards: Path
    count: int
    succeeded: int = 0
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Those whose last word is a failure, sorted."""
    last: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """The shard in which each of them stands last."""

    def failures(self) -> Iterator[pa.Table]:
        """Yield the rows that have failed for good so far, a shard's at a time."""
        for number in range(self.count):
            rows = pq.read_table(self.shards / f"{number:05d}.parquet")
            rows = rows.filter(pc.not_equal(rows["status"], "success"))
            matches, positions = _find(_numbers(rows["sample"]), self.samples)
            matches[matches] = self.last[positions[matches]] == number
            if matches.any():
                yield rows.filter(pa.array(matches))


def read_outcomes(shards: Path, count: int) -> Outcomes:
    """Read which rows of shards 0..count-1 succeeded and which failed last time they were asked."""
    outcomes = Outcomes(shards, count)
    failed, last_shards = [outcomes.samples], [outcomes.last]
    for number in range(count):
        samples, is_good = _statuses(shards, number)
        failed.append(samples[~is_good])
        last_shards.append(np.full(len(failed[-1]), number, np.int32))
        outcomes.succeeded += int(is_good.sum())
    samples, last = np.concatenate(failed), np.concatenate(last_shards)
    order = np.argsort(
        samples, kind="stable"
    )  # those of one sample stay in the order of their shards
    samples, last = samples[order], last[order]
    is_last = np.append(samples[1:] != samples[:-1], True) if len(samples) else np.empty(0, bool)
    samples, last = samples[is_last], last[is_last]
    is_mended = np.zeros(len(samples), bool)
    for number in range(count):
        requested, is_good = _statuses(shards, number)
        matches, positions = _find(requested[is_good], samples)
        is_mended[positions[matches]] = True
    outcomes.samples, outcomes.last = samples[~is_mended], last[~is_mended]
    return outcomes


def rows_to_ask_again(shards: Path, count: int, file: Path) -> Path:
    """Write the rows of shards 0..count-1 that failed last time for a reason that may pass as
    `file` (schema URLS); return it.
    """
    with atomic_file(file) as part, pq.ParquetWriter(part, URLS) as writer:
        for rows in read_outcomes(shards, count).failures():
            passes = [split_problem(*problem)[0] in PASSING for problem in _problems(rows)]
            chosen = rows.filter(pa.array(passes, pa.bool_()))
            writer.write_table(shard_rows(chosen).select(URLS.names).cast(URLS))
    return file


def write_dropped(
    early: Path, outcomes: Outcomes, out: Path
) -> tuple[Counter[str], Counter[str], dict[str, str]]:
    """Write `early`'s rows and all that failed as `out` (schema DROPPED).

    Returns the reasons of the early ones, those of the failures, and an example of each of the
    latter.
    """
    before: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with pq.ParquetWriter(out, DROPPED) as writer:
        for batch in open_parquet(early).iter_batches(GROUP_ROWS):
            before.update(batch.column("reason").to_pylist())
            writer.write_batch(batch)
        pending: list[pa.Table] = []
        for rows in outcomes.failures():
            words = [split_problem(*problem) for problem in _problems(rows)]
            origins = rows["origin"].to_pylist()
            reasons.update(reason for reason, _ in words)
            for origin, (reason, detail) in zip(origins, words, strict=True):
                examples.setdefault(reason, f"{origin} ({detail})")
            columns = [
                rows["sample"],
                rows["origin"],
                *(pa.array(list(column), pa.string()) for column in zip(*words, strict=True)),
            ]
            pending.append(pa.table(columns, schema=DROPPED))
            if sum(table.num_rows for table in pending) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(pending))
                pending.clear()
        if pending:
            writer.write_table(pa.concat_tables(pending))
    return before, reasons, examples


def split_problem(status: str, message: str | None) -> tuple[str, str]:
    """Return reason and detail of a failed row; what img2dataset itself could not decode has its
    own words.
    """
    if status == "failed_to_resize":
        return "decode_error", message or ""
    reason, _, detail = (message or "").partition(": ")
    return reason, detail


def _problems(rows: pa.Table) -> Iterator[tuple[str, str | None]]:
    return zip(rows["status"].to_pylist(), rows["error_message"].to_pylist(), strict=True)


def _statuses(shards: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = pq.read_table(shards / f"{number:05d}.parquet", columns=["sample", "status"])
    return _numbers(rows["sample"]), pc.equal(rows["status"], "success").to_numpy().astype(bool)


def _numbers(keys: pa.ChunkedArray) -> np.ndarray:
    """Return sample keys, 16 hex digits each (`infra.schemas.sample_key`), as the numbers that they
    are.
    """
    return np.frombuffer(bytes.fromhex("".join(keys.to_pylist())), ">u8").astype(np.uint64)


def _find(wanted: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `wanted` stand in the sorted `among`, and where."""
    positions = np.searchsorted(among, wanted)
    matches = np.zeros(len(wanted), bool)
    inside = positions < len(among)
    matches[inside] = among[positions[inside]] == wanted[inside]
    return matches, positions

"""Outcomes of an ingest's rows, read from the parquet tables of its shards.

Finds the rows to retry, and the dropped rows with their reasons. A row may appear in several
shards; the last one counts. A shard without failures is read only if it may resolve an earlier
failure; its record has the counts. Memory: 12 bytes per failure and the tables of a few shards.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.ingest.http_fetch import TEMPORARY_REASONS
from infra.schemas import DROPPED, URLS, open_parquet, shard_rows
from infra.storage.atomic_files import atomic_file
from infra.storage.stage_output import StageOutput

GROUP_ROWS = 65_536
READ_THREADS = 8
SUCCESS = "success"


class ShardFacts(TypedDict):
    """Facts in the record of a finished shard."""

    outcomes: dict[str, int]
    """Number of rows by outcome: "success" or the reason of the failure."""
    is_first: bool
    """Whether all its rows were requested for the first time."""


def count_outcomes(rows: pa.Table) -> Counter[str]:
    """Count the rows of a shard's table by outcome; it needs the columns status, error_message."""
    failed = rows.filter(pc.not_equal(rows["status"], SUCCESS))
    outcomes = Counter(split_problem(*problem)[0] for problem in _problems(failed))
    outcomes[SUCCESS] = rows.num_rows - failed.num_rows
    return outcomes


def temporary_share(outcomes: Mapping[str, int]) -> float:
    """Return the share of rows that failed for temporary reasons, 0 to 1."""
    return sum(outcomes.get(reason, 0) for reason in TEMPORARY_REASONS) / max(
        1, sum(outcomes.values())
    )


@dataclass
class Outcomes:
    """The final state of the rows of finished shards."""

    output: StageOutput
    shards: Mapping[int, ShardFacts]
    succeeded: int = 0
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Keys of the rows whose last outcome is a failure, as sorted numbers."""
    last: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """For each of them, the number of the last shard that holds it."""

    def failures(self) -> Iterator[pa.Table]:
        """Yield the rows whose last outcome is a failure, one table per shard."""
        for number, rows in _tables(self.output, _with_failures(self.shards)):
            rows = rows.filter(pc.not_equal(rows["status"], SUCCESS))
            matches, positions = _find(_numbers(rows["sample"]), self.samples)
            matches[matches] = self.last[positions[matches]] == number
            if matches.any():
                yield rows.filter(pa.array(matches))


def read_outcomes(output: StageOutput, shards: Mapping[int, ShardFacts]) -> Outcomes:
    """Read how many rows of the shards succeeded, and which failed in their last shard."""
    outcomes = Outcomes(output, shards)
    outcomes.succeeded = sum(facts["outcomes"].get(SUCCESS, 0) for facts in shards.values())
    failed, last_shards = [outcomes.samples], [outcomes.last]
    for number, rows in _tables(output, _with_failures(shards), ["sample", "status"]):
        samples, is_good = _statuses(rows)
        failed.append(samples[~is_good])
        last_shards.append(np.full(len(failed[-1]), number, np.int32))
    samples, last = np.concatenate(failed), np.concatenate(last_shards)
    order = np.argsort(samples, kind="stable")  # rows of one key stay in the order of their shards
    samples, last = samples[order], last[order]
    is_last = np.append(samples[1:] != samples[:-1], True) if len(samples) else np.empty(0, bool)
    samples, last = samples[is_last], last[is_last]
    is_resolved = np.zeros(len(samples), bool)
    retried = sorted(number for number, facts in shards.items() if not facts["is_first"])
    for _, rows in _tables(output, retried, ["sample", "status"]):
        requested, is_good = _statuses(rows)
        matches, positions = _find(requested[is_good], samples)
        is_resolved[positions[matches]] = True
    outcomes.samples, outcomes.last = samples[~is_resolved], last[~is_resolved]
    return outcomes


def rows_to_retry(output: StageOutput, shards: Mapping[int, ShardFacts], file: Path) -> Path:
    """Write the rows whose last outcome is a temporary failure to `file` (schema URLS); return
    `file`.
    """
    with atomic_file(file) as part, pq.ParquetWriter(part, URLS) as writer:
        for rows in read_outcomes(output, shards).failures():
            is_temporary = [
                split_problem(*problem)[0] in TEMPORARY_REASONS for problem in _problems(rows)
            ]
            chosen = rows.filter(pa.array(is_temporary, pa.bool_()))
            writer.write_table(shard_rows(chosen).select(URLS.names).cast(URLS))
    return file


def write_dropped(
    early: Path, outcomes: Outcomes, out: Path
) -> tuple[Counter[str], Counter[str], dict[str, str]]:
    """Write the rows of `early` and all failed rows to `out` (schema DROPPED).

    Returns the counts of reasons in `early`, the counts of reasons of the failed rows, and an
    example for each of the latter.
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
    """Return reason and detail of a failed row from img2dataset's status and message.

    If img2dataset could not decode an image, the reason is decode_error and the detail its message.
    """
    if status == "failed_to_resize":
        return "decode_error", message or ""
    reason, _, detail = (message or "").partition(": ")
    return reason, detail


def _problems(rows: pa.Table) -> Iterator[tuple[str, str | None]]:
    return zip(rows["status"].to_pylist(), rows["error_message"].to_pylist(), strict=True)


def _with_failures(shards: Mapping[int, ShardFacts]) -> list[int]:
    return sorted(
        number
        for number, facts in shards.items()
        if any(count for outcome, count in facts["outcomes"].items() if outcome != SUCCESS)
    )


def _tables(
    output: StageOutput, numbers: Sequence[int], columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number, table) of shards in this order; READ_THREADS tables are read ahead."""

    def read(number: int) -> pa.Table:
        with output.open(f"shards/{number:05d}.parquet") as file:
            return pq.read_table(file, columns=columns)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(numbers), READ_THREADS):
            group = numbers[start : start + READ_THREADS]
            yield from zip(group, pool.map(read, group), strict=True)


def _statuses(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    return _numbers(rows["sample"]), pc.equal(rows["status"], SUCCESS).to_numpy().astype(bool)


def _numbers(keys: pa.ChunkedArray) -> np.ndarray:
    """Return sample keys (16 hex digits, `infra.schemas.sample_key`) as uint64 numbers."""
    return np.frombuffer(bytes.fromhex("".join(keys.to_pylist())), ">u8").astype(np.uint64)


def _find(keys: np.ndarray, sorted_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `keys` stand in the sorted `sorted_keys`, and where."""
    positions = np.searchsorted(sorted_keys, keys)
    matches = np.zeros(len(keys), bool)
    inside = positions < len(sorted_keys)
    matches[inside] = sorted_keys[positions[inside]] == keys[inside]
    return matches, positions

"""Peak memory of ingest around the download, by rows of the URL table: sources to table, feeds,
failed rows, the count at the end.

A parquet list of each size is generated a block at a time (one row in ten names a URL that stood
before); every size runs in a process
of its own, whose shards are written as a download leaves them, a quarter of the rows failed, half
of those for a passing reason.
`python -m tests.benchmarks.url_table_memory [ROWS …]`; exits with 1 where ten times the rows take
more than 30 bytes a row more.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.ingest import ingest, row_outcomes
from flows.ingest.row_outcomes import ShardFacts, count_outcomes
from flows.ingest.shard_task import Feed
from flows.sources import url_table
from flows.sources.url_table import DataConfig
from infra.storage import store
from infra.storage.stage_output import StageOutput, open_output

SIZES = (1_000_000, 3_000_000, 10_000_000)
BLOCK, GROUP_ROWS, SHARD_ROWS = 250_000, 1_000_000, 10_000
LIMIT_BYTES_A_ROW = 30
PROBLEM = np.array(["", "http_404: gone", "timeout: 10 s", "http_404: gone", "timeout: 10 s"])


def write_list(file: Path, rows: int) -> None:
    """Write a list of rows with large row groups, as published lists have them."""
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    with pq.ParquetWriter(file, schema) as writer:
        for first in range(0, rows, GROUP_ROWS):
            numbers = np.arange(first, min(first + GROUP_ROWS, rows))
            named = np.where(numbers % 10 == 9, numbers - 9, numbers)
            urls = [
                f"https://pictures-{number % 9973}.example.org/albums/{number % 8191:05d}/photo-{number:09d}.jpg"  # noqa: E501
                for number in named
            ]
            captions = [
                f"A picture of thing number {number}, seen from the garden on a clear evening"
                for number in numbers
            ]
            writer.write_table(pa.table([urls, captions], schema=schema), row_group_size=GROUP_ROWS)


def pretend(
    feeds: Iterator[Feed], output: StageOutput, problem: np.ndarray, is_first: bool
) -> dict[int, ShardFacts]:
    """Put what a download of the feeds leaves, without the images: `problem` is dealt out by
    row.
    """
    shards: dict[int, ShardFacts] = {}
    for feed in feeds:
        with pa.ipc.open_file(feed.data) as reader:
            table = reader.read_all()
        words = problem[np.arange(feed.rows) * 7919 // 97 % len(problem)]
        status = pa.array(np.where(words == "", "success", "failed_to_download"))
        told = table.append_column("status", status).append_column("error_message", pa.array(words))
        with output.temporary_folder() as folder:
            pq.write_table(told, folder / "rows")
            output.put(folder / "rows", f"shards/{feed.number:05d}.parquet")
        shards[feed.number] = {"outcomes": dict(count_outcomes(told)), "is_first": is_first}
    return shards


def step(name: str, clock: float, rows: int) -> float:
    """Print seconds and peak memory so far; return the time."""
    now = time.monotonic()
    print(
        f"  {name:<28}{now - clock:7.1f} s  {(now - clock) / rows * 1e6:6.1f} us a row  peak "
        f"{peak_bytes() / 2**20:6.0f} MiB",
        flush=True,
    )
    return now


def peak_bytes() -> int:
    """Return the largest resident set of this process so far."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def run(folder: Path, rows: int) -> None:
    """Take a list through everything but the download."""
    config = DataConfig.model_validate(
        {
            "sources": [{"kind": "urls", "path": str(folder / "list.parquet")}],
            "images_per_shard": SHARD_ROWS,
            "min_success": 0.5,
        }
    )
    clock = step("imports", time.monotonic(), rows)
    table = folder / "table"
    table.mkdir()
    kept = url_table.write_url_table(config, table, folder)
    assert kept == rows - rows // 10, (kept, rows)
    clock = step("list to URL table", clock, rows)
    output = open_output(store.open_root(str(folder / "root")), "ingest", "key")
    feeds = ingest.read_feeds(table / "urls.parquet", 0, SHARD_ROWS)
    problem = np.array([*[""] * 6, "http_404: gone", "timeout: 10 s"])
    shards = pretend(feeds, output, problem, is_first=True)
    clock = step("(pretended download)", clock, rows)
    again = row_outcomes.rows_to_retry(output, shards, folder / "again.parquet")
    assert abs(pq.read_metadata(again).num_rows / kept - 1 / 8) < 0.01
    clock = step("rows to ask again", clock, rows)
    retried = ingest.read_feeds(again, len(shards), SHARD_ROWS)
    shards |= pretend(retried, output, np.array(["", "timeout: 10 s"]), is_first=False)
    (folder / "out").mkdir()
    counts = ingest.finish(config, table, output, shards, folder / "out")
    assert counts["in"] == rows and counts["dropped"]["duplicate_url"] == rows // 10
    assert abs(counts["dropped"]["timeout"] / kept - 1 / 16) < 0.01
    step("counts and dropped rows", clock, rows)
    print(peak_bytes())


def main() -> int:
    """Measure each size in a fresh process and compare the smallest with the largest."""
    if sys.argv[1:2] == ["--in"]:
        run(Path(sys.argv[2]), int(sys.argv[3]))
        return 0
    sizes = [int(size) for size in sys.argv[1:]] or list(SIZES)
    peaks = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_list(Path(name) / "list.parquet", rows)
            print(f"{rows:,} rows", flush=True)
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.url_table_memory",
                "--in",
                name,
                str(rows),
            ]
            *lines, last = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()
            print("\n".join(lines), flush=True)
            peaks.append(int(last))
    growth = (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
    print(
        ", ".join(
            f"{rows:,} rows: {peak / 2**20:,.0f} MiB"
            for rows, peak in zip(sizes, peaks, strict=True)
        ),
        f"; {growth:.1f} bytes a row",
    )
    return 0 if growth <= LIMIT_BYTES_A_ROW else 1


if __name__ == "__main__":
    sys.exit(main())

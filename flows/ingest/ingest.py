"""The ingest stage: from sources to a URL table to verified WebDataset shards.

Splits the table into feeds, makes one shard of each feed (`flows/ingest/shard_pass.py`) and counts
the outcome of every row. Rows that failed for a temporary reason are tried again in further passes.
A killed run continues from the parts that are recorded in ROOT. Puts urls.parquet and
shards/00000.tar and .parquet into the stage's output, and writes OUT/dropped.parquet.
"""

import math
import shutil
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

import flows.ingest.shard_pass as shard_pass
import flows.sources.opt_out as opt_out
from flows.ingest.row_outcomes import ShardFacts, read_outcomes, rows_to_retry, write_dropped
from flows.ingest.shard_pass import make_shards, tasks_at_once
from flows.ingest.shard_reuse import new_rows, take_over
from flows.ingest.shard_task import Feed
from flows.sources.static_server import StaticServer
from flows.sources.url_table import SERVED, DataConfig, Mounts, write_url_table
from infra.compute.cluster import Cluster
from infra.errors import DataError
from infra.schemas import DROPPED, SHARD_COLUMNS, URLS, open_parquet
from infra.storage.atomic_files import link_or_copy, put_folder
from infra.storage.manifest_schema import StageCounts
from infra.storage.manifests import Committed
from infra.storage.removal_log import Removals
from infra.storage.stage_files import file_sha256
from infra.storage.stage_output import StageOutput

FILTERED_ROWS = 65_536
FEED = pa.schema([field.with_name(SHARD_COLUMNS.get(field.name, field.name)) for field in URLS])
UPSCALING_MODES = ("center_crop", "keep_ratio")
"""Resize modes that scale the shorter side to image_size_px, with no limit for the longer one."""


class IngestCounts(StageCounts):
    """The counts of the stage's manifest."""

    shards: int
    shards_taken_over: NotRequired[int]
    """Of the previous ingest."""


TABLE, TAKEN_OVER = "table", "taken_over"
"""Recorded parts beside the shards: the URL table, and that the previous ingest is taken over."""


def run(
    config: DataConfig,
    cluster: Cluster,
    output: StageOutput,
    out: Path,
    work: Path,
    removals: Removals = Removals(),
    previous: Committed | None = None,
) -> IngestCounts:
    """Download all images of the sources and return the counts.

    Images of a `previous` ingest with the same settings are reused for the same URLs; of its failed
    rows, only those with a temporary reason are requested again. Ray tasks on the nodes of
    `cluster` make the shards; shards with images that are served on loopback are made on this node.

    Raises CallerError if a source does not exist, DataError if less than `min_success` of the URLs
    became images, StorageError if a disk is full.
    """
    table = url_table(config, work, removals)
    urls = table / "urls.parquet"
    taken_over, shards = _finished_shards(output, urls, previous, cluster)
    free_number = taken_over
    with StaticServer(Mounts.load(table / "mounts.json").folders) as server:
        at_once = tasks_at_once(config, cluster.config)
        settings = {
            is_served: shard_settings(config, table, server.base if is_served else "", at_once)
            for is_served in (True, False)
        }
        for number in range(config.retry_passes + 1):
            before = {n: facts for n, facts in shards.items() if n < free_number}
            rows = (
                rows_to_retry(output, before, work / f"again-{number}.parquet")
                if number
                else _rows_of_first_pass(urls, output, before, work)
            )
            all_rows = pq.read_metadata(rows).num_rows
            if number and not all_rows:
                break
            end = free_number + math.ceil(all_rows / config.images_per_shard)
            done = {n: shards[n] for n in range(free_number, end) if n in shards}
            finished_rows = sum(sum(facts["outcomes"].values()) for facts in done.values())
            feeds = read_feeds(rows, free_number, config.images_per_shard, done)
            shards |= make_shards(
                feeds, output, config, settings, cluster, number, (finished_rows, all_rows)
            )
            free_number = end
    _forget_from(free_number, output, shards)
    counts = finish(config, table, output, shards, out)
    return {**counts, "shards_taken_over": taken_over} if taken_over else counts


def _forget_from(free_number: int, output: StageOutput, shards: dict[int, ShardFacts]) -> None:
    """Forget shards from `free_number` on: an earlier attempt had more retry passes."""
    for number in [number for number in shards if number >= free_number]:
        output.forget(f"{number:05d}")
        del shards[number]


def _finished_shards(
    output: StageOutput, urls: Path, previous: Committed | None, cluster: Cluster
) -> tuple[int, dict[int, ShardFacts]]:
    """Return the first shard number after those of the previous ingest, and all finished shards.

    Finished shards come from an earlier attempt with the same URL table, or from the previous
    ingest, which is taken over once. Puts the table into the output. Forgets parts that were made
    from another table.
    """
    parts, digest = output.finished_parts(), file_sha256(urls)
    if TABLE not in parts or parts[TABLE]["facts"]["sha256"] != digest:
        for part in parts:
            output.forget(part)
        parts = {}
        with output.temporary_folder() as folder:
            link_or_copy(urls, folder / urls.name)
            output.record(TABLE, [output.put(folder / urls.name, urls.name)], {"sha256": digest})
    if TAKEN_OVER not in parts:
        count = take_over(previous, urls, output, cluster) if previous else 0
        output.record(TAKEN_OVER, [], {"shards": count})
        parts = output.finished_parts()
    shards: dict[int, ShardFacts] = {
        int(name): part["facts"] for name, part in parts.items() if name.isdigit()
    }
    return int(parts[TAKEN_OVER]["facts"]["shards"]), shards


def _rows_of_first_pass(
    urls: Path, output: StageOutput, taken_over: Mapping[int, ShardFacts], work: Path
) -> Path:
    if not taken_over:
        return urls
    return new_rows(urls, output, sorted(taken_over), work / "new.parquet")


def url_table(config: DataConfig, work: Path, removals: Removals = Removals()) -> Path:
    """Return the folder of the URL table; write it if it does not exist.

    Rows of the removal log are left out. A folder with its final name is complete. Raises DataError
    if the sources have no URL with a caption.
    """
    table = work / "table"
    if not table.is_dir():
        table_part = work / "table.part"
        shutil.rmtree(table_part, ignore_errors=True)
        table_part.mkdir()
        cache = Path(config.cache).expanduser()
        rows = write_url_table(config, table_part, cache, removed_keys=removals.keys)
        if rows == 0:
            dropped = pq.read_table(table_part / "dropped.parquet")
            raise DataError(
                "the sources of [data] name no URL with a caption "
                f"({describe(Counter(dropped.column('reason').to_pylist()))})"
            )
        if removals:
            leave_out(table_part, removals)
        put_folder(table_part, table)
    return table


def leave_out(folder: Path, removals: Removals) -> None:
    """Move the rows of the removal log from urls.parquet to dropped.parquet, so that they are not
    downloaded.
    """
    source, remaining = folder / "urls.parquet", folder / "kept.parquet"
    dropped, longer = folder / "dropped.parquet", folder / "longer.parquet"
    with (
        pq.ParquetWriter(remaining, URLS) as writer,
        pq.ParquetWriter(longer, DROPPED) as removed_writer,
    ):
        for batch in open_parquet(dropped).iter_batches(FILTERED_ROWS):
            removed_writer.write_batch(batch)
        for batch in open_parquet(source).iter_batches(FILTERED_ROWS):
            rows = pa.Table.from_batches([batch])
            is_removed = removals.mask({name: rows[name] for name in ("key", "origin", "url")})
            writer.write_table(rows.filter(pc.invert(is_removed)).cast(URLS))
            removed = rows.filter(is_removed)
            words = [
                pa.array([word] * removed.num_rows, pa.string())
                for word in ("removed", "the removal log")
            ]
            removed_writer.write_table(
                pa.table([removed["key"], removed["origin"], *words], schema=DROPPED)
            )
    remaining.replace(source)
    longer.replace(dropped)


def shard_settings(config: DataConfig, table: Path, served_at: str, at_once: int) -> dict[str, Any]:
    """Return the settings of a download task (see `shard_worker.make_shard`).

    `served_at`: base URL of the images that this node serves, or "" for tasks on other nodes.
    `at_once`: maximum number of tasks at the same time, which share `per_host`.
    """
    return {
        "rules": {
            "timeout_s": config.timeout_s,
            "retries": config.retries,
            "max_bytes": config.max_image_bytes,
            "max_pixels": config.max_image_pixels,
            "allow_private": config.allow_private,
            "robots": config.robots,
            "proxy": config.proxy,
            "per_host": max(1, config.per_host // at_once) if config.per_host else 0,
            "loopback": served_at,
            "upscaled_side_px": config.image_size_px if config.resize in UPSCALING_MODES else 0,
        },
        "recorded": SERVED,
        "actual": served_at or SERVED,
        "opt_out": opt_out.load(table / "opt_out.json"),
        "threads": config.threads,
        "image_size_px": config.image_size_px,
        "resize": config.resize,
        "encode": config.encode,
        "images_per_shard": config.images_per_shard,
        "limit_s": shard_pass.SILENCE_LIMIT_S + 4 * (config.timeout_s + 1) * (config.retries + 1),
    }


def read_feeds(
    rows: Path, first_number: int, images_per_shard: int, finished: Container[int] = ()
) -> Iterator[Feed]:
    """Yield a table (schema URLS) as feeds of `images_per_shard` rows; skip finished shards."""
    for number, batch in enumerate(
        open_parquet(rows).iter_batches(images_per_shard), start=first_number
    ):
        if number in finished:
            continue
        feed = pa.Table.from_batches([batch]).rename_columns(FEED.names).cast(FEED)
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, FEED) as writer:
            writer.write_table(feed)
        is_served = pc.any(pc.starts_with(feed["url"], f"{SERVED}/")).as_py()
        yield Feed(number, feed.num_rows, buffer.getvalue().to_pybytes(), bool(is_served))


def finish(
    config: DataConfig,
    table: Path,
    output: StageOutput,
    shards: Mapping[int, ShardFacts],
    out: Path,
) -> IngestCounts:
    """Write OUT/dropped.parquet and return the counts.

    A row that failed first and succeeded in a later pass counts as succeeded. Raises DataError if
    less than `min_success` of the URLs became images.
    """
    outcomes = read_outcomes(output, shards)
    early, reasons, examples = write_dropped(
        table / "dropped.parquet", outcomes, out / "dropped.parquet"
    )
    succeeded, requested = outcomes.succeeded, outcomes.succeeded + reasons.total()
    if succeeded == 0 or succeeded < config.min_success * requested:
        reason, _ = reasons.most_common(1)[0]
        raise DataError(
            f"only {succeeded:,} of {requested:,} URLs became images, but [data] min_success is "
            f"{config.min_success:.0%}: mostly {reason} "
            f"({reasons[reason]:,}), such as {examples[reason]}"
        )
    return {
        "in": requested + early.total(),
        "out": succeeded,
        "dropped": dict(sorted((reasons + early).items())),
        "shards": len(shards),
    }


def describe(reasons: Counter[str]) -> str:
    """Return counted reasons as text for people, the most frequent first."""
    return (
        ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        or "the sources are empty"
    )

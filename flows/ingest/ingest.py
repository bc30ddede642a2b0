"""The ingest stage: from sources to a URL table to verified WebDataset shards.

Splits the table into feeds, has each feed made into a shard (`flows/ingest/download_pass.py`) and
counts the outcome of every row. Rows that failed for a temporary reason are tried in further
passes; a killed run continues where it stopped. Writes OUT/urls.parquet, OUT/shards/00000.tar and
.parquet, OUT/dropped.parquet; the state of a run is in WORK.
"""

import json
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from flows.ingest.download_pass import make_shards
from flows.ingest.local_workers import Feed, Workers
from flows.ingest.ray_workers import start_on_nodes
from flows.ingest.row_outcomes import read_outcomes, rows_to_ask_again, write_dropped
from flows.ingest.shard_reuse import take_over, unknown_rows
from flows.sources.static_server import StaticServer
from flows.sources.url_table import SERVED, DataConfig, Mounts, write_url_table
from infra.errors import DataError
from infra.schemas import DROPPED, SHARD_COLUMNS, URLS, open_parquet
from infra.storage.atomic_files import atomic_file, link_or_copy, put_folder
from infra.storage.removal_log import Removals

FILTERED_ROWS = 65_536
FEED = pa.schema([field.with_name(SHARD_COLUMNS.get(field.name, field.name)) for field in URLS])
GROWING = ("center_crop", "keep_ratio")
"""Resize modes that scale the shorter side to image_size_px, whatever becomes of the longer one."""

Counts = dict[str, Any]


def run(
    config: DataConfig,
    out: Path,
    work: Path,
    removals: Removals = Removals(),
    previous: Path | None = None,
    remote: int = 0,
) -> Counts:
    """Download everything that the sources name into OUT and return the counts; WORK carries the
    state between killed attempts.

    What a `previous` ingest of the same settings has of the same URLs is taken over; only its
    passing failures are asked again. With `remote`, so many download processes run on the nodes of
    the Ray cluster that is joined; feeds with rows that are served on loopback stay with this
    machine's `processes`.

    Raises CallerError for a source that is not there, DataError when less than `min_success` of the
    URLs became images, StorageError when the disk is full.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    is_served = any(source.kind != "urls" for source in config.sources)
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(work / "img2dataset.log"))
        if is_served or not remote:
            workers.start_here(config.processes, config.max_image_pixels)
        table = url_table(config, work, removals)
        server = stack.enter_context(StaticServer(Mounts.load(table / "mounts.json").folders))
        if remote:
            start_on_nodes(workers, remote, config.max_image_pixels, table / "opt_out.json")
        settings = shard_settings(config, table, actual=server.base, workers=len(workers.all))
        urls, first_number = table / "urls.parquet", 0
        if previous or (work / "taken_over.json").exists():
            urls, first_number = renewed(previous, table, work)
        taken_over = first_number
        for number in range(config.retry_passes + 1):
            rows = (
                urls
                if number == 0
                else rows_to_ask_again(
                    work / "shards", first_number, work / f"again-{number}.parquet"
                )
            )
            feeds = write_feeds(
                rows, work / f"pass-{number}", first_number, config.images_per_shard
            )
            if not feeds and number:
                break
            make_shards(feeds, work / "shards", settings, workers, config, number)
            first_number += len(feeds)
    counts = finish(config, table, work / "shards", first_number, out)
    return counts | ({"shards_taken_over": taken_over} if taken_over else {})


def renewed(previous: Path | None, table: Path, work: Path) -> tuple[Path, int]:
    """Take over what the previous ingest has, once; return the table of the rows that are left and
    the number of the first new shard.
    """
    done = work / "taken_over.json"
    if not done.exists():
        assert previous, "without one there is nothing to go on with"
        count = take_over(previous, table / "urls.parquet", work / "shards")
        unknown_rows(table / "urls.parquet", work / "shards", count, work / "new.parquet")
        with atomic_file(done) as part:
            part.write_text(json.dumps({"shards": count}))
    return work / "new.parquet", int(json.loads(done.read_text())["shards"])


def url_table(config: DataConfig, work: Path, removals: Removals = Removals()) -> Path:
    """Write the URL table once, without what was taken down; a folder under its final name is
    whole.
    """
    table = work / "table"
    if not table.is_dir():
        table_part = work / "table.part"
        shutil.rmtree(table_part, ignore_errors=True)
        table_part.mkdir()
        rows = write_url_table(config, table_part, Path(config.cache).expanduser())
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
    """Move the rows of urls.parquet that were taken down to dropped.parquet, so that they are not
    even downloaded.
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


def shard_settings(config: DataConfig, table: Path, actual: str, workers: int) -> dict[str, Any]:
    """Return what one of so many download processes has to know. `actual` stands in place of what
    is recorded of served pictures.
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
            "per_host": max(1, config.per_host // workers) if config.per_host else 0,
            "loopback": actual,
            "grown_px": config.image_size_px if config.resize in GROWING else 0,
        },
        "recorded": SERVED,
        "actual": actual,
        "opt_out": str((table / "opt_out.json").resolve()),
        "threads": config.threads,
        "image_size_px": config.image_size_px,
        "resize": config.resize,
        "encode": config.encode,
        "images_per_shard": config.images_per_shard,
    }


def write_feeds(rows: Path, folder: Path, first_number: int, images_per_shard: int) -> list[Feed]:
    """Cut a table into one Arrow file a shard, equal counts. A folder under its final name is
    whole.
    """
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for offset, batch in enumerate(open_parquet(rows).iter_batches(images_per_shard)):
            feed = pa.Table.from_batches([batch]).rename_columns(FEED.names).cast(FEED)
            with pa.ipc.new_file(part / f"{first_number + offset:05d}.arrow", FEED) as writer:
                writer.write_table(feed)
        put_folder(part, folder)
    feeds = []
    for file in sorted(folder.glob("*.arrow"), key=lambda file: int(file.stem)):
        with pa.ipc.open_file(file) as reader:
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        is_served = any(
            pc.any(pc.starts_with(batch["url"], f"{SERVED}/")).as_py() for batch in batches
        )
        feeds.append(
            Feed(int(file.stem), file, sum(batch.num_rows for batch in batches), is_served)
        )
    return feeds


def finish(config: DataConfig, table: Path, shards: Path, count: int, out: Path) -> Counts:
    """Put the results under OUT and count them; a row that failed and succeeded in a later pass has
    succeeded.
    """
    outcomes = read_outcomes(shards, count)
    early, reasons, examples = write_dropped(
        table / "dropped.parquet", outcomes, out / "dropped.parquet"
    )
    succeeded, requested = outcomes.succeeded, outcomes.succeeded + reasons.total()
    if succeeded == 0 or succeeded < config.min_success * requested:
        reason, _ = reasons.most_common(1)[0]
        raise DataError(
            f"only {succeeded:,} of {requested:,} URLs became images, [data] min_success asks for "
            f"{config.min_success:.0%}: mostly {reason} "
            f"({reasons[reason]:,}), such as {examples[reason]}"
        )
    link_or_copy(table / "urls.parquet", out / "urls.parquet")
    (out / "shards").mkdir()
    for number in range(count):
        for suffix in (".tar", ".parquet"):
            link_or_copy(shards / f"{number:05d}{suffix}", out / "shards" / f"{number:05d}{suffix}")
    return {
        "in": requested + early.total(),
        "out": succeeded,
        "dropped": dict(sorted((reasons + early).items())),
        "shards": count,
    }


def describe(reasons: Counter[str]) -> str:
    """Write counted reasons for people, the commonest first."""
    return (
        ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        or "nothing was found"
    )

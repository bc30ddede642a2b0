"""The ingest stage: sources to URL table to verified WebDataset shards.

Owns the download processes (`flows.shards`), and with them what img2dataset leaves open: a dead or stuck process is replaced and
its shard made again, rows that failed for a passing reason get another pass, a killed run takes up where it stood. Writes
OUT/urls.parquet, OUT/shards/00000.tar + .parquet, OUT/dropped.parquet; all state of a run lies in WORK.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from flows.outcomes import read_outcomes, rows_to_ask_again, write_dropped
from flows.renewal import place, take_over, unknown_rows
from flows.server import StaticServer
from flows.sources import DataConfig, Mounts, write_url_table
from infra.errors import DataError, StorageError
from infra.progress import Progress
from infra.removals import Removals
from infra.tables import DROPPED, URLS, open_parquet

MAX_ATTEMPTS = 3
START_LIMIT_S = 300
SILENCE_LIMIT_S = 60
FILTERED_ROWS = 65_536
FEED = pa.schema([field.with_name("sample") if field.name == "key" else field for field in URLS])

WORKER = [sys.executable, "-m", "flows.shards"]

Counts = dict[str, Any]


def run(config: DataConfig, out: Path, work: Path, removals: Removals = Removals(), previous: Path | None = None) -> Counts:
    """Download everything that the sources name into OUT and return the counts; WORK carries the state between killed attempts.

    What a `previous` ingest of the same settings has of the same URLs is taken over; only its passing failures are asked again.

    Raises CallerError for a source that is not there, DataError when less than `min_success` of the URLs became images, StorageError
    when the disk is full.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(config.processes, work / "img2dataset.log"))
        table = url_table(config, work, removals)
        server = stack.enter_context(StaticServer(Mounts.load(table / "mounts.json").folders))
        settings = shard_settings(config, recorded=(table / "base.txt").read_text(), actual=server.base)
        urls, first_number = table / "urls.parquet", 0
        if previous or (work / "taken_over.json").exists():
            urls, first_number = renewed(previous, table, work)
        taken_over = first_number
        for number in range(config.retry_passes + 1):
            rows = urls if number == 0 else rows_to_ask_again(work / "shards", first_number, work / f"again-{number}.parquet")
            feeds = write_feeds(rows, work / f"pass-{number}", first_number, config.images_per_shard)
            if not feeds and number:
                break
            make_shards(feeds, work / "shards", settings, workers, config, "download" if number == 0 else f"retry {number}")
            first_number += len(feeds)
    counts = finish(config, table, work / "shards", first_number, out)
    return counts | ({"shards_taken_over": taken_over} if taken_over else {})


def renewed(previous: Path | None, table: Path, work: Path) -> tuple[Path, int]:
    """Take over what the previous ingest has, once; return the table of the rows that are left and the number of the first new shard."""
    done = work / "taken_over.json"
    if not done.exists():
        assert previous, "without one there is nothing to go on with"
        count = take_over(previous, table / "urls.parquet", work / "shards")
        unknown_rows(table / "urls.parquet", work / "shards", count, work / "new.parquet")
        done.with_suffix(".part").write_text(json.dumps({"shards": count}))
        done.with_suffix(".part").replace(done)
    return work / "new.parquet", int(json.loads(done.read_text())["shards"])


def url_table(config: DataConfig, work: Path, removals: Removals = Removals()) -> Path:
    """Write the URL table once, without what was taken down; a folder under its final name is whole."""
    table = work / "table"
    if not table.is_dir():
        aside = work / "table.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # The port is not known before the folders to serve are: what is recorded stays, what is asked is put in its place.
        base = "http://127.0.0.1:80"
        (aside / "base.txt").write_text(base)
        rows = write_url_table(config, aside, Path(config.cache).expanduser(), base)
        if rows == 0:
            dropped = pq.read_table(aside / "dropped.parquet")
            raise DataError(f"the sources of [data] name no URL with a caption ({describe(Counter(dropped.column('reason').to_pylist()))})")
        if removals:
            leave_out(aside, removals)
        aside.rename(table)
    return table


def leave_out(folder: Path, removals: Removals) -> None:
    """Move the rows of urls.parquet that were taken down to dropped.parquet, so that they are not even downloaded."""
    source, kept = folder / "urls.parquet", folder / "kept.parquet"
    dropped, longer = folder / "dropped.parquet", folder / "longer.parquet"
    with pq.ParquetWriter(kept, URLS) as writer, pq.ParquetWriter(longer, DROPPED) as gone_writer:
        for batch in open_parquet(dropped).iter_batches(FILTERED_ROWS):
            gone_writer.write_batch(batch)
        for batch in open_parquet(source).iter_batches(FILTERED_ROWS):
            rows = pa.Table.from_batches([batch])
            by_url = removals.mask({"origin": rows["url"]})
            is_removed = pc.or_(removals.mask({"key": rows["key"], "origin": rows["origin"]}), by_url)
            writer.write_table(rows.filter(pc.invert(is_removed)).cast(URLS))
            gone = rows.filter(is_removed)
            words = [pa.array([word] * gone.num_rows, pa.string()) for word in ("removed", "the removal log")]
            gone_writer.write_table(pa.table([gone["key"], gone["origin"], *words], schema=DROPPED))
    kept.replace(source)
    longer.replace(dropped)


def shard_settings(config: DataConfig, recorded: str, actual: str) -> dict[str, Any]:
    """Return what a download process has to know."""
    return {
        "rules": {
            "timeout_s": config.timeout_s,
            "retries": config.retries,
            "max_bytes": config.max_image_bytes,
            "max_pixels": config.max_image_pixels,
            "allow_private": config.allow_private,
            "robots": config.robots,
            "per_host": config.per_host,
            "loopback": actual.removeprefix("http://"),
        },
        "recorded": recorded,
        "actual": actual,
        "threads": config.threads,
        "image_size_px": config.image_size_px,
        "resize": config.resize,
        "encode": config.encode,
        "images_per_shard": config.images_per_shard,
    }


def write_feeds(rows: Path, folder: Path, first_number: int, images_per_shard: int) -> list[tuple[int, Path, int]]:
    """Cut a table into one Arrow file a shard, equal counts; returns (shard number, file, rows). A folder under its final name is whole."""
    if not folder.is_dir():
        aside = folder.with_suffix(".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for offset, batch in enumerate(open_parquet(rows).iter_batches(images_per_shard)):
            feed = pa.Table.from_batches([batch]).rename_columns(FEED.names).cast(FEED)
            with pa.ipc.new_file(aside / f"{first_number + offset:05d}.arrow", FEED) as writer:
                writer.write_table(feed)
        aside.rename(folder)
    feeds = []
    for file in sorted(folder.glob("*.arrow"), key=lambda file: int(file.stem)):
        with pa.ipc.open_file(file) as reader:
            feeds.append((int(file.stem), file, sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))))
    return feeds


class Worker:
    """One download process, and the thread that hears what it says."""

    def __init__(self, log: Path, heard: "queue.Queue[tuple[Worker, str]]") -> None:
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*WORKER, str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1, env=environment, start_new_session=True,
            )  # fmt: skip
        self.heard = heard
        self.feed: tuple[int, Path, int] | None = None
        self.rows = 0
        self.heard_s = time.monotonic()
        self.is_ready = False
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.put((self, line.strip()))
        self.heard.put((self, "gone"))

    def give(self, feed: tuple[int, Path, int], folder: Path, settings: dict[str, Any]) -> None:
        self.feed, self.rows, self.heard_s = feed, 0, time.monotonic()
        assert self.process.stdin is not None
        try:
            job = {"feed": str(feed[1].resolve()), "number": feed[0], "folder": str(folder.resolve()), "settings": settings}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its death is told by the listening thread

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Workers:
    """The download processes of a run; leaving the context ends them all."""

    def __init__(self, count: int, log: Path) -> None:
        self.count, self.log = count, log
        self.heard: queue.Queue[tuple[Worker, str]] = queue.Queue()
        self.all: list[Worker] = []

    def __enter__(self) -> Self:
        for _ in range(self.count):
            self.start()
        return self

    def start(self) -> Worker:
        worker = Worker(self.log, self.heard)
        self.all.append(worker)
        return worker

    def end(self, worker: Worker) -> None:
        self.all.remove(worker)
        worker.kill()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self.all:
            worker.kill()


def make_shards(
    feeds: list[tuple[int, Path, int]], folder: Path, settings: dict[str, Any], workers: Workers, config: DataConfig, label: str
) -> None:
    """Have every feed made into a shard that is not there yet; a shard whose process dies or falls silent is made again elsewhere.

    Raises DataError when a shard fails `MAX_ATTEMPTS` times, StorageError when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    todo = deque(feed for feed in feeds if not (folder / f"{feed[0]:05d}.tar").is_file())
    total = sum(feed[2] for feed in feeds)
    finished = total - sum(feed[2] for feed in todo)
    attempts: Counter[int] = Counter()
    silence_s = SILENCE_LIMIT_S + 4 * (config.timeout_s + 1) * (config.retries + 1)

    def next_for(worker: Worker) -> None:
        worker.feed = None
        if todo:
            worker.give(todo.popleft(), folder, settings)

    def again(worker: Worker, why: str) -> None:
        feed = worker.feed
        if feed is not None:
            attempts[feed[0]] += 1
            if attempts[feed[0]] >= MAX_ATTEMPTS:
                raise DataError(f"shard {feed[0]:05d} failed {MAX_ATTEMPTS} times, at last so: {why} (details in {workers.log})")
            todo.appendleft(feed)
            worker.feed = None

    with Progress(label, total) as progress:
        for worker in workers.all:
            next_for(worker)
        progress.update(finished)
        while any(worker.feed for worker in workers.all) or todo:
            try:
                worker, line = workers.heard.get(timeout=1)
            except queue.Empty:
                line = ""
            if line:
                worker.heard_s = time.monotonic()
                word, _, rest = line.partition(" ")
                worker.is_ready = True
                if word == "rows":
                    worker.rows += int(rest)
                elif word == "done" and worker.feed:
                    finished += worker.feed[2]
                    next_for(worker)
                elif word == "failed":
                    if "No space left" in rest or "no space left" in rest:
                        raise StorageError(f"no space left on the device of {folder}: free some and run again, finished shards are kept")
                    again(worker, rest.partition(" ")[2])
                    next_for(worker)
                elif word == "gone" and worker in workers.all:
                    again(worker, "the download process died")
                    workers.end(worker)
                    next_for(workers.start())
            for worker in list(workers.all):
                limit_s = silence_s if worker.is_ready else START_LIMIT_S
                if worker.feed is None or time.monotonic() - worker.heard_s < limit_s:
                    continue
                again(worker, f"the download process was silent for {limit_s:.0f} s")
                workers.end(worker)
                next_for(workers.start())
            progress.update(finished + sum(worker.rows for worker in workers.all if worker.feed))
        progress.update(total)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left aside."""
    for leftover in folder.glob(".[0-9]*"):
        shutil.rmtree(leftover, ignore_errors=True)


def finish(config: DataConfig, table: Path, shards: Path, count: int, out: Path) -> Counts:
    """Put the results under OUT and count them; a row that failed and succeeded in a later pass has succeeded."""
    outcomes = read_outcomes(shards, count)
    early, reasons, examples = write_dropped(table / "dropped.parquet", outcomes, out / "dropped.parquet")
    succeeded, asked = outcomes.succeeded, outcomes.succeeded + reasons.total()
    if succeeded == 0 or succeeded < config.min_success * asked:
        reason, _ = reasons.most_common(1)[0]
        raise DataError(
            f"only {succeeded:,} of {asked:,} URLs became images, [data] min_success asks for {config.min_success:.0%}: mostly {reason} "
            f"({reasons[reason]:,}), such as {examples[reason]}"
        )
    place(table / "urls.parquet", out / "urls.parquet")
    (out / "shards").mkdir()
    for number in range(count):
        for suffix in (".tar", ".parquet"):
            place(shards / f"{number:05d}{suffix}", out / "shards" / f"{number:05d}{suffix}")
    return {"in": asked + early.total(), "out": succeeded, "dropped": dict(sorted((reasons + early).items())), "shards": count}


def describe(reasons: Counter[str]) -> str:
    """Write counted reasons for people, the commonest first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common()) or "nothing was found"

"""One pass of an ingest: give every feed to a worker until all shards are made.

A shard whose process dies or stops reporting is made again by another worker. On the last attempt
its rows are tried one by one, so that the row that kills the process is identified and left out
(`worker_crash`). If too many rows of a shard fail for temporary reasons, all workers wait and the
shard is made again. Does not know how or where a worker works.
"""

import contextlib
import queue
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.ingest.local_workers import Feed, Worker, Workers
from flows.sources.url_table import DataConfig
from infra.console.progress import Progress
from infra.errors import DataError, StorageError, UnclipError
from infra.storage.atomic_files import clear_leftovers

MAX_ATTEMPTS = 3
MAX_LOSSES = 20
"""Maximum node losses per shard before it fails."""
MAX_FAILED_STARTS = 10
"""Maximum processes in a row that may end before they are ready."""
MAX_CRASHES = 20
"""Maximum rows of one shard that are left out as `worker_crash`."""
START_LIMIT_S = 300
SILENCE_LIMIT_S = 60
PAUSES_S = (15.0, 60.0, 240.0)
"""Seconds to wait before a shard with too many temporary failures is made again."""
MAX_PAUSES = 12
"""Maximum number of waits in a pass; after that it continues whatever fails."""


@dataclass
class Trouble:
    """Failures of one shard so far."""

    attempts: int = 0
    losses: int = 0
    outages: int = 0
    crashed: list[int] = field(default_factory=list)
    """Rows that killed the process that was alone with them."""


@dataclass
class Downloads:
    """State of a pass: pending feeds, failures, and the workers with their feeds."""

    folder: Path
    settings: dict[str, Any]
    workers: Workers
    config: DataConfig
    todo: deque[Feed]
    number: int
    """Of the pass; only in the first a shard may be told to be made again because of what may
    pass."""
    finished: int = 0
    troubles: dict[int, Trouble] = field(default_factory=dict)
    pauses: int = 0
    paused_until_s: float = 0.0
    heard_s: float = field(default_factory=time.monotonic)
    failed_starts: int = 0

    def assign_next(self, worker: Worker) -> None:
        """Give a worker the next feed that it can make, unless the pass waits or none is left."""
        worker.feed = None
        if time.monotonic() < self.paused_until_s or not (worker.is_ready or worker.is_here):
            return
        for feed in self.todo:
            if worker.is_here or not feed.is_served:
                self.todo.remove(feed)
                trouble = self.troubles.setdefault(feed.number, Trouble())
                is_judged = (
                    self.number == 0
                    and trouble.outages < len(PAUSES_S)
                    and self.pauses < MAX_PAUSES
                )
                also = {
                    "turn": self.number * (MAX_PAUSES + 1) + self.pauses,
                    "max_passing": self.config.max_passing if is_judged else 1.0,
                    "is_single": trouble.attempts == MAX_ATTEMPTS - 1,
                    "crashed": trouble.crashed,
                }
                worker.give(feed, self.folder, self.settings | also)
                return

    def requeue(self, worker: Worker, why: str, is_lost: bool = False) -> None:
        """Put a worker's feed back into the queue. Raise DataError after its last attempt."""
        feed, worker.feed = worker.feed, None
        if feed is None:
            return
        trouble = self.troubles[feed.number]
        if is_lost:
            trouble.losses += 1
        elif worker.row is not None and len(trouble.crashed) < MAX_CRASHES:
            trouble.crashed.append(worker.row)
        else:
            trouble.attempts += 1
        if trouble.attempts >= MAX_ATTEMPTS or trouble.losses >= MAX_LOSSES:
            count = trouble.losses if is_lost else MAX_ATTEMPTS
            raise DataError(
                f"shard {feed.number:05d} failed {count} times, at last so: {why} (details in "
                f"{self.workers.log})"
            )
        self.todo.appendleft(feed)

    def handle_message(self, worker: Worker, line: str) -> None:
        """Act on what a worker said. Raises StorageError when the disk is full, UnclipError when no
        worker comes to work.
        """
        if worker not in self.workers.all:
            return  # it was ended meanwhile
        self.heard_s = worker.heard_s = time.monotonic()
        word, _, rest = line.partition(" ")
        if word not in ("gone", "lost"):
            worker.is_ready, self.failed_starts = True, 0
        if word == "ready" and worker.feed is None:
            self.assign_next(worker)
        elif word == "rows":
            worker.rows += int(rest)
        elif word == "row":
            worker.row = int(rest)
        elif word == "done" and worker.feed:
            self.finished += worker.feed.rows
            self.assign_next(worker)
        elif word == "outage" and worker.feed:
            self.wait(worker.feed)
            self.assign_next(worker)
        elif word == "failed":
            if "no space left" in rest.lower():
                raise StorageError(
                    f"no space left on the device of {self.folder}: free some and run again, "
                    "finished shards are kept"
                )
            worker.row = None  # it lives: no row has killed it
            self.requeue(worker, rest.partition(" ")[2])
            self.assign_next(worker)
        elif word in ("gone", "lost"):
            why = rest or "the download process died"
            self.failed_starts += not worker.is_ready
            self.requeue(worker, why, is_lost=word == "lost")
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise UnclipError(
                    f"{MAX_FAILED_STARTS} download processes ended before they were ready: {why} "
                    f"(details in {self.workers.log})"
                )
            self.assign_next(self.workers.replace(worker))

    def wait(self, feed: Feed) -> None:
        """Start nothing for a while: the failures may be those of our own network."""
        trouble, now = self.troubles[feed.number], time.monotonic()
        self.todo.appendleft(feed)
        if now >= self.paused_until_s:
            self.pauses += 1
            self.paused_until_s = now + PAUSES_S[trouble.outages]
        trouble.outages += 1

    def check_timeouts(self) -> None:
        """Replace workers that stopped reporting and give idle ones work.

        Raise UnclipError if no worker takes up work.
        """
        silence_s = SILENCE_LIMIT_S + 4 * (self.config.timeout_s + 1) * (self.config.retries + 1)
        for worker in list(self.workers.all):
            limit_s = silence_s if worker.is_ready else START_LIMIT_S
            if worker.feed is None:
                self.assign_next(worker)
            elif time.monotonic() - worker.heard_s >= limit_s:
                self.requeue(worker, f"the download process was silent for {limit_s:.0f} s")
                self.assign_next(self.workers.replace(worker))
        is_idle = not any(worker.feed for worker in self.workers.all)
        if is_idle and time.monotonic() - max(self.heard_s, self.paused_until_s) >= START_LIMIT_S:
            raise UnclipError(
                f"no node has started a download process in {START_LIMIT_S} s: ask for fewer, "
                "[cluster] ingest_workers"
            )


def make_shards(
    feeds: list[Feed],
    folder: Path,
    settings: dict[str, Any],
    workers: Workers,
    config: DataConfig,
    number: int,
) -> None:
    """Have every feed made into a shard that is not there yet; `number` is the pass's.

    Raises DataError when a shard fails `MAX_ATTEMPTS` times, StorageError when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    todo = deque(feed for feed in feeds if not (folder / f"{feed.number:05d}.tar").is_file())
    total = sum(feed.rows for feed in feeds)
    downloads = Downloads(
        folder, settings, workers, config, todo, number, total - sum(feed.rows for feed in todo)
    )
    with Progress(f"retry {number}" if number else "download", total) as progress:
        for worker in workers.all:
            downloads.assign_next(worker)
        progress.update(downloads.finished)
        while todo or any(worker.feed for worker in workers.all):
            with contextlib.suppress(queue.Empty):
                downloads.handle_message(*workers.heard.get(timeout=1))
            downloads.check_timeouts()
            waits_s = downloads.paused_until_s - time.monotonic()
            note = f"the network seems to be away, waiting {waits_s:.0f} s" if waits_s > 0 else ""
            progress.update(
                downloads.finished + sum(worker.rows for worker in workers.all if worker.feed), note
            )
        progress.update(total)

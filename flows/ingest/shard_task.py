"""One shard as a Ray task: download its rows, put its files into ROOT, record it as a part.

The task is the same on one machine and on a cluster. It works in its node's scratch folder and
yields its progress. `flows/ingest/shard_pass.py` decides which tasks run.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from flows.ingest.row_outcomes import ShardFacts
from infra.errors import UnclipError
from infra.storage import store
from infra.storage.stage_output import StageOutput

BEAT_S = 1.0
PIXELS_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"
SUFFIXES = (".parquet", ".tar")
"""The files of a shard, in the order in which they are put into ROOT."""


@dataclass(frozen=True)
class Feed:
    """The rows of one shard to be made, as an Arrow file in memory."""

    number: int
    rows: int
    data: bytes
    is_served: bool
    """Whether some of its images are served on loopback; then only this node can make it."""


@dataclass(frozen=True)
class Attempt:
    """Settings that change between two attempts at a shard."""

    turn: int
    """Number that changes with each pass and each pause; then a process forgets failed hosts."""
    is_first: bool
    """Whether all rows of the shard are requested for the first time."""
    max_passing: float
    """Maximum share of rows that may fail for temporary reasons, 0 to 1."""
    is_single: bool
    """Whether rows are tried one by one, each noted in ROOT before it starts."""
    crashed: tuple[int, ...]
    """Rows that killed a process; they are left out."""


@dataclass(frozen=True)
class Beat:
    """Progress that a task reports about once a second and at its end."""

    rows: int
    node: str
    pid: int
    facts: ShardFacts | None = None
    """Facts of the finished shard; None before."""
    outage: str = ""
    """Why the attempt was stopped: too many temporary failures; "" if it was not."""


def download_shard(
    output: StageOutput, feed: Feed, settings: Mapping[str, Any], attempt: Attempt
) -> Iterator[Beat]:
    """Make one shard and record it; yield beats. This is the Ray task.

    `settings`: as in `shard_worker.make_shard`, and limit_s, the maximum seconds without a finished
    row or request; after that this process ends itself.
    """
    import ray

    worker = _load_worker(settings["rules"]["max_pixels"])
    where = ray.get_runtime_context().get_node_id(), os.getpid()
    yield Beat(0, *where)
    note_row = partial(_note_row, output, feed.number) if attempt.is_single else None
    worker.start_turn(attempt.turn)
    watchdog = worker.Watchdog(settings["limit_s"], note_row)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_make, worker, output, feed, settings, attempt, watchdog)
        while not wait([future], BEAT_S).done:
            yield Beat(watchdog.rows, *where)
        try:
            yield Beat(feed.rows, *where, facts=future.result())
        except worker.NetworkAwayError as error:
            yield Beat(feed.rows, *where, outage=str(error))


def _load_worker(max_pixels: int) -> ModuleType:
    """Import the shard worker with `max_pixels` as OpenCV's limit, which it reads on import.

    Pillow checks the declared size first; this limit protects against a file whose header Pillow
    and OpenCV read differently.
    """
    before = os.environ.get(PIXELS_VARIABLE)
    os.environ[PIXELS_VARIABLE] = str(max_pixels)
    try:
        import flows.ingest.shard_worker as shard_worker
    finally:
        if before is None:
            del os.environ[PIXELS_VARIABLE]
        else:
            os.environ[PIXELS_VARIABLE] = before
    return shard_worker


def _make(
    worker: ModuleType,
    output: StageOutput,
    feed: Feed,
    settings: Mapping[str, Any],
    attempt: Attempt,
    watchdog: Any,
) -> ShardFacts:
    name = worker.shard_name(feed.number)
    limits = {"max_passing": attempt.max_passing, "crashed": attempt.crashed}
    with output.temporary_folder() as folder, store.one_line_errors(folder):
        file = folder / "feed.arrow"
        file.write_bytes(feed.data)
        outcomes = worker.make_shard(file, feed.number, folder, {**settings, **limits}, watchdog)
        if output.is_committed():  # this task was considered lost, and another made the shard
            raise UnclipError(
                f"{output.stage} {output.key} is already committed: shard {name} is not written "
                "again"
            )
        entries = [
            output.put(folder / f"{name}{suffix}", f"shards/{name}{suffix}") for suffix in SUFFIXES
        ]
    facts = ShardFacts(outcomes=dict(outcomes), is_first=attempt.is_first)
    output.record(name, entries, dict(facts))
    return facts


def row_note(output: StageOutput, number: int) -> str:
    """Return the name in ROOT of the note with the row that a process works on alone."""
    return f"{output.work}/rows/{number:05d}"


def _note_row(output: StageOutput, number: int, row: int) -> None:
    store.write_bytes(output.root, row_note(output, number), str(row).encode())


def kill(beat: Beat) -> None:
    """Kill the process of a beat on its node (SIGKILL)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    ray.remote(**options)(_end_process).remote(beat.pid)


def _end_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

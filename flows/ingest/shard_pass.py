"""One pass of an ingest: run a Ray task for every shard until all shards are made.

A task whose process dies is run again. In the last attempt its rows are tried one by one, to find
the row that kills the process and leave it out (`worker_crash`). If too many rows of a shard fail
for temporary reasons, no task is started for a while. `flows/ingest/shard_task.py` is the task.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import flows.ingest.shard_task as shard_task
from flows.ingest.row_outcomes import ShardFacts
from flows.ingest.shard_task import Attempt, Beat, Feed
from flows.sources.url_table import DataConfig
from infra.compute.cluster import Cluster, ClusterConfig
from infra.console.progress import Progress
from infra.errors import DataError, StorageAwayError, UnclipError
from infra.storage import store
from infra.storage.stage_output import StageOutput

MAX_ATTEMPTS = 3
MAX_LOSSES = 20
"""Node losses after which a shard fails."""
MAX_CRASHES = 20
"""Maximum rows of one shard that are left out as `worker_crash`."""
START_LIMIT_S = 300
"""Seconds until some node must start a task while none runs."""
SILENCE_LIMIT_S = 60
"""Maximum seconds without a finished row or request, in addition to the timeouts of a row."""
FROZEN_S = 120.0
"""Seconds without a beat of a task after which its process is killed."""
PAUSES_S = (15.0, 60.0, 240.0)
"""Seconds to wait before a shard with too many temporary failures is made again."""
MAX_PAUSES = 12
"""Maximum number of pauses in a pass; after that it continues in spite of failures."""


@dataclass
class ShardFailures:
    """Failures of one shard so far."""

    attempts: int = 0
    losses: int = 0
    outages: int = 0
    crashed: list[int] = field(default_factory=list)
    """Rows that killed their process when it worked on them alone."""


@dataclass(eq=False)
class Task:
    """A shard that is being made."""

    feed: Feed
    attempt: Attempt
    stream: Any
    """Ray's ObjectRefGenerator of beats."""
    beat: Beat | None = None
    last_beat_s: float = field(default_factory=time.monotonic)


@dataclass
class Downloads:
    """State of a pass: running tasks, waiting feeds and failures."""

    output: StageOutput
    config: DataConfig
    settings: Mapping[bool, Any]
    """Ray references to the settings of tasks, by `Feed.is_served`."""
    number: int
    """Number of the pass; only in the first (0) do temporary failures make a shard run again."""
    at_once: int
    feeds: Iterator[Feed]
    progress: Progress
    finished: dict[int, ShardFacts] = field(default_factory=dict)
    finished_rows: int = 0
    retries: deque[Feed] = field(default_factory=deque)
    tasks: list[Task] = field(default_factory=list)
    failures: dict[int, ShardFailures] = field(default_factory=dict)
    pauses: int = 0
    paused_until_s: float = 0.0
    last_beat_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Make a shard of every feed."""
        try:
            while self._start_tasks() or self.tasks or self.retries:
                self._handle_beats()
                self._check_silence()
                waits_s = self.paused_until_s - time.monotonic()
                status = f"the network seems to be away, waiting {waits_s:.0f} s"
                rows = sum(task.beat.rows for task in self.tasks if task.beat)
                self.progress.update(self.finished_rows + rows, status if waits_s > 0 else "")
        finally:
            import ray

            for task in self.tasks:
                ray.cancel(task.stream, force=True)

    def _start_tasks(self) -> bool:
        """Start tasks up to `at_once` unless the pass is paused; return whether one started."""
        is_started = False
        while len(self.tasks) < self.at_once and time.monotonic() >= self.paused_until_s:
            feed = self.retries.popleft() if self.retries else next(self.feeds, None)
            if feed is None:
                break
            self._start(feed)
            is_started = True
        return is_started

    def _start(self, feed: Feed) -> None:
        failures = self.failures.setdefault(feed.number, ShardFailures())
        may_wait = failures.outages < len(PAUSES_S) and self.pauses < MAX_PAUSES
        attempt = Attempt(
            turn=self.number * (MAX_PAUSES + 1) + self.pauses,
            is_first=self.number == 0,
            max_passing=self.config.max_passing if self.number == 0 and may_wait else 1.0,
            is_single=failures.attempts == MAX_ATTEMPTS - 1,
            crashed=tuple(failures.crashed),
        )
        if attempt.is_single:
            store.remove(self.output.root, shard_task.row_note(self.output, feed.number))
        self.tasks.append(Task(feed, attempt, self._submit(feed, attempt)))

    def _submit(self, feed: Feed, attempt: Attempt) -> Any:
        """Submit a task to Ray; return the stream of its beats."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # A job that serves images has already reserved the cores for these tasks (`ray_submit`).
        options: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        if feed.is_served:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
            options = {"num_cpus": 0, "scheduling_strategy": here}
        task = ray.remote(**options, max_retries=0)(shard_task.download_shard)
        return task.remote(self.output, feed, self.settings[feed.is_served], attempt)

    def _handle_beats(self) -> None:
        """Wait up to one second for a beat, then handle all beats that are ready."""
        import ray

        if not self.tasks:
            time.sleep(min(1.0, max(0.0, self.paused_until_s - time.monotonic())))
            return
        by_stream = {task.stream: task for task in self.tasks}
        ready, _ = ray.wait(list(by_stream), num_returns=1, timeout=1)
        if ready:
            ready, _ = ray.wait(list(by_stream), num_returns=len(by_stream), timeout=0)
        for stream in ready:
            self._handle_beat(by_stream[stream])

    def _handle_beat(self, task: Task) -> None:
        """Handle a task's next beat or its failure.

        Raises StorageError and other errors that a retry cannot fix.
        """
        import ray
        from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

        try:
            beat: Beat = ray.get(next(task.stream))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UnclipError) and not isinstance(cause, StorageAwayError):
                raise type(cause)(str(cause)) from error
            self._retry(task, " ".join(str(cause).split()), is_process_alive=True)
        except (WorkerCrashedError, OutOfMemoryError):
            self._retry(task, "the process of its task died")
        except RayError as error:  # the node was lost or cannot be reached
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._retry(task, (lines or [type(error).__name__])[0][:200], is_node_lost=True)
        else:
            self.last_beat_s = task.last_beat_s = time.monotonic()
            task.beat = beat
            if beat.facts or beat.outage:
                self.tasks.remove(task)
            if beat.facts:
                self.finished[task.feed.number] = beat.facts
                self.finished_rows += task.feed.rows
            elif beat.outage:
                self._pause(task.feed)

    def _retry(
        self, task: Task, why: str, is_node_lost: bool = False, is_process_alive: bool = False
    ) -> None:
        """Put a task's feed back into the queue. Raise DataError after the last attempt."""
        self.tasks.remove(task)
        failures = self.failures[task.feed.number]
        is_crash = not is_node_lost and not is_process_alive
        row = self._read_note(task) if is_crash and task.attempt.is_single else None
        if is_node_lost:
            failures.losses += 1
        elif row is not None and len(failures.crashed) < MAX_CRASHES:
            failures.crashed.append(row)
        else:
            failures.attempts += 1
        if failures.attempts >= MAX_ATTEMPTS or failures.losses >= MAX_LOSSES:
            count = failures.losses if is_node_lost else MAX_ATTEMPTS
            raise DataError(
                f"shard {task.feed.number:05d} failed {count} times, the last time with: {why} "
                "(details in the logs of Ray's workers)"
            )
        self.retries.appendleft(task.feed)

    def _read_note(self, task: Task) -> int | None:
        try:
            return int(
                store.read_bytes(
                    self.output.root, shard_task.row_note(self.output, task.feed.number)
                )
            )
        except FileNotFoundError:
            return None

    def _pause(self, feed: Feed) -> None:
        """Start no task for a while, because our own network may be down."""
        failures, now = self.failures[feed.number], time.monotonic()
        self.retries.appendleft(feed)
        if now >= self.paused_until_s:
            self.pauses += 1
            self.paused_until_s = now + PAUSES_S[failures.outages]
        failures.outages += 1

    def _check_silence(self) -> None:
        """Kill processes that send no beats; raise UnclipError if no node starts a task."""
        now = time.monotonic()
        for task in self.tasks:
            if task.beat and now - task.last_beat_s >= FROZEN_S:
                shard_task.kill(task.beat)  # Ray then reports that the task crashed
                task.last_beat_s = now
        is_running = any(task.beat for task in self.tasks)
        last_s = max([self.last_beat_s, self.paused_until_s])
        if self.tasks and not is_running and now - last_s >= START_LIMIT_S:
            raise UnclipError(
                f"no node has started a download task in {START_LIMIT_S} s: each needs one free "
                "CPU core in Ray; see `ray status`"
            )


def make_shards(
    feeds: Iterator[Feed],
    output: StageOutput,
    config: DataConfig,
    settings: Mapping[bool, Mapping[str, Any]],
    cluster: Cluster,
    number: int,
    rows: tuple[int, int],
) -> dict[int, ShardFacts]:
    """Make every feed into a shard of `output`; return the facts of these shards by number.

    `settings`: the settings of tasks, by `Feed.is_served`. `number`: number of the pass. `rows`:
    finished rows and all rows of the pass, for the progress bar. Starts Ray if there is a feed.
    Raises DataError if a shard fails `MAX_ATTEMPTS` times, StorageError if a disk is full.
    """
    first = next(feeds, None)
    if first is None:
        return {}
    cluster.start()
    import ray

    finished_rows, all_rows = rows
    with Progress(f"retry {number}" if number else "download", all_rows) as progress:
        progress.update(finished_rows)
        downloads = Downloads(
            output=output,
            config=config,
            settings={is_served: ray.put(dict(value)) for is_served, value in settings.items()},
            number=number,
            at_once=tasks_at_once(config, cluster.config),
            feeds=chain([first], feeds),
            progress=progress,
            finished_rows=finished_rows,
        )
        downloads.run()
        progress.update(all_rows)
    return downloads.finished


def tasks_at_once(config: DataConfig, cluster: ClusterConfig) -> int:
    """Return the maximum number of shards that are made at the same time."""
    return cluster.ingest_workers or config.processes

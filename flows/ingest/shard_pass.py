"""One pass of an ingest: run a Ray task for every shard until all of them are made.

A task whose process dies is made again; on the last attempt its rows are tried one by one, so that
the row that ends the process is found and left out (`worker_crash`). If too many rows of a shard
fail for reasons that may pass, nothing is started for a while. Does not know what a task does.
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
"""Maximum node losses per shard before it fails."""
MAX_CRASHES = 20
"""Maximum rows of one shard that are left out as `worker_crash`."""
START_LIMIT_S = 300
"""Maximum time until a node starts a task while none runs."""
SILENCE_LIMIT_S = 60
"""Maximum time without a finished row or request, beside what the timeouts of a row add."""
FROZEN_S = 120.0
"""Maximum time without a beat of a task; then its process is killed."""
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
    """Rows that ended the process that was alone with them."""


@dataclass(eq=False)
class Task:
    """A shard that is being made."""

    feed: Feed
    attempt: Attempt
    stream: Any
    """Of beats: Ray's ObjectRefGenerator."""
    beat: Beat | None = None
    heard_s: float = field(default_factory=time.monotonic)


@dataclass
class Downloads:
    """State of a pass: the tasks that run, the feeds that wait, and failures."""

    output: StageOutput
    config: DataConfig
    settings: Mapping[bool, Any]
    """References to the settings of tasks, by whether they read what is served on this node."""
    number: int
    """Of the pass; only in the first a shard is made again because of what may pass."""
    at_once: int
    feeds: Iterator[Feed]
    progress: Progress
    finished: dict[int, ShardFacts] = field(default_factory=dict)
    finished_rows: int = 0
    again: deque[Feed] = field(default_factory=deque)
    tasks: list[Task] = field(default_factory=list)
    troubles: dict[int, Trouble] = field(default_factory=dict)
    pauses: int = 0
    paused_until_s: float = 0.0
    heard_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Make a shard of every feed."""
        try:
            while self._start_tasks() or self.tasks or self.again:
                self._listen()
                self._check_silence()
                waits_s = self.paused_until_s - time.monotonic()
                is_away = f"the network seems to be away, waiting {waits_s:.0f} s"
                rows = sum(task.beat.rows for task in self.tasks if task.beat)
                self.progress.update(self.finished_rows + rows, is_away if waits_s > 0 else "")
        finally:
            import ray

            for task in self.tasks:
                ray.cancel(task.stream, force=True)

    def _start_tasks(self) -> bool:
        """Start tasks while there is room, feeds are left and nothing has to wait."""
        is_started = False
        while len(self.tasks) < self.at_once and time.monotonic() >= self.paused_until_s:
            feed = self.again.popleft() if self.again else next(self.feeds, None)
            if feed is None:
                break
            self._start(feed)
            is_started = True
        return is_started

    def _start(self, feed: Feed) -> None:
        trouble = self.troubles.setdefault(feed.number, Trouble())
        may_wait = trouble.outages < len(PAUSES_S) and self.pauses < MAX_PAUSES
        attempt = Attempt(
            turn=self.number * (MAX_PAUSES + 1) + self.pauses,
            is_first=self.number == 0,
            max_passing=self.config.max_passing if self.number == 0 and may_wait else 1.0,
            is_single=trouble.attempts == MAX_ATTEMPTS - 1,
            crashed=tuple(trouble.crashed),
        )
        if attempt.is_single:
            store.remove(self.output.root, shard_task.row_note(self.output, feed.number))
        self.tasks.append(Task(feed, attempt, self._submit(feed, attempt)))

    def _submit(self, feed: Feed, attempt: Attempt) -> Any:
        """Give a task to Ray; return the stream of its beats."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # A job that serves images has reserved the cores of their tasks for itself (`ray_submit`).
        options: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        if feed.is_served:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
            options = {"num_cpus": 0, "scheduling_strategy": here}
        task = ray.remote(**options, max_retries=0)(shard_task.download_shard)
        return task.remote(self.output, feed, self.settings[feed.is_served], attempt)

    def _listen(self) -> None:
        """Handle what tasks have said, and wait up to a second for the first word."""
        import ray

        if not self.tasks:
            time.sleep(min(1.0, max(0.0, self.paused_until_s - time.monotonic())))
            return
        by_stream = {task.stream: task for task in self.tasks}
        ready, _ = ray.wait(list(by_stream), num_returns=1, timeout=1)
        if ready:
            ready, _ = ray.wait(list(by_stream), num_returns=len(by_stream), timeout=0)
        for stream in ready:
            self._hear(by_stream[stream])

    def _hear(self, task: Task) -> None:
        """Take a task's next beat, or its end.

        Raises StorageError and other errors that no repetition mends.
        """
        import ray
        from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

        try:
            beat: Beat = ray.get(next(task.stream))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UnclipError) and not isinstance(cause, StorageAwayError):
                raise type(cause)(str(cause)) from error
            self._make_again(task, " ".join(str(cause).split()), is_alive=True)
        except (WorkerCrashedError, OutOfMemoryError):
            self._make_again(task, "the process of its task died")
        except RayError as error:  # the node is gone, or out of reach
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._make_again(task, (lines or [type(error).__name__])[0][:200], is_lost=True)
        else:
            self.heard_s = task.heard_s = time.monotonic()
            task.beat = beat
            if beat.facts or beat.outage:
                self.tasks.remove(task)
            if beat.facts:
                self.finished[task.feed.number] = beat.facts
                self.finished_rows += task.feed.rows
            elif beat.outage:
                self._pause(task.feed)

    def _make_again(
        self, task: Task, why: str, is_lost: bool = False, is_alive: bool = False
    ) -> None:
        """Put a task's feed back. Raise DataError after its last attempt."""
        self.tasks.remove(task)
        trouble = self.troubles[task.feed.number]
        row = None if is_lost or is_alive or not task.attempt.is_single else self._read_note(task)
        if is_lost:
            trouble.losses += 1
        elif row is not None and len(trouble.crashed) < MAX_CRASHES:
            trouble.crashed.append(row)
        else:
            trouble.attempts += 1
        if trouble.attempts >= MAX_ATTEMPTS or trouble.losses >= MAX_LOSSES:
            count = trouble.losses if is_lost else MAX_ATTEMPTS
            raise DataError(
                f"shard {task.feed.number:05d} failed {count} times, at last so: {why} (details in "
                "the logs of Ray's workers)"
            )
        self.again.appendleft(task.feed)

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
        """Start nothing for a while: the failures may be those of our own network."""
        trouble, now = self.troubles[feed.number], time.monotonic()
        self.again.appendleft(feed)
        if now >= self.paused_until_s:
            self.pauses += 1
            self.paused_until_s = now + PAUSES_S[trouble.outages]
        trouble.outages += 1

    def _check_silence(self) -> None:
        """Kill processes that no longer beat; raise UnclipError if no node starts a task."""
        now = time.monotonic()
        for task in self.tasks:
            if task.beat and now - task.heard_s >= FROZEN_S:
                shard_task.kill(task.beat)  # Ray then says that the task has crashed
                task.heard_s = now
        is_running = any(task.beat for task in self.tasks)
        last_s = max([self.heard_s, self.paused_until_s])
        if self.tasks and not is_running and now - last_s >= START_LIMIT_S:
            raise UnclipError(
                f"no node has started a download task in {START_LIMIT_S} s: each needs one CPU "
                "core that Ray has to give; see `ray status`"
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
    """Have every feed made into a shard of `output`; return the facts of those shards.

    `settings` by whether a shard's images are served on this node; `number` is the pass's; `rows`
    are, for the progress, those that are finished and all of the pass. Starts Ray if there is a
    feed. Raises DataError when a shard fails `MAX_ATTEMPTS` times, StorageError when a disk is
    full.
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

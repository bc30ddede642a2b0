"""What becomes of shards whose tasks fail: the scheduling alone, with tasks that a test ends."""

from pathlib import Path
from typing import Any

import pytest

from flows.ingest import shard_pass
from flows.ingest.shard_pass import MAX_CRASHES, MAX_LOSSES, Downloads, Task, tasks_at_once
from flows.ingest.shard_task import Attempt, Beat, Feed, row_note
from flows.orchestration.ray_submit import default_resources
from infra.compute.cluster import ClusterConfig
from infra.console.progress import Progress
from infra.errors import DataError
from infra.storage import store
from tests.flows.ingest.test_ingest import config_for
from tests.flows.ingest.test_shard_reuse import INGEST, OnlyData
from tests.helpers.local_ingest import output_in


class Scene(Downloads):
    """A pass whose tasks do nothing by themselves."""

    def _submit(self, feed: Feed, attempt: Attempt) -> Any:
        return None

    def next_task(self) -> Task:
        """Start tasks; return the one that runs."""
        self._start_tasks()
        (task,) = self.tasks
        return task


def scene(tmp_path: Path, feeds: int = 1, at_once: int = 1) -> Scene:
    return Scene(
        output=output_in(tmp_path),
        config=config_for({"kind": "urls", "path": "list.jsonl"}),
        settings={},
        number=0,
        at_once=at_once,
        feeds=iter([Feed(number, 10, b"", False) for number in range(feeds)]),
        progress=Progress("download", 10),
    )


def test_a_lost_node_is_no_fault_of_the_shard_but_has_an_end(tmp_path: Path) -> None:
    downloads = scene(tmp_path)
    for _ in range(MAX_LOSSES - 1):
        task = downloads.next_task()
        assert not task.attempt.is_single
        downloads._retry(task, "the node is gone", is_node_lost=True)
    with pytest.raises(
        DataError,
        match=f"shard 00000 failed {MAX_LOSSES} times, the last time with: the node is gone",
    ):
        downloads._retry(downloads.next_task(), "the node is gone", is_node_lost=True)


def test_the_last_attempt_goes_row_by_row_and_leaves_out_what_kills(tmp_path: Path) -> None:
    downloads = scene(tmp_path)
    root = downloads.output.root
    store.write_bytes(root, row_note(downloads.output, 0), b"3")  # of a killed run
    for _ in range(2):
        task = downloads.next_task()
        assert not task.attempt.is_single
        downloads._retry(task, "the process of its task died")
    for row in (7, 8):
        task = downloads.next_task()
        assert task.attempt.is_single
        store.write_bytes(root, row_note(downloads.output, 0), b"%d" % row)
        downloads._retry(task, "the process of its task died")
    task = downloads.next_task()
    assert task.attempt.is_single and task.attempt.crashed == (7, 8)
    with pytest.raises(
        DataError, match="failed 3 times, the last time with: the process of its task died"
    ):
        downloads._retry(task, "the process of its task died")  # of nothing that is a row's


def test_rows_that_are_left_out_have_an_end(tmp_path: Path) -> None:
    downloads = scene(tmp_path)
    for _ in range(2):
        downloads._retry(downloads.next_task(), "died")
    for row in range(MAX_CRASHES):
        task = downloads.next_task()
        store.write_bytes(downloads.output.root, row_note(downloads.output, 0), b"%d" % row)
        downloads._retry(task, "died")
    task = downloads.next_task()
    store.write_bytes(downloads.output.root, row_note(downloads.output, 0), b"99")
    with pytest.raises(DataError, match="failed 3 times"):
        downloads._retry(task, "died")


def test_nothing_starts_while_the_network_is_away_and_the_waiting_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(shard_pass.time, "monotonic", lambda: clock[0])
    downloads = scene(tmp_path, feeds=4, at_once=2)
    downloads.paused_until_s = -1.0
    downloads._start_tasks()
    turn = downloads.tasks[0].attempt.turn
    for task in list(downloads.tasks):
        downloads.tasks.remove(task)
        downloads._pause(task.feed)
    assert downloads.pauses == 1 and not downloads._start_tasks() and not downloads.tasks
    clock[0] = shard_pass.PAUSES_S[0] + 1
    downloads._start_tasks()
    assert {task.feed.number for task in downloads.tasks} == {0, 1}
    # What a process remembers of failures was before the pause.
    assert all(task.attempt.turn > turn for task in downloads.tasks)
    assert downloads.tasks[0].attempt.max_passing == 0.5
    for _ in range(len(shard_pass.PAUSES_S) - 1):
        task = downloads.tasks.pop(0)
        downloads._pause(task.feed)
        clock[0] += shard_pass.PAUSES_S[-1] + 1
        downloads._start_tasks()
        downloads.tasks.sort(key=lambda other, feed=task.feed: other.feed is not feed)
    assert downloads.tasks[0].attempt.max_passing == 1.0  # taken as it is


def test_only_a_process_that_has_not_beaten_for_long_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Beat] = []
    monkeypatch.setattr(shard_pass.shard_task, "kill", killed.append)
    downloads = scene(tmp_path, feeds=3, at_once=3)
    downloads._start_tasks()
    waiting, running, frozen = downloads.tasks
    running.beat, frozen.beat = Beat(1, "node", 11), Beat(1, "node", 12)
    for task in (waiting, frozen):
        task.last_beat_s -= shard_pass.FROZEN_S
    for _ in range(2):
        downloads._check_silence()
    assert killed == [frozen.beat]


def test_a_submitted_ingest_asks_for_what_runs_on_its_own_node() -> None:
    def cpus(ingest_workers: int, *sources: dict[str, Any]) -> float:
        config = OnlyData(
            data=config_for(*sources, processes=3),
            cluster=ClusterConfig(ingest_workers=ingest_workers),
        )
        assert tasks_at_once(config.data, config.cluster) == (ingest_workers or 3)
        return default_resources(INGEST, config).cpus

    listed, folder = {"kind": "urls", "path": "list.jsonl"}, {"kind": "folder", "path": "mine"}
    assert (cpus(0, listed), cpus(8, listed), cpus(0, listed, folder)) == (0, 0, 3)

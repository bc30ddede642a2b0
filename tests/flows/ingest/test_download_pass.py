"""Who gets which feed, and what becomes of feeds whose workers fail: the scheduling alone, with
workers that do what a test says.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.ingest import download_pass
from flows.ingest.download_pass import MAX_LOSSES, Downloads
from flows.ingest.local_workers import Feed, Worker, Workers
from flows.orchestration.ray_submit import default_resources
from infra.compute.cluster import ClusterConfig
from infra.errors import DataError, UnclipError
from tests.flows.ingest.test_ingest import config_for
from tests.flows.ingest.test_shard_reuse import INGEST, OnlyData


class Fake:
    """A worker that does nothing by itself."""

    def __init__(self, is_here: bool) -> None:
        self.is_here, self.is_ready, self.is_killed = is_here, False, False
        self.feed: Feed | None = None
        self.rows, self.row, self.heard_s = 0, None, 0.0
        self.given: list[dict[str, Any]] = []

    def give(self, feed: Feed, folder: Path, settings: dict[str, Any]) -> None:
        self.feed, self.row, self.heard_s = feed, None, download_pass.time.monotonic()
        self.given.append({"number": feed.number, **settings})

    def kill(self) -> None:
        self.is_killed = True


def starting(is_here: bool) -> Callable[[], Worker]:
    return lambda: Fake(is_here)


def scene(
    tmp_path: Path, feeds: list[Feed], here: int = 0, away: int = 0
) -> tuple[Downloads, list[Any]]:
    """Return a pass over the feeds and its workers."""
    workers = Workers(tmp_path / "log")
    workers.start(starting(True), here)
    workers.start(starting(False), away)
    config = config_for({"kind": "urls", "path": "list.jsonl"})
    return Downloads(tmp_path, {}, workers, config, deque(feeds), 0), list(workers.all)


def feed(number: int, is_served: bool = False) -> Feed:
    return Feed(number, Path(f"{number:05d}.arrow"), 10, is_served)


def test_what_is_served_here_stays_here_and_a_node_that_is_not_ready_gets_nothing(
    tmp_path: Path,
) -> None:
    pass_, (here, away) = scene(tmp_path, [feed(0, True), feed(1, True), feed(2)], here=1, away=1)
    pass_.assign_next(away)
    assert away.feed is None
    pass_.handle_message(away, "ready")
    pass_.assign_next(here)
    assert (away.feed.number, here.feed.number) == (2, 0)
    pass_.handle_message(away, "done 2 0.0")
    assert away.feed is None and [each.number for each in pass_.todo] == [1]
    pass_.handle_message(here, "done 0 0.0")
    assert here.feed.number == 1 and pass_.finished == 20


def test_a_lost_node_is_no_fault_of_the_shard_but_has_an_end(tmp_path: Path) -> None:
    pass_, (worker,) = scene(tmp_path, [feed(0)], away=1)
    pass_.handle_message(worker, "ready")
    for _ in range(MAX_LOSSES - 1):
        pass_.handle_message(worker, "lost the node is gone")
        assert worker.is_killed
        pass_.handle_message(
            worker, "done 0 0.0"
        )  # too late: nothing that it says is heard any more
        (worker,) = pass_.workers.all
        assert worker.feed is None and pass_.finished == 0
        pass_.handle_message(worker, "ready")
        assert not worker.given[-1]["is_single"]
    with pytest.raises(
        DataError, match=f"shard 00000 failed {MAX_LOSSES} times, at last so: the node is gone"
    ):
        pass_.handle_message(worker, "lost the node is gone")


def test_the_last_attempt_goes_row_by_row_and_leaves_out_what_kills(tmp_path: Path) -> None:
    pass_, (worker,) = scene(tmp_path, [feed(0)], here=1)
    pass_.assign_next(worker)
    for told in ([], [], ["row 4", "row 7"], ["row 8"]):
        for line in told:
            pass_.handle_message(worker, line)
        pass_.handle_message(worker, "gone")
        (worker,) = pass_.workers.all
    assert worker.given[-1]["is_single"] and worker.given[-1]["crashed"] == [7, 8]
    with pytest.raises(
        DataError, match="shard 00000 failed 3 times, at last so: the download process died"
    ):
        pass_.handle_message(worker, "gone")  # of nothing that is a row's fault


def test_nobody_starts_anything_while_the_network_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(download_pass.time, "monotonic", lambda: clock[0])
    pass_, (one, two) = scene(tmp_path, [feed(number) for number in range(4)], here=2)
    pass_.paused_until_s = -1.0
    pass_.assign_next(one)
    pass_.assign_next(two)
    pass_.handle_message(one, "outage 0 80% of the rows failed for what may pass")
    pass_.handle_message(two, "outage 1 80% of the rows failed for what may pass")
    assert pass_.pauses == 1 and one.feed is None and two.feed is None
    clock[0] = download_pass.PAUSES_S[0] + 1
    pass_.check_timeouts()
    assert {one.feed.number, two.feed.number} == {0, 1} and one.given[-1]["max_passing"] == 0.5
    assert (
        one.given[-1]["turn"] > one.given[0]["turn"]
    )  # what the process remembers of failures was before the pause
    for _ in range(len(download_pass.PAUSES_S) - 1):
        pass_.handle_message(one, "outage 0 80% of the rows failed for what may pass")
        clock[0] += download_pass.PAUSES_S[-1] + 1
        pass_.check_timeouts()
    assert one.given[-1]["max_passing"] == 1.0  # taken as it is


def test_a_cluster_that_never_has_room_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_, _ = scene(tmp_path, [feed(0)], away=2)
    pass_.check_timeouts()
    late = pass_.heard_s + download_pass.START_LIMIT_S
    monkeypatch.setattr(download_pass.time, "monotonic", lambda: late)
    with pytest.raises(
        UnclipError, match=r"no node has started a download process in 300 s: .*ingest_workers"
    ):
        pass_.check_timeouts()


@pytest.mark.parametrize("word", ["gone", "lost no module flows"])
def test_processes_that_end_before_they_are_ready_have_an_end(tmp_path: Path, word: str) -> None:
    pass_, (busy, idle) = scene(tmp_path, [feed(0)], here=2)
    pass_.assign_next(busy)
    for _ in range(download_pass.MAX_FAILED_STARTS - 1):
        pass_.handle_message(idle, word)
        _, idle = pass_.workers.all
    with pytest.raises(UnclipError, match="10 download processes ended before they were ready: "):
        pass_.handle_message(idle, word)


def test_a_submitted_ingest_asks_for_what_runs_on_its_own_node() -> None:
    def cpus(ingest_workers: int, *sources: dict[str, Any]) -> float:
        config = OnlyData(
            data=config_for(*sources, processes=3),
            cluster=ClusterConfig(ingest_workers=ingest_workers),
        )
        return default_resources(INGEST, config).cpus

    listed, folder = {"kind": "urls", "path": "list.jsonl"}, {"kind": "folder", "path": "mine"}
    assert (cpus(0, listed), cpus(8, listed), cpus(8, listed, folder)) == (3, 0, 3)

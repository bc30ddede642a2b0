"""Ten kills of an ingest and ten of a download process, at moments drawn by chance, while a reader
opens every shard that it sees.
"""

import io
import os
import random
import signal
import tarfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from flows.sources.url_table import DataConfig
from tests.flows.ingest.test_ingest import (
    config_for,
    is_downloading,
    started,
    stored,
    wait_until,
    workers_of,
    write_list,
)
from tests.helpers.hostile_server import Server
from tests.helpers.local_ingest import local_ingest, output_in

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
KILLS, SHARD = 10, 20


class Reader:
    """A thread that reads every tar under a final name to its end, over and over; `broken` says
    what it could not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.broken, self.read, self.over = folder, list[str](), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.over.wait(0.01):
            for tar in self.folder.rglob("shards/[0-9]*.tar"):
                data = tar.read_bytes()
                try:
                    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as opened:
                        pictures = sum(member.name.endswith(".png") for member in opened)
                    is_whole = data.endswith(bytes(1024)) and pictures == SHARD
                except tarfile.TarError:
                    is_whole = False
                self.read += 1
                if not is_whole:
                    self.broken.append(f"{tar} of {len(data)} bytes")

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        self.thread.join()


def listed(folder: Path, server: Server, count: int) -> DataConfig:
    rows = [{"url": f"{server.base}/good/{n}.png", "caption": str(n)} for n in range(count)]
    return config_for(
        write_list(folder / "list.jsonl", rows), threads=2, images_per_shard=SHARD, timeout_s=10
    )


def test_an_ingest_killed_ten_times_loses_and_doubles_nothing(tmp_path: Path) -> None:
    chance, count, moments = random.Random(), 400, []
    with Server(delay_s=0.05) as server, Reader(tmp_path) as reader:
        config = listed(tmp_path, server, count)
        while True:
            run = started(config, tmp_path)
            if len(moments) == KILLS:
                break
            before, goal = server.asked.total(), chance.choice([0, 1, 5, 15, 25, 35])
            delay_s = chance.uniform(0, 2) if goal == 0 else chance.uniform(0, 0.3)
            wait_until(
                lambda before=before, goal=goal, run=run: (
                    server.asked.total() >= before + goal or run.poll() is not None
                ),
                200,
            )
            time.sleep(delay_s)
            assert run.poll() is None, f"the run ended before its kill; killed at {moments}"
            moments.append((server.asked.total() - before, round(delay_s, 2)))
            workers = workers_of(run.pid)
            run.kill()
            run.wait()
            wait_until(lambda workers=workers: not any(map(is_downloading, workers)), 60)
        assert run.wait(timeout=200) == 0, moments
        asked = server.asked.total()
    print(
        "killed after (requests, seconds)",
        moments,
        f"; {asked} requests for {count} pictures, {reader.read} readings",
    )
    assert set(stored(output_in(tmp_path).folder)) == {str(n) for n in range(count)}
    assert reader.broken == [] and reader.read > count / SHARD
    assert (
        asked <= count + KILLS * 2 * SHARD
    )  # a kill may cost the two shards in the making, no more


@pytest.mark.usefixtures("local_ray")
def test_a_download_process_killed_at_ten_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    chance, count, moments = random.Random(), 80, []
    with Server(delay_s=0.05) as server, Reader(tmp_path) as reader:
        for turn in range(KILLS):
            folder = tmp_path / str(turn)
            folder.mkdir()
            config = listed(folder, server, count)
            before, goal = server.asked.total(), chance.randrange(count - SHARD)
            results: list[int] = []

            def download(
                config: DataConfig = config, folder: Path = folder, results: list[int] = results
            ) -> None:
                results.append(local_ingest(config, folder)["out"])

            run = threading.Thread(target=download)
            run.start()
            wait_until(
                lambda before=before, goal=goal: (
                    server.asked.total() >= before + goal and workers_of(os.getpid())
                ),
                200,
            )
            victim = chance.choice(workers_of(os.getpid()))
            os.kill(victim, signal.SIGKILL)
            moments.append(server.asked.total() - before)
            run.join(timeout=120)
            assert results == [count], f"killed after {moments} requests"
            assert set(stored(output_in(folder).folder)) == {str(n) for n in range(count)}
    print("killed after requests", moments, f"; {reader.read} readings")
    assert reader.broken == [] and workers_of(os.getpid()) == []

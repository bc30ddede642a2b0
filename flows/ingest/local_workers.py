"""Download processes on this machine, each `python -m flows.ingest.shard_worker`.

A process gets one shard at a time on stdin; a thread reads its messages. A worker reports what
`flows.ingest.shard_worker` reports, and `gone` when its process has ended.
`flows/ingest/download_pass.py` decides which worker gets which shard.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

WORKER = [sys.executable, "-m", "flows.ingest.shard_worker"]


@dataclass(frozen=True)
class Feed:
    """The rows of one shard to be: an Arrow file."""

    number: int
    file: Path
    rows: int
    is_served: bool = False
    """Whether some of its pictures are served on loopback, so that only this machine can make
    it."""


class Worker(Protocol):
    """What makes shards, one at a time."""

    feed: Feed | None
    rows: int
    row: int | None
    heard_s: float
    is_ready: bool
    is_here: bool

    def give(self, feed: Feed, folder: Path, settings: dict[str, Any]) -> None:
        """Have a shard made in FOLDER; returns at once, the answer is heard."""

    def kill(self) -> None:
        """End it; nothing is written under a final name afterwards."""


class LocalWorker:
    """One download process, and the thread that hears what it says. `folder` goes with the
    process.
    """

    is_here = True

    def __init__(
        self,
        log: Path,
        heard: "queue.Queue[tuple[Worker, str]]",
        max_pixels: int,
        folder: Path | None = None,
    ) -> None:
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
        environment["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(
            max_pixels
        )  # for a file whose header says other things to Pillow than to OpenCV
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*WORKER, str(os.getpid()), *([str(folder)] if folder else [])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.heard = heard
        self.feed: Feed | None = None
        self.rows = 0
        self.row: int | None = None
        self.heard_s = time.monotonic()
        self.is_ready = False
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.put((self, line.strip()))
        self.heard.put((self, "gone"))

    def give(self, feed: Feed, folder: Path, settings: dict[str, Any]) -> None:
        self.feed, self.rows, self.row, self.heard_s = feed, 0, None, time.monotonic()
        assert self.process.stdin is not None
        try:
            job = {
                "feed": str(feed.file.resolve()),
                "number": feed.number,
                "folder": str(folder.resolve()),
                "settings": settings,
            }
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its death is told by the listening thread

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Workers:
    """The download processes of a run; leaving the context ends them all.

    `starts` holds, for each that shall run, what starts it, and starts another in the place of one
    that ended.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.heard: queue.Queue[tuple[Worker, str]] = queue.Queue()
        self.all: dict[Worker, Callable[[], Worker]] = {}

    def __enter__(self) -> Self:
        return self

    def start(self, start: Callable[[], Worker], count: int = 1) -> None:
        """Start some more."""
        for _ in range(count):
            self.all[start()] = start

    def start_here(self, count: int, max_pixels: int) -> None:
        """Start processes on this machine."""
        self.start(lambda: LocalWorker(self.log, self.heard, max_pixels), count)

    def replace(self, worker: Worker) -> Worker:
        """End one and start another in its place."""
        start = self.all.pop(worker)
        worker.kill()
        fresh = start()
        self.all[fresh] = start
        return fresh

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.all:
            worker.kill()

"""Download processes on the nodes of a Ray cluster, one actor around each.

A finished shard comes back in pieces through Ray and is written here, so no shared disk is needed
and an abandoned actor writes nothing. An actor that ends, or a node that does not answer, is
reported as `lost`.
"""

import contextlib
import fcntl
import os
import queue
import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from flows.ingest.local_workers import Feed, LocalWorker, Worker, Workers
from infra.storage.atomic_files import put

PREFIX, CLAIM = "unclip-download-", "claim"
SUFFIXES = (".parquet", "_stats.json", ".tar")
PIECE_BYTES = 16 << 20
HEARING_S = 1.0
LOST_S = 60.0
"""Seconds without an answer after which a node counts as lost."""
SCHEDULING: dict[str, Any] = {
    "num_cpus": 1,
    "max_restarts": 0,
    "max_task_retries": 0,
    "max_concurrency": 4,
    "scheduling_strategy": "SPREAD",
}


def sweep() -> None:
    """Remove the folders of download processes on this node that are no more: nobody holds their
    claim, which is not a new one.
    """
    for claim in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{CLAIM}"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), claim.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime > LOST_S:
                shutil.rmtree(claim.parent, ignore_errors=True)


class DownloadActor:
    """A download process on the node where Ray put this actor, and its mailbox.

    Their folder goes with the process; where Ray itself kills that, the next one on the node
    removes it.
    """

    def __init__(self, opt_out: bytes, max_pixels: int) -> None:
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.claim = (self.folder / CLAIM).open("w")
        fcntl.flock(self.claim, fcntl.LOCK_EX)
        (self.folder / "opt_out.json").write_bytes(opt_out)
        self.heard: queue.Queue[tuple[Worker, str]] = queue.Queue()
        self.log = self.folder / "img2dataset.log"
        self.process = LocalWorker(self.log, self.heard, max_pixels, self.folder)

    def is_there(self) -> bool:
        """Answer."""
        return True

    def give(self, number: int, feed: bytes, rows: int, settings: dict[str, Any]) -> None:
        """Have a shard made."""
        file = self.folder / f"{number:05d}.arrow"
        file.write_bytes(feed)
        rules = settings["rules"] | {"loopback": ""}
        here = settings | {
            "rules": rules,
            "actual": settings["recorded"],
            "opt_out": str(self.folder / "opt_out.json"),
        }
        self.process.give(Feed(number, file, rows), self.folder, here)

    def hear(self, limit_s: float) -> list[str]:
        """Return what the process has said; waits for the first word."""
        lines = []
        try:
            lines.append(self.heard.get(timeout=limit_s)[1])
            while True:
                lines.append(self.heard.get_nowait()[1])
        except queue.Empty:
            return lines

    def read(self, name: str, offset: int) -> bytes:
        """Return a piece of a finished file; b"" behind its end."""
        with (self.folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)

    def drop(self, number: int) -> None:
        """Remove a shard that has been read, and its feed."""
        for file in self.folder.glob(f"{number:05d}*"):
            file.unlink()

    def last_words(self) -> str:
        """Return the end of the process's log."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


class RemoteWorker:
    """One actor, and the thread that hears what it says and fetches what it made."""

    is_here = False

    def __init__(
        self, log: Path, heard: "queue.Queue[tuple[Worker, str]]", max_pixels: int, opt_out: Path
    ) -> None:
        import ray

        self.log, self.heard = log, heard
        self.feed: Feed | None = None
        self.rows = 0
        self.row: int | None = None
        self.heard_s = time.monotonic()
        self.is_ready = self.is_over = False
        self.folder = Path()
        self.guard = threading.Lock()
        self.actor: Any = (
            ray.remote(DownloadActor).options(**SCHEDULING).remote(opt_out.read_bytes(), max_pixels)
        )
        threading.Thread(target=self.listen, daemon=True).start()

    def give(self, feed: Feed, folder: Path, settings: dict[str, Any]) -> None:
        self.feed, self.rows, self.row, self.heard_s, self.folder = (
            feed,
            0,
            None,
            time.monotonic(),
            folder,
        )
        self.actor.give.remote(feed.number, feed.file.read_bytes(), feed.rows, settings)

    def listen(self) -> None:
        import ray

        try:
            there = self.actor.is_there.remote()
            while not self.is_over and not ray.wait([there], timeout=HEARING_S)[0]:
                pass  # until a node has room
            while not self.is_over:
                for line in self.ask("hear", HEARING_S):
                    self.take(line)
        except (
            ray.exceptions.RayError,
            ConnectionError,
        ) as error:  # of any kind: the node or the actor is out of reach
            if not self.is_over:
                *_, last = [
                    type(error).__name__,
                    *filter(None, map(str.strip, str(error).splitlines())),
                ]
                self.heard.put((self, f"lost the node of a download process is gone: {last[:200]}"))

    def take(self, line: str) -> None:
        """Pass a word on; first fetch the shard that is told to be done."""
        word, number, *_ = [*line.split(), ""]
        if word == "done":
            try:
                self.collect(int(number))
            except OSError as error:
                line = f"failed {number} {type(error).__name__}: {error}"
        elif word == "gone":
            with self.log.open("a") as log:
                log.write(self.ask("last_words"))
        if word in ("failed", "outage"):
            self.ask("drop", int(number))
        self.heard.put((self, line))

    def collect(self, number: int) -> None:
        """Fetch a shard and put it under its name, unless this worker has been given up
        meanwhile.
        """
        part = self.folder / f".{number:05d}.{uuid.uuid4().hex}"
        part.mkdir()
        try:
            names = [f"{number:05d}{suffix}" for suffix in SUFFIXES]
            for name in names:
                with (part / name).open("wb") as file:
                    while piece := self.ask("read", name, file.tell()):
                        file.write(piece)
                        self.heard.put((self, "rows 0"))
            with self.guard:
                if not self.is_over:
                    put(part, names, self.folder)
            self.ask("drop", number)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor; raises RayError where no answer comes."""
        import ray

        return ray.get(getattr(self.actor, method).remote(*arguments), timeout=LOST_S)

    def kill(self) -> None:
        import ray

        with self.guard:
            self.is_over = True
        ray.kill(self.actor)  # and its process with it


def start_on_nodes(workers: Workers, count: int, max_pixels: int, opt_out: Path) -> None:
    """Ask the cluster that has been joined for download processes; they take up work as nodes have
    room for them.
    """
    workers.start(lambda: RemoteWorker(workers.log, workers.heard, max_pixels, opt_out), count)

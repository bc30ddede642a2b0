"""A service over the small drawn run of tests.helpers.evaluation_run, whose removal log and
segments a test can change.
"""

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import uvicorn

from indexing.ann.index import Index, IndexConfig, build
from indexing.ann.view import Segment
from indexing.service.app import make_app
from indexing.service.state import Encoders, Opened, Parts, ServeConfig, Service
from infra.storage.removal_log import Removals
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import FolderFiles
from tests.helpers import evaluation_run

CLIP = hashlib.sha256(b"the drawn CLIP").hexdigest()


class Fake:
    """What the flows would hand over, in memory."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]] | None = None) -> None:
        faiss.omp_set_num_threads(1)
        self.folder = folder
        self.rows = rows or evaluation_run.usual_rows()
        self.segments = [self.make("first", self.rows)]
        self.removals = Removals()
        self.stamps = [0, 0]  # of the removals and of the segments
        self.fetched: list[str] = []
        self.encoded: list[list[str]] = []
        self.reported: list[str] = []
        self.clip = CLIP
        self.name = "drawn"

    def make(self, name: str, rows: list[dict[str, Any]]) -> Segment:
        """Write and open another segment."""
        evaluation_run.write_run(self.folder / name, rows)
        (self.folder / name / "index").mkdir()
        build(
            IndexConfig(factory="Flat", queries=4),
            self.folder / name / "embed",
            self.folder / name / "index",
        )
        return Segment(
            Index.open(self.folder / name / "index"),
            ShardReader(FolderFiles(self.folder / name)),
            name,
        )

    def service(self, with_fetch: bool = False) -> Service:
        """Return the service."""
        return Service(
            Parts(
                removals_stamp=lambda: self.stamps[0],
                read_removals=lambda: self.removals,
                segments_stamp=lambda: self.stamps[1],
                open_segments=self.opened,
                fetch=self.fetch if with_fetch else None,
                report=self.reported.append,
            )
        )

    def opened(self) -> Opened:
        """Return what is to be served now."""
        return Opened(
            self.name,
            list(self.segments),
            Encoders(self.clip, self.encode_texts, evaluation_run.encode_images, 20),
        )

    def remove(self, **lists: set[str]) -> None:
        """Write to the removal log."""
        self.removals = Removals(**{name: frozenset(values) for name, values in lists.items()})
        self.stamps[0] += 1

    def encode_texts(self, texts: list[str]) -> Any:
        self.encoded.append(texts)
        return evaluation_run.encode_texts(texts)

    def fetch(self, url: str) -> bytes:
        self.fetched.append(url)
        raise ValueError("image_url: it could not be fetched (host_refused)")


@contextmanager
def serving(service: Service, **config: Any) -> Iterator[str]:
    """Serve on a free port, without a limit on the rate; yields the address."""
    app = make_app(service, ServeConfig(rate=0, **config), io.StringIO())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()

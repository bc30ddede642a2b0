"""State files of a running stage, from which a process on any node can continue.

A process writes a file into its node's folder and publishes it; another process fetches it. In a
local ROOT, both use the same folder and publishing does nothing. In a store, published files are in
`work/<stage>/<key>/state/` until the stage is committed. The files' contents are up to the caller.
"""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.storage import store
from infra.storage.node_cache import STATES, NodeCache
from infra.storage.store import Root

STATE = "state"


@dataclass(frozen=True)
class WorkFolder:
    """The work folder of one stage and key. Small and picklable, for use on other nodes."""

    root: Root
    name: str
    """Its path, relative to ROOT's `work` folder: `<stage>/<key>`."""

    @property
    def folder(self) -> Path:
        """This node's folder of the files. In a local ROOT, all processes share it."""
        base = self.root.scratch if self.root.folder else self.root.scratch / STATES
        return base / self.name

    def path(self, name: str) -> Path:
        """Return the path of a file on this node; create its folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def room(self, size_bytes: int) -> Iterator[None]:
        """Keep `size_bytes` of this node's scratch folder free for a file that the block writes.

        Copies of other files are removed for it. In a local ROOT, this does nothing. Raises
        StorageError if the files in use leave too little.
        """
        if self.root.folder:
            yield
            return
        with NodeCache(self.root.scratch, self.root.scratch_bytes).reserve(size_bytes):
            yield

    def publish(self, name: str) -> None:
        """Upload this node's file, so that other nodes can fetch it. Raises StorageError."""
        if not self.root.folder:
            store.upload(self.root, self.folder / name, self._published(name))

    def fetch(self, name: str) -> Path | None:
        """Fetch the file that was published last; return its path, or None if there is none.

        Raises StorageError.
        """
        path = self.path(name)
        if self.root.folder:
            return path if path.exists() else None
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.fetched")
        try:
            with self.room(store.size_of(self.root, self._published(name))):
                store.download(self.root, self._published(name), part)
                part.replace(path)
        except FileNotFoundError:
            return None
        finally:
            part.unlink(missing_ok=True)
        return path

    def fetched(self, name: str) -> Path:
        """Fetch a published file and return its path; raise FileNotFoundError if there is none."""
        path = self.fetch(name)
        if path is None:
            raise FileNotFoundError(f"{store.uri_of(self.root, self._published(name))} is missing")
        return path

    def _published(self, name: str) -> str:
        return f"work/{self.name}/{STATE}/{name}"


def local_work(folder: Path) -> WorkFolder:
    """Return a work folder on this machine only, for training without a ROOT."""
    root = store.open_root(str(folder), folder, for_writing=False)
    return WorkFolder(root, "")


class Publisher:
    """Context manager: publish files in a thread, so that the caller does not wait for the store.

    If a file is written again before it is published, only the newest content is published. When
    the block ends, all files are published. An error is raised by the next call or at the end.
    """

    def __init__(self, work: WorkFolder) -> None:
        self.work = work
        self.pending: dict[str, None] = {}
        self.error: BaseException | None = None
        self.is_over = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def publish(self, name: str) -> None:
        """Queue a file for publishing and return at once. Raises the error of an earlier file."""
        if self.work.root.folder:
            return
        with self.changed:
            if self.error:
                raise self.error
            self.pending[name] = None
            self.changed.notify()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.changed:
            self.is_over = True
            self.changed.notify()
        self.thread.join()
        if self.error and kind is None:
            raise self.error

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.pending and not self.is_over:
                    self.changed.wait()
                if not self.pending or self.error:
                    return
                name = next(iter(self.pending))
                del self.pending[name]
            try:
                self.work.publish(name)
            except BaseException as error:
                with self.changed:
                    self.error = error

"""Read images from the shards of a stage, in a local folder or in a store.

Reads byte ranges at the offsets of a keep list. Refuses nothing: what a range must hold is checked
by the caller. Safe to use from several threads.
"""

import hashlib
import threading
from typing import BinaryIO

from infra.storage.stage_files import DOWNLOAD_TRIES, StageFiles

SHARDS = "shards"


class ShardReader:
    """Reads ranges of `shards/<name>`, in a folder or in a store.

    `is_sequential` is for reading whole shards in order: each thread keeps its last shard open, and
    a shard of a store is downloaded completely into the node's cache. Otherwise, only the requested
    ranges of a store's shards are downloaded.
    """

    def __init__(self, files: StageFiles, is_sequential: bool = False) -> None:
        self.files = files
        self.is_sequential = is_sequential or files.is_local
        self._last = threading.local()
        self._opened: dict[int, BinaryIO] = {}
        self._guard = threading.Lock()

    def sequential(self) -> "ShardReader":
        """Return a reader of the same shards for reading whole shards in order."""
        return ShardReader(self.files, is_sequential=True)

    def read(self, shard: str, offset: int, size_bytes: int, sha256: str = "") -> bytes:
        """Return a range of a shard as bytes; fewer bytes at its end.

        sha256: of the range. A range of a store that differs from it is fetched again, since the
        network may have changed it; the caller compares what comes last. Raises FileNotFoundError,
        DataError.
        """
        if not self.is_sequential:
            for _ in range(DOWNLOAD_TRIES):
                data = self.files.read(f"{SHARDS}/{shard}", offset, size_bytes)
                if not sha256 or hashlib.sha256(data).hexdigest() == sha256:
                    break
            return data
        file = self._open(shard)
        file.seek(offset)
        return file.read(size_bytes)

    def size_bytes(self, shard: str) -> int:
        """Return the size of a shard in bytes. Raises FileNotFoundError."""
        return self.files.size_bytes(f"{SHARDS}/{shard}")

    def __str__(self) -> str:
        """Return the path or URI of the shards, for messages."""
        return f"{self.files.address()}/{SHARDS}"

    def close(self) -> None:
        """Close all open shards, so that the node's cache can remove them."""
        with self._guard:
            for file in self._opened.values():
                file.close()
            self._opened.clear()
            self._last = threading.local()

    def _open(self, shard: str) -> BinaryIO:
        if getattr(self._last, "shard", None) != shard:
            file = self.files.open(f"{SHARDS}/{shard}")
            with self._guard:
                before = self._opened.pop(threading.get_ident(), None)
                self._opened[threading.get_ident()] = file
            if before:
                before.close()
            self._last.shard, self._last.file = shard, file
        opened: BinaryIO = self._last.file
        return opened

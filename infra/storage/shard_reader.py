"""Reads images out of the shards of a stage, wherever the stage is.

Reads bytes at a place that a keep list names; checks nothing. Safe to use from many threads.
"""

import threading
from typing import BinaryIO

from infra.storage.stage_files import StageFiles

SHARDS = "shards"


class ShardReader:
    """Reads ranges of `shards/<name>`, in a folder or in a store.

    `is_sequential` is for readers that go through whole shards: each thread keeps the shard that it
    read last open, and a store's is fetched whole into the node's cache. Else only the ranges of a
    store's shards are fetched.
    """

    def __init__(self, files: StageFiles, is_sequential: bool = False) -> None:
        self.files = files
        self.is_sequential = is_sequential or files.is_local
        self._last = threading.local()
        self._opened: dict[int, BinaryIO] = {}
        self._guard = threading.Lock()

    def sequential(self) -> "ShardReader":
        """Return a reader of the same shards for whoever goes through them."""
        return ShardReader(self.files, is_sequential=True)

    def read(self, shard: str, offset: int, size_bytes: int) -> bytes:
        """Return a range; fewer bytes where the shard ends before.

        Raises FileNotFoundError, DataError.
        """
        if not self.is_sequential:
            return self.files.read(f"{SHARDS}/{shard}", offset, size_bytes)
        file = self._open(shard)
        file.seek(offset)
        return file.read(size_bytes)

    def size_bytes(self, shard: str) -> int:
        """Return the size of a shard. Raises FileNotFoundError."""
        return self.files.size_bytes(f"{SHARDS}/{shard}")

    def __str__(self) -> str:
        """Return where the shards are, for messages."""
        return f"{self.files.address()}/{SHARDS}"

    def close(self) -> None:
        """Close the open shards, so that the node's cache may remove them."""
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

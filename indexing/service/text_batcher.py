"""Encodes text queries in batches and caches their vectors.

Queries that arrive together are encoded together, in one thread, so that other requests go on. The
encoder is a plain callable that takes a list of texts.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.zero_shot import EncodeTexts

MAX_BATCH = 32
MAX_CACHED = 8192


class Texts:
    """Batches and caches the encoding of texts; belongs to one event loop."""

    def __init__(self, observe: Callable[[int], None]) -> None:
        """Call `observe` with the size of every batch."""
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, "encode-texts")
        self._waiting: dict[tuple[str, str], tuple[EncodeTexts, asyncio.Future[Floats]]] = {}
        self._cache: OrderedDict[tuple[str, str], Floats] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None
        self.hits = self.misses = 0

    async def vector(self, encode: EncodeTexts, clip: str, text: str) -> Floats:
        """Return the unit vector (D,) of a text; `encode` is the encoder of the CLIP with the
        fingerprint `clip`.
        """
        name = (clip, text)
        if name in self._cache:
            self._cache.move_to_end(name)
            self.hits += 1
            return self._cache[name]
        self.misses += 1
        if name not in self._waiting:
            self._waiting[name] = encode, asyncio.get_running_loop().create_future()
        future = self._waiting[name][1]
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asyncio.shield(future)  # others may wait for it when this client leaves

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            clip, encode = next((name[0], waiting[0]) for name, waiting in self._waiting.items())
            batch = [name for name in self._waiting if name[0] == clip][:MAX_BATCH]
            vectors: Floats | Exception
            try:
                vectors = unit(
                    np.asarray(
                        await loop.run_in_executor(
                            self._thread, encode, [text for _, text in batch]
                        ),
                        np.float32,
                    )
                )
            except Exception as error:  # raised in the requests that wait
                vectors = error
            self._observe(len(batch))
            for position, name in enumerate(batch):
                future = self._waiting.pop(name)[1]
                if isinstance(vectors, Exception):
                    future.set_exception(vectors)
                else:
                    self._cache[name] = vectors[position]
                    future.set_result(vectors[position])
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

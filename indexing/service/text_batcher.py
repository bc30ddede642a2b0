"""Text queries on their way to CLIP: those that arrive together are encoded together, those asked
for before are remembered.

Knows the encoder as a plain callable that takes a list of texts; runs it in one thread, so that
answers to other queries go on.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.zero_shot import EncodeTexts

AT_ONCE = 32
REMEMBERED = 8192


class Texts:
    """Encodes texts in batches; belongs to one event loop."""

    def __init__(self, observe: Callable[[int], None]) -> None:
        """`observe` is told the size of every batch."""
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, "encode-texts")
        self._waiting: dict[tuple[str, str], tuple[EncodeTexts, asyncio.Future[Floats]]] = {}
        self._known: OrderedDict[tuple[str, str], Floats] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None
        self.hits = self.misses = 0

    async def vector(self, encode: EncodeTexts, clip: str, text: str) -> Floats:
        """Return the unit vector of a text (D,), as the CLIP of that fingerprint sees it; `encode`
        is that CLIP.
        """
        name = (clip, text)
        if name in self._known:
            self._known.move_to_end(name)
            self.hits += 1
            return self._known[name]
        self.misses += 1
        if name not in self._waiting:
            self._waiting[name] = encode, asyncio.get_running_loop().create_future()
        future = self._waiting[name][1]
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asyncio.shield(
            future
        )  # a client that leaves does not take the others' answer with it

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            clip, encode = next((name[0], waiting[0]) for name, waiting in self._waiting.items())
            batch = [name for name in self._waiting if name[0] == clip][:AT_ONCE]
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
            except Exception as error:  # handed to those who asked
                vectors = error
            self._observe(len(batch))
            for position, name in enumerate(batch):
                future = self._waiting.pop(name)[1]
                if isinstance(vectors, Exception):
                    future.set_exception(vectors)
                else:
                    self._known[name] = vectors[position]
                    future.set_result(vectors[position])
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

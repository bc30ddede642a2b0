"""What all routes of the service share: the current version, a query's vector, the search, and the
threads that they run on.

A wrong request becomes an HTTPException here, with a message for the client.
"""

import asyncio
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import HTTPException

from indexing.ann.index import Modality
from indexing.ann.view import Filter, Hit, View
from indexing.data.embedding_store import Floats, unit
from indexing.service import image_upload
from indexing.service.freshness import Freshness, LateRenewalError
from indexing.service.state import ServeConfig, Service, Version
from indexing.service.text_batcher import Texts
from infra.captions import clean_caption
from infra.errors import UnclipError

DECODED_AT_ONCE = 2
"""Maximum query pictures that are decoded at once: one of 32 million pixels takes a third of a
gigabyte meanwhile."""
FETCHED_AT_ONCE = 8
DRAWN_AT_ONCE = 4
EVERYTHING = Filter()


class Threads:
    """Threads for each kind of work, so that no kind delays another or a health check."""

    def __init__(self) -> None:
        self.searching = ThreadPoolExecutor(os.cpu_count() or 1, "search")
        """For searches; an executor starts them faster than a limiter does."""
        self.counting = CapacityLimiter(1)
        self.decoding = CapacityLimiter(DECODED_AT_ONCE)
        self.fetching = CapacityLimiter(FETCHED_AT_ONCE)
        self.drawing = CapacityLimiter(DRAWN_AT_ONCE)


class Query(NamedTuple):
    """A query: exactly one field is not None."""

    text: str | None
    image: str | None
    """A picture file in base64."""
    image_url: str | None
    embedding: Sequence[float] | None
    key: str | None = None


@dataclass(frozen=True)
class SearchOptions:
    """Which hits of a query are wanted; see `View.search`."""

    k: int
    columns: Sequence[str]
    modality: Modality = "image"
    chosen: Filter = EVERYTHING
    offset: int = 0
    near: float | None = None
    without: frozenset[str] = frozenset()


class Backend:
    """The service and the state that its routes share."""

    def __init__(self, service: Service, config: ServeConfig, texts: Texts) -> None:
        self.service, self.config, self.texts = service, config, texts
        self.freshness = Freshness(service, config.removal_lag_s)
        self.threads = Threads()

    async def version(self) -> Version:
        """Return the served version, without removed samples; HTTP 503 if the removal log cannot
        be read.
        """
        try:
            return await self.freshness.version()
        except LateRenewalError as error:
            raise HTTPException(503, str(error), {"retry-after": "2"}) from None
        except UnclipError as error:
            self.service.report(str(error))
            raise HTTPException(
                503,
                "the removal log cannot be read, so no results are shown; see the service's log",
            ) from None

    def check_clip(self, version: Version, clip: str | None) -> None:
        """Raise HTTP 409 if `clip` is not the CLIP that made the index."""
        if clip is not None and clip != version.view.clip:
            raise HTTPException(
                409,
                f"CLIP {version.view.clip} made the index, but CLIP {clip} the query: embed it "
                "with the index's own",
            )

    async def vector(self, version: Version, query: Query) -> tuple[Floats | Hit, frozenset[str]]:
        """Return the query's unit vector (D,), or the sample that has it, and the pictures
        (SHA-256) that must not be among the results.
        """
        view, encoders = version.view, version.encoders
        if query.text is not None:
            text = clean_caption(query.text)
            if not text:
                raise HTTPException(422, "text: it is empty")
            return await self.texts.vector(encoders.texts, encoders.clip, text), frozenset()
        if query.key is not None:
            hit = find_hit(view, query.key)
            return hit, frozenset({hit.facts["sha256"]})
        with value_errors_as_422():
            if query.embedding is not None:
                return _as_vector(query.embedding, view.dim), frozenset()
            vector = await to_thread.run_sync(
                self.service.encode_picture,
                encoders,
                await self._picture(query),
                limiter=self.threads.decoding,
            )
            return vector, frozenset()

    async def _picture(self, query: Query) -> bytes:
        """Return the file of a query picture. Raises ValueError if there is none."""
        if query.image is not None:
            return await to_thread.run_sync(
                image_upload.from_base64, query.image, limiter=self.threads.decoding
            )
        if self.service.parts.fetch is None:
            raise HTTPException(
                403, "image_url: this service fetches no pictures; send the picture itself"
            )
        return await to_thread.run_sync(
            self.service.parts.fetch, query.image_url or "", limiter=self.threads.fetching
        )

    async def hits(self, view: View, query: Floats | Hit, options: SearchOptions) -> list[Hit]:
        """Return the hits of `View.search`, which runs in a thread."""
        search = partial(_search, view, query, options)
        with value_errors_as_422():
            return await asyncio.get_running_loop().run_in_executor(self.threads.searching, search)

    def close(self) -> None:
        """Stop the search threads."""
        self.threads.searching.shutdown()


@contextmanager
def value_errors_as_422() -> Iterator[None]:
    """Turn a ValueError into HTTP 422 with its message."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def find_hit(view: View, key: str) -> Hit:
    """Return the sample with that key; HTTP 404 if there is none."""
    hit = view.find_key(key)
    if hit is None:
        raise HTTPException(404, "there is no sample with that key")
    return hit


def _search(view: View, query: Floats | Hit, options: SearchOptions) -> list[Hit]:
    return view.search(
        unit(view.vector(query)[None])[0] if isinstance(query, Hit) else query,
        options.k,
        options.modality,
        options.chosen,
        options.offset,
        options.near,
        options.without,
        options.columns,
    )


def _as_vector(embedding: Sequence[float], dim: int) -> Floats:
    """Return an embedding as a unit vector (D,). Raises ValueError for a wrong length, or if all
    numbers are 0.
    """
    if len(embedding) != dim:
        raise ValueError(
            f"embedding: it has {len(embedding)} numbers but the index has {dim} dimensions"
        )
    length = math.hypot(*embedding)  # ten times faster for a list than numpy
    if length == 0:
        raise ValueError("embedding: all its numbers are 0")
    return (np.array(embedding) / length).astype(np.float32)

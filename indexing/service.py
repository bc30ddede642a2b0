"""What the service holds between requests: the current version of index and CLIP, the thumbnails; and how a view is replaced.

Handed over by the flows as plain callables; knows nothing of ROOT, of models and of HTTP. A request takes `current()` once and answers
from it alone, so that every answer comes from one version.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from pydantic import Field

from indexing.embeddings import Floats, unit
from indexing.generation import EncodeImages
from indexing.pictures import read_picture
from indexing.uploads import decode
from indexing.view import Hit, Segment, View
from indexing.zero_shot import EncodeTexts
from infra.removals import Removals
from infra.settings import Section

POLL_S = 1.0
THUMBNAILS_KEPT = 4096
THUMBNAIL_PX = 256


class ServeConfig(Section):
    """How the service is reached and what it allows; no part of a recipe, since it makes nothing."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """0 takes a free one."""
    token: str | None = Field(default=None, min_length=16)
    """What a client must present; None only on loopback."""
    rate: float = Field(default=50, ge=0)
    """Requests a second that one address may make in the long run (a thumbnail counts a tenth); 0 sets no limit."""
    burst: float = Field(default=200, ge=1)
    """Requests that it may make at once."""
    body_bytes: int = Field(default=12 << 20, ge=1024)
    """Largest request body: a picture of 8 MiB in base64 fits."""
    max_results: int = Field(default=200, ge=1, le=10_000)
    """Most results of one answer."""
    max_depth: int = Field(default=2000, ge=1, le=100_000)
    """How deep one may page."""


@dataclass(frozen=True)
class Encoders:
    """The CLIP that belongs to an index, as plain callables."""

    clip: str
    """Its fingerprint."""
    texts: EncodeTexts
    images: EncodeImages
    image_px: int
    """Side of the squares that `images` takes."""


@dataclass(frozen=True)
class Version:
    """What one request is answered from: an index and the CLIP that made it."""

    view: View
    encoders: Encoders


@dataclass(frozen=True)
class Parts:
    """What the flows hand over."""

    name: str
    """The run's name: what the service answers /indices-list with."""
    removals_stamp: Callable[[], Hashable]
    """Changes whenever the removal log does; asked before every query, so it must be cheap."""
    read_removals: Callable[[], Removals]
    segments_stamp: Callable[[], Hashable]
    """Changes whenever other segments are to be served; asked every second."""
    open_segments: Callable[[], tuple[list[Segment], Encoders]]
    """Open them, and the CLIP that made them."""
    fetch: Callable[[str], bytes] | None
    """Returns the bytes behind an URL or raises ValueError; None where query URLs are not allowed."""
    report: Callable[[str], None]
    """Is told, in a line, what goes wrong between requests."""


class Service:
    """The state behind the HTTP routes."""

    def __init__(self, parts: Parts) -> None:
        """Open the index. Raises DataError or CallerError where there is none to open."""
        self.parts = parts
        self._changing = threading.Lock()
        self._encoding = threading.Lock()
        self._segments_stamp = parts.segments_stamp()
        self._removals_stamp = parts.removals_stamp()
        segments, encoders = parts.open_segments()
        self._version = Version(View(segments, parts.read_removals(), encoders.clip), encoders)
        self.swaps = 0
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._drawing = threading.Lock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch-index", daemon=True)
        self._watcher.start()

    def current(self) -> Version:
        """Return the version to answer from: nothing that was taken down before this call is in it."""
        stamp = self.parts.removals_stamp()
        if stamp != self._removals_stamp:
            with self._changing:
                if stamp != self._removals_stamp:
                    self._version = replace(self._version, view=self._version.view.after(self.parts.read_removals()))
                    self._removals_stamp = stamp
                    self.swaps += 1
        return self._version

    def refresh(self) -> None:
        """Serve other segments where there are others; queries go on meanwhile, on the old ones."""
        stamp = self.parts.segments_stamp()
        if stamp == self._segments_stamp:
            return
        segments, encoders = self.parts.open_segments()
        for segment in segments:
            segment.rows_of(0)  # sorts the keys' numbers before a request has to
        with self._changing:
            removals_stamp = self.parts.removals_stamp()
            self._version = Version(View(segments, self.parts.read_removals(), encoders.clip), encoders)
            self._removals_stamp, self._segments_stamp = removals_stamp, stamp
            self.swaps += 1

    def encode_picture(self, encoders: Encoders, data: bytes) -> Floats:
        """Return the unit vector (D,) of a picture file's bytes. Raises ValueError for what is no picture."""
        pixels = decode(data, encoders.image_px)
        with self._encoding:
            vectors = np.asarray(encoders.images(pixels[None]), np.float32)
        return np.asarray(unit(vectors)[0], np.float32)

    def thumbnail(self, view: View, hit: Hit) -> bytes:
        """Return a sample's picture as a PNG of at most THUMBNAIL_PX. Raises DataError where its shard does not hold it."""
        name = (hit.facts["sha256"], hit.facts["offset"])
        with self._drawing:
            if name in self._thumbnails:
                self._thumbnails.move_to_end(name)
                return self._thumbnails[name]
        side = min(THUMBNAIL_PX, max(hit.facts["width_px"], hit.facts["height_px"], 1))
        picture = read_picture(hit.facts, view.segments[hit.segment].shards, side)
        drawn = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        with self._drawing:
            self._thumbnails[name] = drawn
            while len(self._thumbnails) > THUMBNAILS_KEPT:
                self._thumbnails.popitem(last=False)
        return drawn

    def close(self) -> None:
        """End the watcher."""
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.refresh()
            except Exception as error:  # the old version goes on being served; the next second tries again
                self.parts.report(f"the index could not be opened again: {type(error).__name__}: {error}")

"""What the service holds between requests: the current version of index and CLIP, the thumbnails;
and how a view is replaced.

Handed over by the flows as plain callables; knows nothing of ROOT, of models and of HTTP. A request
takes `current()` once and answers from it alone, so that every answer comes from one version.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import Field

from indexing.ann.view import Hit, Segment, View
from indexing.data.embedding_store import Floats, unit
from indexing.data.images import Square, read_picture, square
from indexing.metrics.clip_score import EncodeImages
from indexing.metrics.zero_shot import EncodeTexts
from indexing.service.image_upload import decode
from infra.settings import Section
from infra.storage.removal_log import Removals

POLL_S = 1.0
THUMBNAILS_BYTES = 64 << 20
THUMBNAIL_PX = 256


class ServeConfig(Section):
    """How the service is reached and what it allows; no part of a recipe, since it makes
    nothing.
    """

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """0 takes a free one."""
    token: str | None = Field(default=None, min_length=16)
    """What a client must present; None only on loopback."""
    rate: float = Field(default=50, ge=0)
    """Requests a second that one address may make in the long run (a thumbnail counts a tenth); 0
    sets no limit. All addresses of an IPv6 network of 64 bits are one. Behind a proxy everybody has
    the proxy's address: limit the rate there, and set 0 here."""
    burst: float = Field(default=200, ge=1)
    """Requests that it may make at once."""
    body_bytes: int = Field(default=12 << 20, ge=1024)
    """Largest request body: a picture of 8 MiB in base64 fits."""
    max_results: int = Field(default=200, ge=1, le=10_000)
    """Most results of one answer."""
    max_depth: int = Field(default=2000, ge=1, le=100_000)
    """Maximum offset of a page."""
    allow_origins: tuple[str, ...] = ()
    """Origins (`https://host:port`) whose pages may ask from a browser, such as clip-retrieval's
    front end; by default ours alone."""
    removal_lag_s: float = Field(default=0, ge=0)
    """How old what is known of the removal log may be when a query comes, where a look at it is a
    round trip (a ROOT in a store)."""


@dataclass(frozen=True)
class Encoders:
    """The CLIP that belongs to an index, as plain callables."""

    clip: str
    """Its fingerprint."""
    texts: EncodeTexts
    images: EncodeImages
    image_px: int
    """Side of the squares that `images` takes."""
    square: Square = square
    """How a picture becomes one."""


@dataclass(frozen=True)
class Opened:
    """A run's index, open, and the CLIP that made it."""

    name: str
    """The run's name."""
    segments: list[Segment]
    encoders: Encoders


@dataclass(frozen=True)
class Version:
    """The index and the CLIP that one request is answered from."""

    name: str
    view: View
    encoders: Encoders


@dataclass(frozen=True)
class Parts:
    """Callables that the flows pass to the service."""

    removals_stamp: Callable[[], Hashable]
    """Changes whenever the removal log, as far as it has been looked at, does; asked before every
    query, so it must be cheap."""
    read_removals: Callable[[], Removals]
    segments_stamp: Callable[[], Hashable]
    """Changes whenever another run or other segments are to be served; asked every second."""
    open_segments: Callable[[], Opened]
    """Open them; those that have not changed should stay open."""
    fetch: Callable[[str], bytes] | None
    """Returns the bytes behind an URL or raises ValueError; None where query URLs are not
    allowed."""
    report: Callable[[str], None]
    """Is told, in a line, what goes wrong between requests."""
    look_at_removals: Callable[[], None] | None = None
    """Looks at the log, for the stamp, where that takes a round trip; None where the stamp itself
    looks."""


class Service:
    """The state behind the HTTP routes."""

    def __init__(self, parts: Parts) -> None:
        """Open the index. Raises DataError or CallerError where there is none to open."""
        self.parts = parts
        self._changing = threading.Lock()
        self._encoding = threading.Lock()
        self._segments_stamp: Hashable = None
        self._removals_stamp: Hashable = None
        self.version: Version
        """The version that was made last; `current` makes another where the log has changed."""
        self.names: set[str] = set()
        """What the served run was called since the service started: a client may go on asking by an
        older name."""
        self._open()
        self.swaps = 0
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._thumbnail_bytes = 0
        self._drawing = threading.Lock()
        self._complaint = ""
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch-index", daemon=True)
        self._watcher.start()

    def is_current(self) -> bool:
        """Say whether the removal log is as `version` knows it."""
        return self.parts.removals_stamp() == self._removals_stamp

    def current(self) -> Version:
        """Return the version to answer from: nothing that was taken down before this call is in it.
        Takes its time where there is news.

        Raises DataError where the log cannot be read: what it names must not be shown.
        """
        if self.is_current():
            return self.version
        with self._changing:
            stamp = self.parts.removals_stamp()
            if stamp != self._removals_stamp:
                view = self.version.view.after(self.parts.read_removals())
                if view is not self.version.view:
                    self.version = Version(self.version.name, view, self.version.encoders)
                    self.swaps += 1
                self._removals_stamp = stamp
            return self.version

    def refresh(self) -> None:
        """Serve another run or other segments where there are others; queries go on meanwhile, on
        the old ones.
        """
        if self.parts.segments_stamp() != self._segments_stamp:
            self._open()
            self.swaps += 1
        self.current()

    def _open(self) -> None:
        stamp = self.parts.segments_stamp()
        opened = self.parts.open_segments()
        for segment in opened.segments:
            segment.rows_of(0)  # sorts the keys' numbers before a request has to
        view = View(opened.segments, self.parts.read_removals(), opened.encoders.clip)
        with self._changing:
            removals_stamp = self.parts.removals_stamp()
            self.version = Version(
                opened.name, view.after(self.parts.read_removals()), opened.encoders
            )
            self._removals_stamp, self._segments_stamp = removals_stamp, stamp
            self.names.add(opened.name)

    def encode_picture(self, encoders: Encoders, data: bytes) -> Floats:
        """Return the unit vector (D,) of a picture file's bytes. Raises ValueError for what is no
        picture.
        """
        pixels = decode(data, encoders.image_px, encoders.square)
        with self._encoding:
            vectors = np.asarray(encoders.images(pixels[None]), np.float32)
        return np.asarray(unit(vectors)[0], np.float32)

    def thumbnail(self, view: View, hit: Hit) -> bytes:
        """Return a sample's picture as a PNG of at most THUMBNAIL_PX. Raises DataError where its
        shard does not hold it.
        """
        name = (hit.facts["sha256"], hit.facts["offset"])
        with self._drawing:
            if name in self._thumbnails:
                self._thumbnails.move_to_end(name)
                return self._thumbnails[name]
        side = min(THUMBNAIL_PX, max(hit.facts["width_px"], hit.facts["height_px"], 1))
        picture = read_picture(hit.facts, view.segments[hit.segment].shards, side)
        drawn = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        with self._drawing:
            self._thumbnail_bytes += len(drawn) - len(self._thumbnails.get(name, b""))
            self._thumbnails[name] = drawn
            while self._thumbnail_bytes > THUMBNAILS_BYTES:
                self._thumbnail_bytes -= len(self._thumbnails.popitem(last=False)[1])
        return drawn

    def close(self) -> None:
        """End the watcher."""
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            complaint = ""
            try:
                if self.parts.look_at_removals:
                    self.parts.look_at_removals()
                self.refresh()
            except (
                Exception
            ) as error:  # the old version goes on being served; the next second tries again
                complaint = f"the index could not be opened again: {type(error).__name__}: {error}"
            if complaint and complaint != self._complaint:
                self.parts.report(complaint)
            self._complaint = complaint

"""The state of the service between requests: the current version of index and CLIP, and cached
thumbnails.

The flows pass the index and the models as plain callables. A request takes one version and answers
from it alone. Knows nothing of ROOT, models and HTTP.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import Field

from indexing.ann.view import Hit, Segment, View
from indexing.data.embedding_store import Floats, unit
from indexing.data.images import Square, read_picture
from indexing.metrics.clip_score import EncodeImages
from indexing.metrics.zero_shot import EncodeTexts
from indexing.service.image_upload import PictureDecoders
from infra.console.line_log import LineWriter
from infra.errors import CutFileError
from infra.settings import Section
from infra.square_image import square
from infra.storage.removal_log import Removals

POLL_S = 1.0
JOIN_S = 1.0
"""Maximum seconds that the end of the service waits for a view that is being renewed."""
THUMBNAILS_BYTES = 64 << 20
THUMBNAIL_PX = 256


class ServeConfig(Section):
    """Address and limits of the service; no part of a recipe."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """TCP port; 0 selects a free one."""
    token: str | None = Field(default=None, min_length=16)
    """Token that clients must send; None only on loopback."""
    rate: float = Field(default=50, ge=0)
    """Maximum requests per second of one address in the long run; 0 sets no limit.

    A thumbnail counts as a tenth, and an IPv6 /64 as one address. Behind a proxy all clients have
    the proxy's address: limit the rate there, and set 0 here.
    """
    burst: float = Field(default=200, ge=1)
    """Maximum requests that one address may send at once."""
    body_bytes: int = Field(default=12 << 20, ge=1024)
    """Maximum bytes of a request body; a picture of 8 MiB in base64 fits."""
    max_results: int = Field(default=200, ge=1, le=10_000)
    """Maximum results of one answer."""
    max_depth: int = Field(default=2000, ge=1, le=100_000)
    """Maximum of offset + k."""
    allow_origins: tuple[str, ...] = ()
    """Origins (`https://host:port`) whose web pages may send requests, such as clip-retrieval's
    front end, in addition to our own page."""
    removal_lag_s: float = Field(default=0, ge=0)
    """Maximum age in seconds of the last check of the removal log, with a ROOT in a store."""


@dataclass(frozen=True)
class Encoders:
    """The CLIP that made an index, as plain callables."""

    clip: str
    """Its fingerprint."""
    texts: EncodeTexts
    images: EncodeImages
    image_px: int
    """Side of the squares that `images` takes."""
    square: Square = square
    """Turns a picture into such a square."""


@dataclass(frozen=True)
class Opened:
    """The open index of a run, and the CLIP that made it."""

    name: str
    """The run's name."""
    segments: list[Segment]
    encoders: Encoders


@dataclass(frozen=True)
class Version:
    """The index and the CLIP that answer one request."""

    name: str
    view: View
    encoders: Encoders


@dataclass(frozen=True)
class Parts:
    """Callables that the flows pass to the service."""

    removals_stamp: Callable[[], Hashable]
    """Returns a value that changes with the removal log, as of its last check. Called before every
    query, so it must be fast."""
    read_removals: Callable[[], Removals]
    """Returns everything that the removal log names."""
    segments_stamp: Callable[[], Hashable]
    """Returns a value that changes with the run or the segments to serve; called every second."""
    open_segments: Callable[[], Opened]
    """Opens the segments; those that have not changed should stay open."""
    fetch: Callable[[str], bytes] | None
    """Returns the bytes of a URL or raises ValueError; None if query URLs are not allowed."""
    report: Callable[[str], None]
    """Receives a line about each fault outside of requests."""
    check_removals: Callable[[], None] | None = None
    """Checks a removal log in a store, which takes a round trip; None if `removals_stamp` checks
    it."""


class Service:
    """The state behind the HTTP routes."""

    def __init__(self, parts: Parts) -> None:
        """Open the index. Raises DataError or CallerError if that fails."""
        self.parts = parts
        self._reports = LineWriter(self._write_reports, lambda count: f"{count} lines were dropped")
        self._changing = threading.Lock()
        self._encoding = threading.Lock()
        self._decoders = PictureDecoders()
        self._segments_stamp: Hashable = None
        self._removals_stamp: Hashable = None
        self.version: Version
        """The newest version; `current` makes another if the removal log has changed."""
        self.names: set[str] = set()
        """Names of the served runs since the service started: clients may still use an older
        one."""
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
        """Return whether `version` has everything that the removal log names."""
        return self.parts.removals_stamp() == self._removals_stamp

    def current(self) -> Version:
        """Return a version without anything that was removed before this call; slow if the log has
        changed.

        Raises DataError if the log cannot be read, because removed samples must not be shown.
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
        """Switch to another run or other segments if there are any, or open segments again whose
        files were cut; queries use the old ones meanwhile.
        """
        if self.parts.segments_stamp() != self._segments_stamp or self._is_cut():
            self._open()
            self.swaps += 1
        self.current()

    def _is_cut(self) -> bool:
        try:
            self.version.view.check_whole()
        except CutFileError:
            return True
        return False

    def _open(self) -> None:
        stamp = self.parts.segments_stamp()
        opened = self.parts.open_segments()
        for segment in opened.segments:
            segment.rows_of(0)  # sorts the keys' numbers now, not in a request
        view = View(opened.segments, self.parts.read_removals(), opened.encoders.clip)
        with self._changing:
            removals_stamp = self.parts.removals_stamp()
            self.version = Version(
                opened.name, view.after(self.parts.read_removals()), opened.encoders
            )
            self._removals_stamp, self._segments_stamp = removals_stamp, stamp
            self.names.add(opened.name)

    def encode_picture(self, encoders: Encoders, data: bytes) -> Floats:
        """Return the unit vector (D,) of a picture file. Raises ValueError if it cannot be
        decoded.
        """
        pixels = self._decoders.decode(data, encoders.image_px, encoders.square)
        with self._encoding:
            vectors = np.asarray(encoders.images(pixels[None]), np.float32)
        return np.asarray(unit(vectors)[0], np.float32)

    def thumbnail(self, view: View, hit: Hit) -> bytes:
        """Return a sample's picture as a PNG of at most THUMBNAIL_PX. Raises DataError if it cannot
        be read from its shard.
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
        """Stop the watcher and the decoding of pictures."""
        self._decoders.close()
        self._stop.set()
        self._watcher.join(JOIN_S)
        self._reports.close()

    def report(self, line: str) -> None:
        """Pass a line about a fault to `parts.report`, without waiting for it."""
        self._reports.put(line)

    def _write_reports(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.parts.report(line)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            complaint = ""
            try:
                if self.parts.check_removals:
                    self.parts.check_removals()
                self.refresh()
            except Exception as error:  # the old version stays; the next round tries again
                complaint = f"the index could not be opened again: {type(error).__name__}: {error}"
            if complaint and complaint != self._complaint:
                self.report(complaint)
            self._complaint = complaint

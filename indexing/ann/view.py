"""One version of a live index: the segments that hold its vectors, and which of their rows were
taken down.

A view never changes. A take-down, an addition or another index makes a new view, and a running
query finishes on the view that it started with. Callers name a pair by its key, or by a number that
is computed from the key; row numbers are internal. Legend: N rows of a segment, D dimensions.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from indexing.ann.index import Allowed, Index, Modality
from indexing.ann.keys import hashes_of, number_of, numbers_of
from indexing.data.embedding_store import Floats, Rows, unit
from infra.schemas import EMBEDDED
from infra.storage.removal_log import Removals
from infra.storage.shard_reader import ShardReader

Mask = NDArray[np.bool_]
Position = tuple[int, int, float]
"""Segment number, row in the segment, and score."""

NEAR = 0.94
"""Minimum cosine of two pictures that count as near copies; clip-retrieval's default."""
MAX_MASKS = 64
"""Maximum number of filters whose masks are cached."""
FIRST, FETCH, DEEPER = 10, 64, 4
"""Minimum numbers of candidates of the first and the second fetch, and the growth of every fetch
after that."""
FETCHED, FETCHED_APART = 1 << 14, 1 << 12
"""Maximum numbers of candidates of one search, the second where near copies are left out. They
bound its cost: where nearly all candidates are copies, it may return fewer hits than requested."""
CHOICES = ("licence", "style", "category", "subcategory", "split")


@dataclass(frozen=True)
class Filter:
    """Which pairs a query may find: `any_of` holds columns with their allowed values; the sides are
    those of the stored picture.
    """

    any_of: tuple[tuple[str, tuple[str, ...]], ...] = ()
    min_side_px: int = 0
    max_side_px: int | None = None


class Hit(NamedTuple):
    """One result: its segment and row, its score, and its metadata (infra.schemas.EMBEDDED)."""

    segment: int
    row: int
    score: float
    facts: dict[str, Any]


class Segment:
    """An index folder and the shards that hold its pictures; another content of the folder has
    another `name`.
    """

    def __init__(self, index: Index, shards: ShardReader, name: str = "") -> None:
        self.index, self.shards, self.name = index, shards, name
        self.pictures = hashes_of(index.column("sha256"))  # (N,) equal for equal pictures
        self._lock = Lock()
        self._numbers: tuple[Rows, Rows] | None = None

    def removed_mask(self, removals: Removals) -> Mask:
        """Return a mask (N,) of the rows that were taken down."""
        if not removals:
            return np.zeros(self.index.count, bool)
        columns = {name: self.index.column(name) for name in ("key", "origin", "sha256")}
        return np.asarray(removals.mask(columns).to_numpy(), bool)

    def rows_of(self, number: int) -> Rows:
        """Return the rows whose keys have this number (see indexing.ann.keys)."""
        with self._lock:
            if self._numbers is None:
                numbers = numbers_of(self.index.column("key"))
                order = np.argsort(numbers, kind="stable")
                self._numbers = numbers[order], order
        ascending, order = self._numbers
        start = np.searchsorted(ascending, number)
        end = np.searchsorted(ascending, number, side="right")
        return order[start:end]


class View:
    """A version of the index, open for queries from several threads."""

    def __init__(
        self,
        segments: Sequence[Segment],
        removals: Removals,
        clip: str,
        removed: Sequence[Mask] | None = None,
    ) -> None:
        """Hold segments of one CLIP, whose fingerprint is `clip`.

        `removed` are the masks (N,) of the rows that the removals name; by default they are
        computed. Raises ValueError where the segments' dimensions differ.
        """
        if len({segment.index.dim for segment in segments}) != 1:
            raise ValueError(
                f"the segments have {sorted({segment.index.dim for segment in segments})} "
                "dimensions: they must have the same"
            )
        self.segments, self.clip, self.removals = list(segments), clip, removals
        self.dim = segments[0].index.dim
        self.removed = (
            [segment.removed_mask(removals) for segment in segments]
            if removed is None
            else list(removed)
        )
        self.count = sum(int((~mask).sum()) for mask in self.removed)
        self.version = _fingerprint(clip, [segment.name for segment in segments], self.removed)
        """Fingerprint of the view: equal in every process for the same segments without the same
        rows."""
        self._masks: OrderedDict[Filter, list[Allowed]] = OrderedDict()
        self._facets: dict[str, dict[str, int]] | None = None
        self._counting = Lock()
        self._lock = Lock()

    def check_whole(self) -> None:
        """Raise CutFileError where a file of a segment has become shorter since it was opened."""
        for segment in self.segments:
            segment.index.check_whole()

    def after(self, removals: Removals) -> "View":
        """Return this view without the rows that the removals name.

        The segments stay open, and only new entries of the removal log are searched for.
        """
        if removals == self.removals:
            return self
        if self.removals - removals:
            return View(self.segments, removals, self.clip)  # an entry was taken back
        new = removals - self.removals
        removed = [
            mask | segment.removed_mask(new)
            for mask, segment in zip(self.removed, self.segments, strict=True)
        ]
        return View(self.segments, removals, self.clip, removed)

    def search(
        self,
        query: ArrayLike,
        k: int,
        modality: Modality = "image",
        chosen: Filter = Filter(),
        offset: int = 0,
        near: float | None = None,
        without: frozenset[str] = frozenset(),
        columns: Sequence[str] = EMBEDDED.names,
    ) -> list[Hit]:
        """Return the hits from `offset` to `offset + k` of all distinct pictures, best first, with
        these columns of their metadata.

        `query` is one unit vector (D,). Of pictures with equal bytes only the best hit counts; with
        `near`, so do pictures whose cosine with a better hit is at least `near`. Pictures whose
        SHA-256 is in `without` are left out. Among many copies there may be fewer hits than
        pictures (FETCHED). Raises ValueError as Index.search does.

        Pages of one size neither repeat nor skip a picture, even for an approximate index, which
        may rank differently in a deeper fetch: new pictures of a deeper fetch follow those of the
        fetch before, and each page is sorted by score. The first fetch is as deep as a page.
        """
        wanted, fetch = offset + k, max(FIRST, k)
        masks = self._allowed(chosen)
        max_fetched = FETCHED if near is None else FETCHED_APART
        enough = min(sum(mask.count for mask in masks), max(wanted, max_fetched))
        seen = set(hashes_of(pa.chunked_array([sorted(without)], pa.string())).tolist())
        unique: list[Position] = []
        vectors = np.empty((wanted if near is not None else 0, self.dim), np.float32)
        while True:
            positions, pictures = self._nearest(query, fetch, modality, masks)
            new = _unseen(positions, pictures, seen)
            if near is not None:
                new = self._apart(new, near, vectors, len(unique))
            unique += new
            if len(unique) >= wanted or fetch >= enough:
                return self._hits(unique[offset:wanted], columns)
            deeper = max(FETCH, fetch * DEEPER)
            fetch = max_fetched if fetch < max_fetched < deeper else deeper

    def _hits(self, page: Sequence[Position], columns: Sequence[str]) -> list[Hit]:
        """Return the hits of a page, best first."""
        ranked = sorted(page, key=lambda position: -position[2])
        return [
            Hit(number, row, score, self.segments[number].index.facts_of(row, columns))
            for number, row, score in ranked
        ]

    def find_key(self, key: str) -> Hit | None:
        """Return the pair with that key, or None where there is none or it was taken down."""
        hits = [hit for hit in self.find_number(number_of(key)) if hit.facts["key"] == key]
        return hits[0] if hits else None

    def find_number(self, number: int) -> list[Hit]:
        """Return the pairs whose keys have that number and were not taken down; almost always one
        or none.
        """
        hits = []
        for segment_number, segment in enumerate(self.segments):
            rows = [
                row
                for row in segment.rows_of(number).tolist()
                if not self.removed[segment_number][row]
            ]
            hits += [
                Hit(segment_number, row, 1.0, facts)
                for row, facts in zip(rows, segment.index.metadata(rows), strict=True)
            ]
        return hits

    def numbers(self, hits: Sequence[Hit]) -> list[int]:
        """Return the numbers of the hits' keys."""
        keys = pa.chunked_array([[hit.facts["key"] for hit in hits]], pa.string())
        return [int(number) for number in numbers_of(keys)]

    def vector(self, hit: Hit, modality: Modality = "image") -> Floats:
        """Return the vector of a hit (D,), as the index holds it."""
        row_vectors: Floats = self.segments[hit.segment].index.vectors([hit.row], modality)[0]
        return row_vectors

    def facets(self) -> dict[str, dict[str, int]]:
        """Return, for every column of CHOICES, the number of pairs of each value that is not empty,
        the most frequent first. The first call counts; later calls return the same.
        """
        with self._counting:
            if self._facets is None:
                self._facets = self._count()
            return self._facets

    def _count(self) -> dict[str, dict[str, int]]:
        counted: dict[str, dict[str, int]] = {}
        for name in CHOICES:
            totals: dict[str, int] = {}
            for segment, mask in zip(self.segments, self.removed, strict=True):
                remaining = segment.index.column(name).filter(pa.array(~mask))
                for entry in pc.value_counts(remaining).to_pylist():
                    value = entry["values"]
                    totals[value] = totals.get(value, 0) + entry["counts"]
            totals.pop("", None)
            counted[name] = dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
        return counted

    def _nearest(
        self, query: ArrayLike, k: int, modality: Modality, masks: Sequence[Allowed]
    ) -> tuple[list[Position], list[int]]:
        """Return the k nearest rows of all segments, best first, and their pictures' hashes."""
        positions: list[Position] = []
        pictures: list[int] = []
        for number, (segment, mask) in enumerate(zip(self.segments, masks, strict=True)):
            scores, rows = segment.index.search(
                np.asarray(query, np.float32)[None], k, modality, mask
            )
            positions += [
                (number, row, score)
                for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
            ]
            pictures += segment.pictures[rows[0]].tolist()
        if len(self.segments) == 1:
            return positions, pictures
        order = sorted(range(len(positions)), key=lambda number: -positions[number][2])[:k]
        return [positions[number] for number in order], [pictures[number] for number in order]

    def _apart(
        self, positions: Sequence[Position], near: float, vectors: Floats, count: int
    ) -> list[Position]:
        """Return the positions that are not near to a better one.

        The first `count` rows of `vectors` (wanted, D) are those of the better positions; the
        vectors of new ones are added until it is full.
        """
        distinct: list[Position] = []
        for position, vector in zip(positions, self._vectors(positions), strict=True):
            if count == len(vectors):
                break
            if count == 0 or float((vectors[:count] @ vector).max()) < near:
                vectors[count] = vector
                distinct.append(position)
                count += 1
        return distinct

    def _vectors(self, positions: Sequence[Position]) -> Floats:
        """Return the unit vectors of the positions (n, D)."""
        vectors = np.empty((len(positions), self.dim), np.float32)
        segments = np.array([segment for segment, *_ in positions], np.int64)
        rows = np.array([row for _, row, _ in positions], np.int64)
        for number in np.unique(segments):
            vectors[segments == number] = self.segments[number].index.vectors(
                rows[segments == number]
            )
        return unit(vectors)

    def _allowed(self, chosen: Filter) -> list[Allowed]:
        """Return the rows of each segment that the filter allows, from the cache where they are."""
        with self._lock:
            if chosen in self._masks:
                self._masks.move_to_end(chosen)
                return self._masks[chosen]
        masks = [
            Allowed(~mask & _matching(segment.index, chosen))
            for segment, mask in zip(self.segments, self.removed, strict=True)
        ]
        with self._lock:
            self._masks[chosen] = masks
            while len(self._masks) > MAX_MASKS:
                self._masks.popitem(last=False)
        return masks


def _unseen(
    positions: Sequence[Position], pictures: Sequence[int], seen: set[int]
) -> list[Position]:
    """Return the first position of each picture that is not in `seen`, and add those to it."""
    new = []
    for position, picture in zip(positions, pictures, strict=True):
        if picture not in seen:
            seen.add(picture)
            new.append(position)
    return new


def _matching(index: Index, chosen: Filter) -> Mask:
    """Return a mask (N,) of the rows that the filter allows."""
    mask = np.ones(index.count, bool)
    for name, values in chosen.any_of:
        is_match = pc.is_in(index.column(name), pa.array(values, pa.string()))
        mask &= np.asarray(is_match.to_numpy(), bool)
    if chosen.min_side_px or chosen.max_side_px is not None:
        sides = np.minimum(
            index.column("width_px").to_numpy(), index.column("height_px").to_numpy()
        )
        mask &= sides >= chosen.min_side_px
        if chosen.max_side_px is not None:
            mask &= sides <= chosen.max_side_px
    return mask


def make_filter(
    any_of: Mapping[str, Iterable[str]], min_side_px: int = 0, max_side_px: int | None = None
) -> Filter:
    """Return a filter with sorted columns and values, so that equal filters share their masks.

    Raises ValueError for a column that is not in CHOICES.
    """
    unknown = sorted(any_of.keys() - set(CHOICES))
    if unknown:
        raise ValueError(f"cannot filter by {unknown[0]!r}: use {', '.join(CHOICES)}")
    return Filter(
        tuple((name, tuple(sorted(set(values)))) for name, values in sorted(any_of.items())),
        min_side_px,
        max_side_px,
    )


def _fingerprint(clip: str, names: Sequence[str], removed: Sequence[Mask]) -> str:
    """Return 16 hex digits that depend on the CLIP, the segments' names and their removed rows."""
    digest = hashlib.sha256(repr((clip, list(names))).encode())
    for mask in removed:
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()[:16]

"""One version of a living index: the segments that hold its vectors, and which of their rows are
gone.

A view never changes: a take-down, an addition or another index makes a new one, and a query that
has begun ends on the view that it began with. Samples are known by key, and by a number made from
the key for clients that want numbers; rows are nobody's business outside. Legend: N rows of a
segment.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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

Mask = NDArray[np.bool_]
Position = tuple[int, int, float]
"""Number of a segment, row in it, and score."""

NEAR = 0.94
"""Results with a picture cosine of at least this count as copies where near ones are asked to go;
clip-retrieval's figure."""
MAX_MASKS = 64
FIRST, FETCH, DEEPER = 10, 64, 4
"""Candidates of the first look and of the second, at least, and by how much each further one is
deeper."""
FETCHED, FETCHED_APART = 1 << 14, 1 << 12
"""So many candidates are looked at for one answer, the second with near copies left out: among
results that are nearly all copies there may be fewer than asked for, and no question costs more
than this."""
CHOICES = ("licence", "style", "category", "subcategory", "split")


@dataclass(frozen=True)
class Filter:
    """Which samples a query may find: `any_of` holds pairs of a column and the values allowed
    there; sides are of the stored picture.
    """

    any_of: tuple[tuple[str, tuple[str, ...]], ...] = ()
    min_side_px: int = 0
    max_side_px: int | None = None


class Hit(NamedTuple):
    """One result: where it is, how near, and its metadata (schema infra.schemas.EMBEDDED)."""

    segment: int
    row: int
    score: float
    facts: dict[str, Any]


class Segment:
    """An index folder and the shards that hold its pictures; `name` tells what is in it apart from
    what stood there before.
    """

    def __init__(self, index: Index, shards: Path, name: str = "") -> None:
        self.index, self.shards, self.name = index, shards, name
        self.pictures = hashes_of(index.column("sha256"))  # (N,) what tells pictures apart
        self._lock = Lock()
        self._numbers: tuple[Rows, Rows] | None = None

    def removed_mask(self, removals: Removals) -> Mask:
        """Return which rows were taken down (N,)."""
        if not removals:
            return np.zeros(self.index.count, bool)
        columns = {name: self.index.column(name) for name in ("key", "origin", "sha256")}
        return np.asarray(removals.mask(columns).to_numpy(), bool)

    def rows_of(self, number: int) -> Rows:
        """Return the rows whose keys have this number."""
        with self._lock:
            if self._numbers is None:
                numbers = numbers_of(self.index.column("key"))
                order = np.argsort(numbers, kind="stable")
                self._numbers = numbers[order], order
        ascending, order = self._numbers
        return order[
            np.searchsorted(ascending, number) : np.searchsorted(ascending, number, side="right")
        ]


class View:
    """A version of the index, open for queries from several threads."""

    def __init__(
        self,
        segments: Sequence[Segment],
        removals: Removals,
        clip: str,
        removed: Sequence[Mask] | None = None,
    ) -> None:
        """Hold segments of one CLIP, whose fingerprint is `clip`; `removed` is what the removals
        name, where that is known.

        Raises ValueError where their dimensions differ.
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
        """Tells this view from others: the same segments without the same rows have the same, in
        every process."""
        self._masks: OrderedDict[Filter, list[Allowed]] = OrderedDict()
        self._facets: dict[str, dict[str, int]] | None = None
        self._counting = Lock()
        self._lock = Lock()

    def after(self, removals: Removals) -> "View":
        """Return this view without what the removals name; the segments stay open, and only what is
        new in the log is looked for.
        """
        if removals == self.removals:
            return self
        if self.removals - removals:
            return View(self.segments, removals, self.clip)  # an entry was taken back
        new = removals - self.removals
        removed = [
            was | segment.removed_mask(new)
            for was, segment in zip(self.removed, self.segments, strict=True)
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
        """Return the hits offset to offset + k of all distinct pictures, best first, with these
        columns of their metadata.

        `query` is one unit vector (D,). Pictures of equal bytes count once, and with `near` those
        whose cosine with a better hit is at least that; pictures with a SHA-256 in `without` do not
        count. Among many copies there may be fewer hits than there are pictures (FETCHED). Raises
        ValueError as Index.search does.

        Pages of one size neither repeat nor skip a picture, whatever the index: a deeper look into
        an approximate one ranks otherwise, so what it finds goes behind what the look before had
        found, and a page is in order of score by itself. The first look is as deep as a page.
        """
        wanted, fetch = offset + k, max(FIRST, k)
        masks = self._allowed(chosen)
        max_fetched = FETCHED if near is None else FETCHED_APART
        enough = min(sum(mask.count for mask in masks), max(wanted, max_fetched))
        seen = (
            set(hashes_of(pa.chunked_array([sorted(without)], pa.string())).tolist())
            if without
            else set()
        )
        unique: list[Position] = []
        vectors = np.empty((wanted if near is not None else 0, self.dim), np.float32)
        while True:
            positions, pictures = self._nearest(query, fetch, modality, masks)
            distinct = []
            for position, picture in zip(positions, pictures, strict=True):
                if picture not in seen:
                    seen.add(picture)
                    distinct.append(position)
            unique += (
                distinct if near is None else self._apart(distinct, near, vectors, len(unique))
            )
            if len(unique) >= wanted or fetch >= enough:
                page = sorted(unique[offset:wanted], key=lambda position: -position[2])
                return [
                    Hit(segment, row, score, self.segments[segment].index.facts_of(row, columns))
                    for segment, row, score in page
                ]
            deeper = max(FETCH, fetch * DEEPER)
            fetch = max_fetched if fetch < max_fetched < deeper else deeper

    def find_key(self, key: str) -> Hit | None:
        """Return the sample with that key, or None where there is none or it is gone."""
        return next(
            (hit for hit in self.find_number(number_of(key)) if hit.facts["key"] == key), None
        )

    def find_number(self, number: int) -> list[Hit]:
        """Return the samples whose keys have that number: one, or none where there is none or it is
        gone.
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
        """Return the numbers of the samples' keys."""
        return [
            int(number)
            for number in numbers_of(
                pa.chunked_array([[hit.facts["key"] for hit in hits]], pa.string())
            )
        ]

    def vector(self, hit: Hit, modality: Modality = "image") -> Floats:
        """Return the vector of a sample (D,), as the index holds it."""
        row_vectors: Floats = self.segments[hit.segment].index.vectors([hit.row], modality)[0]
        return row_vectors

    def facets(self) -> dict[str, dict[str, int]]:
        """Count, for every column that can be chosen by, the samples of each value that is not
        empty; the commonest first. Counts once.
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
                for value_count in pc.value_counts(
                    segment.index.column(name).filter(pa.array(~mask))
                ).to_pylist():
                    totals[value_count["values"]] = (
                        totals.get(value_count["values"], 0) + value_count["counts"]
                    )
            totals.pop("", None)
            counted[name] = dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
        return counted

    def _nearest(
        self, query: ArrayLike, k: int, modality: Modality, masks: Sequence[Allowed]
    ) -> tuple[list[Position], list[int]]:
        """Return the k nearest rows, best first, and what tells their pictures apart (k)."""
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
        """Return the places without those near to a better one; `vectors` (wanted, D) holds `count`
        better ones' and takes more.
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
        """Return the unit vectors of the places (n, D)."""
        vectors = np.empty((len(positions), self.dim), np.float32)
        segments = np.array([segment for segment, *_ in positions], np.int64)
        rows = np.array([row for _, row, _ in positions], np.int64)
        for number in np.unique(segments):
            vectors[segments == number] = self.segments[number].index.vectors(
                rows[segments == number]
            )
        return unit(vectors)

    def _allowed(self, chosen: Filter) -> list[Allowed]:
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


def _matching(index: Index, chosen: Filter) -> Mask:
    mask = np.ones(index.count, bool)
    for name, values in chosen.any_of:
        mask &= np.asarray(
            pc.is_in(index.column(name), pa.array(values, pa.string())).to_numpy(), bool
        )
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
    """Return a filter in its one spelling, so that equal filters share their masks. Raises
    ValueError for a column that is no choice.
    """
    unknown = sorted(any_of.keys() - set(CHOICES))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is nothing to choose by: use {', '.join(CHOICES)}")
    return Filter(
        tuple((name, tuple(sorted(set(values)))) for name, values in sorted(any_of.items())),
        min_side_px,
        max_side_px,
    )


def _fingerprint(clip: str, names: Sequence[str], removed: Sequence[Mask]) -> str:
    """Return 16 hex digits of a CLIP, the names of segments, and which of their rows are gone."""
    digest = hashlib.sha256(repr((clip, list(names))).encode())
    for mask in removed:
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()[:16]

"""One version of a living index: the segments that hold its vectors, and which of their rows are gone.

A view never changes: a take-down, an addition or another index makes a new one, and a query that has begun ends on the view that it
began with. Samples are known by key, and by a number made from the key for clients that want numbers; rows are nobody's business
outside. Legend: N rows of a segment.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from indexing.embeddings import Floats, Rows, unit
from indexing.index import Allowed, Index, Modality
from infra.removals import Removals
from infra.tables import EMBEDDED

Mask = NDArray[np.bool_]
Place = tuple[int, int, float]
"""A segment, a row of it, and its score."""

NEAR = 0.94
"""Results with a picture cosine of at least this count as copies where near ones are asked to go; clip-retrieval's figure."""
MASKS_KEPT = 64
FETCH_BITS = 6
NUMBER_BITS = 53
"""The numbers survive a client that keeps them as doubles (JavaScript)."""
CHOICES = ("licence", "style", "category", "subcategory", "split")


@dataclass(frozen=True)
class Filter:
    """Which samples a query may find: `any_of` holds pairs of a column and the values allowed there; sides are of the stored picture."""

    any_of: tuple[tuple[str, tuple[str, ...]], ...] = ()
    min_side_px: int = 0
    max_side_px: int | None = None


@dataclass(frozen=True)
class Hit:
    """One result: where it is, how near, and its metadata (schema infra.tables.EMBEDDED)."""

    segment: int
    row: int
    score: float
    facts: dict[str, Any]


class Segment:
    """An index folder and the shards that hold its pictures."""

    def __init__(self, index: Index, shards: Path) -> None:
        self.index, self.shards = index, shards
        self.pictures = hashes_of(index.column("sha256"))  # (N,) what tells pictures apart
        self._lock = Lock()
        self._numbers: tuple[Rows, Rows] | None = None

    def gone(self, removals: Removals) -> Mask:
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
        return order[np.searchsorted(ascending, number) : np.searchsorted(ascending, number, side="right")]


class View:
    """A version of the index, open for queries from several threads."""

    def __init__(self, segments: Sequence[Segment], removals: Removals, clip: str) -> None:
        """Hold segments of one CLIP, whose fingerprint is `clip`. Raises ValueError where their dimensions differ."""
        if len({each.index.dim for each in segments}) != 1:
            raise ValueError(f"the segments have {sorted({each.index.dim for each in segments})} dimensions: they must have the same")
        self.segments, self.clip, self.removals = list(segments), clip, removals
        self.dim = segments[0].index.dim
        self.gone = [each.gone(removals) for each in segments]
        self.count = sum(int((~gone).sum()) for gone in self.gone)
        self._masks: OrderedDict[Filter, list[Allowed]] = OrderedDict()
        self._lock = Lock()

    def after(self, removals: Removals) -> "View":
        """Return this view without what the removals name; the segments stay open."""
        return View(self.segments, removals, self.clip)

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
        """Return the hits offset to offset + k of all distinct pictures, best first, with these columns of their metadata.

        `query` is one unit vector (D,). Pictures of equal bytes count once, and with `near` those whose cosine with a better hit is at
        least that; pictures with a SHA-256 in `without` do not count. Raises ValueError as Index.search does.
        """
        wanted = offset + k
        fetch = 1 << max(FETCH_BITS, (wanted + len(without) - 1).bit_length())  # so that the first pages come from one ranking
        masks = self._allowed(chosen)
        available = max(mask.count for mask in masks)
        excluded = hashes_of(pa.chunked_array([sorted(without)], pa.string()))
        while True:
            places, pictures = self._nearest(query, fetch, modality, masks)
            _, first = np.unique(pictures, return_index=True)
            distinct = [places[number] for number in np.sort(first[~np.isin(pictures[first], excluded)]).tolist()]
            if near is not None:
                distinct = self._apart(distinct, near, wanted)
            if len(distinct) >= wanted or fetch >= available:
                shown = distinct[offset:wanted]
                return [Hit(segment, row, score, self.segments[segment].index.facts_of(row, columns)) for segment, row, score in shown]
            fetch *= 2

    def find_key(self, key: str) -> Hit | None:
        """Return the sample with that key, or None where there is none or it is gone."""
        return next((hit for hit in self.find_number(number_of(key)) if hit.facts["key"] == key), None)

    def find_number(self, number: int) -> list[Hit]:
        """Return the samples whose keys have that number: one, or none where there is none or it is gone."""
        hits = []
        for place, segment in enumerate(self.segments):
            rows = [row for row in segment.rows_of(number).tolist() if not self.gone[place][row]]
            hits += [Hit(place, row, 1.0, facts) for row, facts in zip(rows, segment.index.metadata(rows), strict=True)]
        return hits

    def numbers(self, hits: Sequence[Hit]) -> list[int]:
        """Return the numbers of the samples' keys."""
        return [int(number) for number in numbers_of(pa.chunked_array([[hit.facts["key"] for hit in hits]], pa.string()))]

    def vector(self, hit: Hit, modality: Modality = "image") -> Floats:
        """Return the vector of a sample (D,), as the index holds it."""
        found: Floats = self.segments[hit.segment].index.vectors([hit.row], modality)[0]
        return found

    def facets(self) -> dict[str, dict[str, int]]:
        """Count, for every column that can be chosen by, the samples of each value that is not empty; the commonest first."""
        counted: dict[str, dict[str, int]] = {}
        for name in CHOICES:
            totals: dict[str, int] = {}
            for segment, gone in zip(self.segments, self.gone, strict=True):
                for each in pc.value_counts(segment.index.column(name).filter(pa.array(~gone))).to_pylist():
                    totals[each["values"]] = totals.get(each["values"], 0) + each["counts"]
            totals.pop("", None)
            counted[name] = dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
        return counted

    def _nearest(self, query: ArrayLike, k: int, modality: Modality, masks: Sequence[Allowed]) -> tuple[list[Place], NDArray[np.uint64]]:
        """Return the k nearest rows, best first, and what tells their pictures apart (k,)."""
        places: list[Place] = []
        pictures = []
        for number, (segment, mask) in enumerate(zip(self.segments, masks, strict=True)):
            scores, rows = segment.index.search(np.asarray(query, np.float32)[None], k, modality, mask)
            places += [(number, row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)]
            pictures.append(segment.pictures[rows[0]])
        together = np.concatenate(pictures)
        if len(self.segments) == 1:
            return places, together
        order = sorted(range(len(places)), key=lambda place: -places[place][2])[:k]
        return [places[place] for place in order], together[order]

    def _apart(self, places: Sequence[Place], near: float, wanted: int) -> list[Place]:
        """Return the places without those near to a better one, the first `wanted` of them."""
        kept: list[Place] = []
        vectors = np.empty((wanted, self.dim), np.float32)
        for segment, row, score in places:
            vector = unit(self.segments[segment].index.vectors([row]))[0]
            if len(kept) == 0 or float((vectors[: len(kept)] @ vector).max()) < near:
                vectors[len(kept)] = vector
                kept.append((segment, row, score))
            if len(kept) == wanted:
                break
        return kept

    def _allowed(self, chosen: Filter) -> list[Allowed]:
        with self._lock:
            if chosen in self._masks:
                self._masks.move_to_end(chosen)
                return self._masks[chosen]
        masks = [Allowed(~gone & _matching(segment.index, chosen)) for segment, gone in zip(self.segments, self.gone, strict=True)]
        with self._lock:
            self._masks[chosen] = masks
            while len(self._masks) > MASKS_KEPT:
                self._masks.popitem(last=False)
        return masks


def _matching(index: Index, chosen: Filter) -> Mask:
    mask = np.ones(index.count, bool)
    for name, values in chosen.any_of:
        mask &= np.asarray(pc.is_in(index.column(name), pa.array(values, pa.string())).to_numpy(), bool)
    if chosen.min_side_px or chosen.max_side_px is not None:
        sides = np.minimum(index.column("width_px").to_numpy(), index.column("height_px").to_numpy())
        mask &= sides >= chosen.min_side_px
        if chosen.max_side_px is not None:
            mask &= sides <= chosen.max_side_px
    return mask


def make_filter(any_of: Mapping[str, Iterable[str]], min_side_px: int = 0, max_side_px: int | None = None) -> Filter:
    """Return a filter in its one spelling, so that equal filters share their masks. Raises ValueError for a column that is no choice."""
    unknown = sorted(any_of.keys() - set(CHOICES))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is nothing to choose by: use {', '.join(CHOICES)}")
    return Filter(tuple((name, tuple(sorted(set(values)))) for name, values in sorted(any_of.items())), min_side_px, max_side_px)


def number_of(key: str) -> int:
    """Return the number of a key, 0 to 2**53 - 1: the same in every version and every index."""
    return int(numbers_of(pa.chunked_array([[key]], pa.string()))[0])


def numbers_of(keys: pa.ChunkedArray) -> Rows:
    """Return the numbers of keys (N,)."""
    return (hashes_of(keys) >> np.uint64(64 - NUMBER_BITS)).astype(np.int64)


def hashes_of(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return 64 bits of each text (N,): its bytes, eight at a time, through the finaliser of splitmix64 (Steele et al. 2014)."""
    found = [np.zeros(0, np.uint64)]
    for chunk in (each for each in texts.chunks if len(each)):
        encoded = np.array([text.encode("utf-8", "replace") for text in chunk.to_pylist()], "S")
        width = -(-encoded.dtype.itemsize // 8) * 8 or 8
        words = encoded.astype(f"S{width}").view(np.uint64).reshape(len(encoded), -1)
        mixed = np.zeros(len(encoded), np.uint64)
        for word in words.T:
            used = word != 0  # the padding depends on the other keys of the chunk
            mixed = np.where(used, _mix(mixed ^ word), mixed)
        found.append(mixed)
    return np.concatenate(found)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

"""Near neighbours for deduplication: pairs of rows within a threshold, without comparing all pairs.

Rows are judged in the caller's order, one block at a time: each row is compared with the rows
before it that stay. Candidates come from small codes and cells, and each one is then checked
exactly: a result is never wrong, but a pair may be missed. indexing.dedup.grouping decides which
rows stay. Legend: N rows, D dimensions, M places in the order, Q queries of a block, C cells, S
numbers of a sketch.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import CHUNK_ROWS, Floats, Rows, chunks, take, unit

Mask = NDArray[np.bool_]

SKETCH_DIMS = 64
SAMPLE_ROWS = 16_384
"""Rows from which the principal directions are computed; four times as many train the cells."""
PLANTED = 4096
"""Number of planted pairs that choose the margin."""
POINTS_PER_CELL = 32
ALL_PAIRS_UP_TO = 1 << 22
"""Up to so many pairs of hashes are compared directly; more are compared by bands."""
SCORES_AT_ONCE = 1 << 22
PAIRS_AT_ONCE = 1 << 16
ROUNDING = 1e-5
"""Tolerance of products of sketches and of whole vectors, for float32's rounding."""
HELD_BYTES = 1 << 30
"""Vectors are held in memory where all of them fit in so many bytes. Otherwise only sketches are,
and vectors are read for the few pairs that are checked."""
LEFT_BY_SKETCHES = 0.02
"""Where sketches leave a larger share of pairs than this, the vectors in memory are compared in one
product instead of pair by pair."""
BAND_BITS, BANDS = 16, 4


class NearPairs(NamedTuple):
    """Pairs within the threshold: `query` and `member` are places in the order, the member before
    the query; a larger `nearness` is nearer.
    """

    query: Rows
    member: Rows
    nearness: Floats


class NearVectors:
    """Finds vectors whose cosine is at least a threshold.

    A row's *sketch* is its projection onto the first principal directions and, as one more number,
    the length of what is left. The product of two sketches is never below the product of their
    vectors, so sketches exclude almost all pairs and lose none. Sketches lie in cells around
    centroids. A query looks into every cell that scores within `margin` of its best cell; the
    margin is the largest that was needed to find planted pairs whose cosine is exactly the
    threshold. Sketches are compared within the cells. Where they leave too many pairs and all
    vectors fit in HELD_BYTES, whole vectors are compared.
    """

    def __init__(
        self, parts: Sequence[NDArray[Any]], threshold: float, order: Rows, seed: int = 0
    ) -> None:
        """Sketch all rows of `parts` ((n, D) each, any float type). Memory: 64 numbers a row for
        any D, and HELD_BYTES.
        """
        self.parts, self.threshold, self.order = parts, threshold, order
        count = sum(len(part) for part in parts)
        rng = np.random.default_rng(seed)
        sample_rows = np.sort(rng.choice(count, min(count, SAMPLE_ROWS), replace=False))
        sample = unit(take(parts, sample_rows))
        self.directions = _principal_directions(sample)
        sketches, self.held = self._sketch_all(count)
        self.centroids = _train_centroids(sketches, seed, rng)  # (C, S)
        self._arrange(sketches)
        self.margin = self._margin(sample, rng)

    def _sketch_all(self, count: int) -> tuple[Floats, Floats | None]:
        """Return the sketches of all rows (N, S), and the unit vectors (N, D) where they fit in
        HELD_BYTES.
        """
        dim = self.parts[0].shape[1]
        sketches = np.empty((count, min(dim, SKETCH_DIMS)), np.float32)
        held = np.empty((count, dim), np.float32) if count * dim * 4 <= HELD_BYTES else None
        start = 0
        for chunk in chunks(self.parts):
            vectors = unit(chunk)
            sketches[start : start + len(chunk)] = self._sketch(vectors)
            if held is not None:
                held[start : start + len(chunk)] = vectors
            start += len(chunk)
        return sketches, held

    def _arrange(self, sketches: Floats) -> None:
        """Arrange the places of the order by cell, and within a cell by the order.

        What a cell holds of the places before any place is then the beginning of its range.
        """
        cell_pieces = [
            (sketches[self.order[first : first + CHUNK_ROWS]] @ self.centroids.T).argmax(1)
            for first in range(0, len(self.order), CHUNK_ROWS)
        ]
        cell = np.concatenate(cell_pieces or [np.zeros(0, np.int64)])
        sizes = np.bincount(cell, minlength=len(self.centroids))
        self.place = np.argsort(cell, kind="stable")  # (M,) place at each position
        self.starts = np.concatenate([[0], np.cumsum(sizes)])  # (C + 1,) first position of a cell
        self.at = np.empty(len(self.order), np.int64)  # (M,) position of each place
        self.at[self.place] = np.arange(len(self.order))
        self.sketches = sketches[self.order[self.place]]  # (M, S)

    def earlier(self, start: int, end: int, stays: Mask) -> NearPairs:
        """Return the near pairs of the places start to end with earlier places that stay; `stays`
        (M,) says which do.
        """
        query_sketches = self.sketches[self.at[start:end]]  # (Q, S)
        scores = self.centroids @ query_sketches.T  # (C, Q)
        is_probed = scores >= scores.max(0) - self.margin
        queries, members = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for cell in np.flatnonzero(is_probed.any(1)).tolist():
            low = int(self.starts[cell])
            high = low + int(np.searchsorted(self.place[low : self.starts[cell + 1]], end))
            if low == high:
                continue
            probing = np.flatnonzero(is_probed[cell])
            step = max(1, SCORES_AT_ONCE // (high - low))
            for first in range(0, len(probing), step):
                query, member = self._near(
                    query_sketches, start, probing[first : first + step], low, high
                )
                is_earlier = (member < query) & stays[member]
                queries.append(query[is_earlier])
                members.append(member[is_earlier])
        query, member = np.concatenate(queries), np.concatenate(members)
        cosines = self._cosines(self.order[query], self.order[member])
        is_near = cosines >= self.threshold
        return NearPairs(query[is_near], member[is_near], cosines[is_near])

    def _near(
        self, query_sketches: Floats, start: int, probing: Rows, low: int, high: int
    ) -> tuple[Rows, Rows]:
        """Return the pairs of places that may be near: the queries `probing` of the block from
        `start` on, with the positions low to high of one cell.
        """
        is_near = query_sketches[probing] @ self.sketches[low:high].T >= self.threshold - ROUNDING
        if self.held is not None and np.count_nonzero(is_near) > is_near.size * LEFT_BY_SKETCHES:
            query_vectors = self.held[self.order[start + probing]]
            member_vectors = self.held[self.order[self.place[low:high]]]
            is_near = query_vectors @ member_vectors.T >= self.threshold - ROUNDING
        rows = np.flatnonzero(is_near.any(1))
        row, column = np.nonzero(is_near[rows])
        return start + probing[rows[row]], self.place[low + column]

    def _sketch(self, vectors: Floats) -> Floats:
        if self.directions is None:
            return vectors
        main = vectors @ self.directions
        rest = np.sqrt(np.maximum((vectors * vectors).sum(1) - (main * main).sum(1), 0))
        return np.concatenate([main, rest[:, None]], axis=1)

    def _margin(self, sample: Floats, rng: np.random.Generator) -> float:
        """Return the margin that finds all of PLANTED pairs, whose cosines are the threshold.

        Half of them differ in directions of the data, half in random directions.
        """
        first = sample[rng.integers(0, len(sample), PLANTED)]
        apart = np.concatenate(
            [
                sample[rng.integers(0, len(sample), PLANTED // 2)],
                rng.normal(size=first[PLANTED // 2 :].shape),
            ]
        )
        apart = unit((apart - (apart * first).sum(1, keepdims=True) * first).astype(np.float32))
        second = self.threshold * first + np.sqrt(1 - self.threshold**2) * apart
        scores = self._sketch(first) @ self.centroids.T
        cells = (self._sketch(second) @ self.centroids.T).argmax(1)
        return float((scores.max(1) - scores[np.arange(PLANTED), cells]).max())

    def _cosines(self, left: Rows, right: Rows) -> Floats:
        pieces = [np.zeros(0, np.float32)]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            pair = [self._vectors(rows[start : start + PAIRS_AT_ONCE]) for rows in (left, right)]
            pieces.append(np.einsum("nd,nd->n", *pair))
        return np.concatenate(pieces)

    def _vectors(self, rows: Rows) -> Floats:
        if self.held is not None:
            return np.asarray(self.held[rows], np.float32)
        distinct, inverse = np.unique(rows, return_inverse=True)
        return np.asarray(unit(take(self.parts, distinct))[inverse], np.float32)


def _principal_directions(sample: Floats) -> Floats | None:
    """Return the first SKETCH_DIMS - 1 principal directions (D, S - 1) of unit vectors, or None
    where they have no more than SKETCH_DIMS dimensions.
    """
    if sample.shape[1] <= SKETCH_DIMS:
        return None
    directions: Floats = np.linalg.eigh(sample.T @ sample)[1][:, :-SKETCH_DIMS:-1]
    return directions


def _train_centroids(sketches: Floats, seed: int, rng: np.random.Generator) -> Floats:
    """Return the centroids (C, S) of the sketches (N, S) by spherical k-means."""
    count, size = sketches.shape
    kmeans = faiss.Kmeans(
        size,
        max(1, min(round(2 * np.sqrt(count)), count // POINTS_PER_CELL)),
        niter=4,
        seed=seed % 2**31,
        spherical=True,
        max_points_per_centroid=POINTS_PER_CELL * 2,
    )
    kmeans.cp.min_points_per_centroid = 1
    if count > 4 * SAMPLE_ROWS:
        sketches = sketches[rng.choice(count, 4 * SAMPLE_ROWS, replace=False)]
    kmeans.train(sketches)
    return np.asarray(kmeans.centroids, np.float32)


class NearPictures:
    """Finds pictures that look alike: perceptual hashes at most `max_bits` apart, and small copies
    at most `max_rms` apart.

    The hash sees only shades of grey; the small copies tell a red heart from a blue one. A hash is
    four bands of 16 bits. Where two hashes differ in at most max_bits bits, one band differs in at
    most max_bits // 4: only hashes with such a band are compared (Norouzi et al. 2012).
    """

    def __init__(
        self,
        hashes: NDArray[np.uint64],
        thumbs: NDArray[np.uint8],
        max_bits: int,
        max_rms: float,
        order: Rows,
    ) -> None:
        """Take hashes (N,) and small copies (N, ...) that grouping.hash_picture made."""
        self.hashes, self.thumbs, self.order = hashes, thumbs.reshape(len(thumbs), -1), order
        self.max_bits, self.max_rms = max_bits, max_rms
        flips = itertools.chain.from_iterable(
            itertools.combinations(range(BAND_BITS), bits) for bits in range(max_bits // BANDS + 1)
        )
        self.masks = [sum(1 << bit for bit in bits) for bits in flips]

    def earlier(self, start: int, end: int, stays: Mask) -> NearPairs:
        """Return the pairs that look alike of the places start to end with earlier places that
        stay; `stays` (M,) says which do.
        """
        rows_staying = np.flatnonzero(stays[:end])
        queries, members = self.order[start:end], self.order[rows_staying]
        pairs = [np.zeros(0, np.int64)]
        for query, member in self._candidates(queries, members):
            bits = np.bitwise_count(self.hashes[queries[query]] ^ self.hashes[members[member]])
            is_near = (bits <= self.max_bits) & (rows_staying[member] < start + query)
            pairs.append(query[is_near] * len(members) + member[is_near])
        query, member = np.divmod(np.unique(np.concatenate(pairs)), max(1, len(members)))
        rms = self._rms(queries[query], members[member])
        is_near = rms <= self.max_rms
        return NearPairs(start + query[is_near], rows_staying[member[is_near]], -rms[is_near])

    def _candidates(self, queries: Rows, members: Rows) -> Iterator[tuple[Rows, Rows]]:
        """Yield pairs to compare: numbers into `queries` and `members`; a pair may come twice."""
        if len(queries) * len(members) <= ALL_PAIRS_UP_TO:
            yield np.divmod(np.arange(len(queries) * len(members)), max(1, len(members)))
            return
        for band in range(BANDS):
            shift = np.uint64(band * BAND_BITS)
            query_band, member_band = (
                ((self.hashes[rows] >> shift) & np.uint64(0xFFFF)).astype(np.int64)
                for rows in (queries, members)
            )
            order = np.argsort(member_band, kind="stable")
            sizes = np.bincount(member_band, minlength=1 << BAND_BITS)
            starts = np.concatenate([[0], np.cumsum(sizes)])
            for mask in self.masks:
                low, high = starts[query_band ^ mask], starts[(query_band ^ mask) + 1]
                for query, slot in _expand_ranges(low, high):
                    yield query, order[slot]

    def _rms(self, left: Rows, right: Rows) -> Floats:
        pieces = [np.zeros(0, np.float32)]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            apart = (
                self.thumbs[left[start : start + PAIRS_AT_ONCE]].astype(np.float32)
                - self.thumbs[right[start : start + PAIRS_AT_ONCE]]
            )
            pieces.append(np.sqrt((apart * apart).mean(1)))
        return np.concatenate(pieces)


def _expand_ranges(low: Rows, high: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yield (i, number) for all numbers low[i] to high[i] - 1 of all i, about ALL_PAIRS_UP_TO at a
    time.
    """
    ends = np.cumsum(high - low)
    first = 0
    while first < len(low):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + ALL_PAIRS_UP_TO, side="right")))
        sizes = (high - low)[first:last]
        query = np.repeat(np.arange(first, last), sizes)
        yield (
            query,
            np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + low[query],
        )
        first = last

"""Near neighbours for deduplication: of given members, those within a threshold of given queries, without comparing all with all.

Candidates come from small codes and cells; each is then checked exactly, so what is found is right and only what is missed can err.
Knows rows only, not which of them are kept. Legend: N rows, D dimensions, Q queries, M members, C cells.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import CHUNK_ROWS, Floats, Rows, chunks, take, unit

SKETCH_DIMS = 64
SAMPLE_ROWS = 16_384
PLANTED = 4096
POINTS_PER_CELL = 32
ALL_PAIRS_UP_TO = 1 << 22
"""So many comparisons are made outright rather than by cells."""
SCORES_AT_ONCE = 1 << 24
PAIRS_AT_ONCE = 1 << 16
ROUNDING = 1e-5
HELD_BYTES = 1 << 30
"""Vectors that fit in here together are held in memory and compared whole; of more, sketches alone are, and vectors are read for few."""
LEFT_BY_SKETCHES = 0.02
"""Where sketches leave a larger share of pairs than this, whole vectors that are held are compared instead of pair by pair."""
BAND_BITS, BANDS = 16, 4


class Found(NamedTuple):
    """Pairs within the threshold: places in the queries, places in the members, and how near (larger is nearer)."""

    query: Rows
    member: Rows
    nearness: Floats


class NearVectors:
    """Finds vectors whose cosine is at least a threshold.

    A row's *sketch* is its part in the first principal directions and, as one more number, the length of the rest: the product of two
    sketches is never below that of the vectors, so sketches rule out almost all pairs and lose none. Sketches lie in cells around
    centroids. A query looks into every cell that scores within `margin` of its best one; the margin is the largest that was needed to find
    planted pairs, which lie exactly at the threshold. Sketches are compared within the cells; where they leave too many pairs and all
    vectors fit in HELD_BYTES, those are.
    """

    def __init__(self, parts: Sequence[NDArray[Any]], threshold: float, seed: int = 0) -> None:
        """Sketch all rows of `parts` ((n, D) each, any float type). Memory: 64 numbers a row, whatever D is, and HELD_BYTES."""
        self.parts, self.threshold = parts, threshold
        count, dim = sum(len(part) for part in parts), parts[0].shape[1]
        rng = np.random.default_rng(seed)
        sample = unit(take(parts, np.sort(rng.choice(count, min(count, SAMPLE_ROWS), replace=False))))
        self.directions = np.linalg.eigh(sample.T @ sample)[1][:, :-SKETCH_DIMS:-1] if dim > SKETCH_DIMS else None
        self.sketches = np.empty((count, min(dim, SKETCH_DIMS)), np.float32)
        held = np.empty((count, dim), np.float32) if count * dim * 4 <= HELD_BYTES else None
        start = 0
        for chunk in chunks(parts):
            vectors = unit(chunk)
            self.sketches[start : start + len(chunk)] = self._sketch(vectors)
            if held is not None:
                held[start : start + len(chunk)] = vectors
            start += len(chunk)
        self.held = held
        self.compared = self.sketches if held is None else held
        cells = max(1, min(round(2 * np.sqrt(count)), count // POINTS_PER_CELL))
        kmeans = faiss.Kmeans(
            self.sketches.shape[1], cells, niter=4, seed=seed % 2**31, spherical=True, max_points_per_centroid=POINTS_PER_CELL * 2
        )
        kmeans.cp.min_points_per_centroid = 1
        kmeans.train(self.sketches if count <= 4 * SAMPLE_ROWS else self.sketches[rng.choice(count, 4 * SAMPLE_ROWS, replace=False)])
        self.centroids = np.asarray(kmeans.centroids, np.float32)  # (C, 64)
        self.cells = np.concatenate(
            [(self.sketches[first : first + CHUNK_ROWS] @ self.centroids.T).argmax(1) for first in range(0, count, CHUNK_ROWS)]
        )
        self.margin = self._margin(sample, rng)

    def find(self, queries: Rows, members: Rows) -> Found:
        """Return the pairs of query and member rows with a cosine of at least the threshold; a row is no neighbour of itself."""
        if len(queries) * len(members) <= ALL_PAIRS_UP_TO:
            query, member = np.nonzero(self.compared[queries] @ self.compared[members].T >= self.threshold - ROUNDING)
            found = [(query, member)]
        else:
            found = self._candidates(queries, members)
        query = np.concatenate([np.zeros(0, np.int64), *(each[0] for each in found)])
        member = np.concatenate([np.zeros(0, np.int64), *(each[1] for each in found)])
        is_other = queries[query] != members[member]
        query, member = query[is_other], member[is_other]
        cosines = self._cosines(queries[query], members[member])
        is_near = cosines >= self.threshold
        return Found(query[is_near], member[is_near], cosines[is_near])

    def _sketch(self, vectors: Floats) -> Floats:
        if self.directions is None:
            return vectors
        main = vectors @ self.directions
        rest = np.sqrt(np.maximum((vectors * vectors).sum(1) - (main * main).sum(1), 0))
        return np.concatenate([main, rest[:, None]], axis=1)

    def _margin(self, sample: Floats, rng: np.random.Generator) -> float:
        """Plant pairs at the threshold, half of them apart in directions of the data, and return the margin that finds all of them."""
        first = sample[rng.integers(0, len(sample), PLANTED)]
        apart = np.concatenate([sample[rng.integers(0, len(sample), PLANTED // 2)], rng.normal(size=first[PLANTED // 2 :].shape)])
        apart = unit((apart - (apart * first).sum(1, keepdims=True) * first).astype(np.float32))
        second = self.threshold * first + np.sqrt(1 - self.threshold**2) * apart
        scores = self._sketch(first) @ self.centroids.T
        cells = (self._sketch(second) @ self.centroids.T).argmax(1)
        return float((scores.max(1) - scores[np.arange(PLANTED), cells]).max())

    def _candidates(self, queries: Rows, members: Rows) -> list[tuple[Rows, Rows]]:
        order = np.argsort(self.cells[members], kind="stable")
        sizes = np.bincount(self.cells[members], minlength=len(self.centroids))
        ends = np.cumsum(sizes)
        sketches, compared = self.sketches[members[order]], self.compared[members[order]]  # of one cell after the other
        found = []
        step = max(1, SCORES_AT_ONCE // len(self.centroids))
        for first in range(0, len(queries), step):
            asked = self.sketches[queries[first : first + step]]
            asked_whole = self.compared[queries[first : first + step]]
            scores = asked @ self.centroids.T
            cell, place = np.nonzero((scores >= scores.max(1, keepdims=True) - self.margin).T)
            for start, end in itertools.pairwise([*np.flatnonzero(np.diff(cell, prepend=-1)), len(cell)]):
                low, high = ends[cell[start]] - sizes[cell[start]], ends[cell[start]]
                is_near = asked[place[start:end]] @ sketches[low:high].T >= self.threshold - ROUNDING
                if self.held is not None and np.count_nonzero(is_near) > is_near.size * LEFT_BY_SKETCHES:
                    is_near = asked_whole[place[start:end]] @ compared[low:high].T >= self.threshold - ROUNDING
                query, member = np.nonzero(is_near)
                if len(query):
                    found.append((first + place[start:end][query], order[low:high][member]))
        return found

    def _cosines(self, left: Rows, right: Rows) -> Floats:
        pieces = [np.zeros(0, np.float32)]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            pair = [self._vectors(rows[start : start + PAIRS_AT_ONCE]) for rows in (left, right)]
            pieces.append(np.einsum("nd,nd->n", *pair))
        return np.concatenate(pieces)

    def _vectors(self, rows: Rows) -> Floats:
        if self.held is not None:
            return np.asarray(self.held[rows], np.float32)
        distinct, place = np.unique(rows, return_inverse=True)
        return np.asarray(unit(take(self.parts, distinct))[place], np.float32)


class NearPictures:
    """Finds pictures that look alike: perceptual hashes at most `max_bits` apart, and small copies at most `max_rms` apart.

    The hash knows only shades of grey: the small copies tell a red heart from a blue one. A hash is four bands of 16 bits, of which one
    differs in at most max_bits // 4 bits where all together differ in max_bits: hashes with such a band in common are compared (Norouzi
    et al. 2012).
    """

    def __init__(self, hashes: NDArray[np.uint64], thumbs: NDArray[np.uint8], max_bits: int, max_rms: float) -> None:
        """Take hashes (N,) and small copies (N, ...), as indexing.dedup.look_of makes them."""
        self.hashes, self.thumbs = hashes, thumbs.reshape(len(thumbs), -1)
        self.max_bits, self.max_rms = max_bits, max_rms
        flips = itertools.chain.from_iterable(itertools.combinations(range(BAND_BITS), each) for each in range(max_bits // BANDS + 1))
        self.masks = [sum(1 << bit for bit in bits) for bits in flips]

    def find(self, queries: Rows, members: Rows) -> Found:
        """Return the pairs of query and member rows that look alike; a row is no neighbour of itself."""
        pairs = [np.zeros(0, np.int64)]
        for query, member in self._candidates(queries, members):
            bits = np.bitwise_count(self.hashes[queries[query]] ^ self.hashes[members[member]])
            is_near = (bits <= self.max_bits) & (queries[query] != members[member])
            pairs.append(query[is_near] * len(members) + member[is_near])
        query, member = np.divmod(np.unique(np.concatenate(pairs)), max(1, len(members)))
        rms = self._rms(queries[query], members[member])
        is_near = rms <= self.max_rms
        return Found(query[is_near], member[is_near], -rms[is_near])

    def _candidates(self, queries: Rows, members: Rows) -> Iterator[tuple[Rows, Rows]]:
        if len(queries) * len(members) <= ALL_PAIRS_UP_TO:
            yield np.divmod(np.arange(len(queries) * len(members)), max(1, len(members)))
            return
        for band in range(BANDS):
            shift = np.uint64(band * BAND_BITS)
            asked, there = (((self.hashes[rows] >> shift) & np.uint64(0xFFFF)).astype(np.int64) for rows in (queries, members))
            order = np.argsort(there, kind="stable")
            starts = np.concatenate([[0], np.cumsum(np.bincount(there, minlength=1 << BAND_BITS))])
            for mask in self.masks:
                low, high = starts[asked ^ mask], starts[(asked ^ mask) + 1]
                for query, place in _spelt_out(low, high):
                    yield query, order[place]

    def _rms(self, left: Rows, right: Rows) -> Floats:
        pieces = [np.zeros(0, np.float32)]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            apart = self.thumbs[left[start : start + PAIRS_AT_ONCE]].astype(np.float32) - self.thumbs[right[start : start + PAIRS_AT_ONCE]]
            pieces.append(np.sqrt((apart * apart).mean(1)))
        return np.concatenate(pieces)


def _spelt_out(low: Rows, high: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yield (i, place) for every place in low[i]..high[i] of every i, some millions at a time."""
    ends = np.cumsum(high - low)
    first = 0
    while first < len(low):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + ALL_PAIRS_UP_TO, side="right")))
        sizes = (high - low)[first:last]
        query = np.repeat(np.arange(first, last), sizes)
        yield query, np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + low[query]
        first = last

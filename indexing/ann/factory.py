"""The rule that chooses the kind of FAISS index by count, dimension and memory, what a kind takes,
and training it.

Knows vectors and FAISS's factory strings only; files, metadata and recall are others'. Legend: N
vectors, D dimensions, C cells.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.ann.faiss_layers import layers, rotate, rotate_exactly, rotation
from indexing.ann.kmeans import centroids
from indexing.data.embedding_store import CHUNK_ROWS, Floats, take
from infra.errors import CallerError, DataError

FLAT_BELOW = 20_000
"""Number of vectors up to which brute force answers in about a millisecond, exactly."""
CODED_FROM = 50_000
"""From here on a query reads so much of the cells that small re-ranked codes answer sooner than
whole vectors: in 0.3 (without clusters) to 0.8 (with) of the time at 50,000 x 512."""
POINTS_PER_CELL = 39
"""FAISS warns of poor centroids below this many training vectors for each."""
TRAINED_PER_CELL = 64
"""More training vectors for each centroid cost time in proportion, and move recall by less than a
hundredth."""
TRAINED_PER_CODED_CELL = 32
"""With twice the cells, for the same time."""
LEAST_TRAINED = 1 << 16
"""Vectors to train with where there are, however few the cells: what lies beyond the range of those
is cut off by codes of eight bits."""
BITS = "RaBitQfs,Refine(SQ8)"
"""A bit for each dimension in memory, re-ranked from eight on disk."""
DIMS_PER_CODE = 4
"""Dimensions that share a code of four bits: as small as a bit for each, closer to the vectors, and
with one look-up table a query, not one a cell; for dimensions that are a multiple of it."""
DIMS_PER_CENTROID_CODE = 2
"""Dimensions of a centroid that share a code of four bits: a sixteenth of its bytes, and cells are
found in a sixth of the time."""
MAX_CELLS = 1 << 15
"""More take long to find, and twice the memory of what they are found with; from 4.2M vectors on
cells grow instead."""
CODED_CENTROIDS_FROM = 16 * POINTS_PER_CELL
"""Cells; fewer are not enough to choose the codes by, nor do they take long."""
SCRATCH_BYTES = 96 << 20
"""Bytes that FAISS allocates itself: blocks of products with centroids, heaps of searches."""


def cells_of(factory: str) -> int:
    """Return the number of cells that a factory string names; 0 for Flat."""
    match = re.search(r"IVF(\d+)", factory)
    return int(match[1]) if match else 0


def has_coded_centroids(factory: str) -> bool:
    """Say whether a factory string codes its centroids."""
    return f"IVF{cells_of(factory)}(" in factory


def trained_on(factory: str, count: int) -> int:
    """Return how many of the vectors cells and codes are found with."""
    per_cell = TRAINED_PER_CODED_CELL if has_coded_centroids(factory) else TRAINED_PER_CELL
    return min(count, max(LEAST_TRAINED, cells_of(factory) * per_cell))


def hot_bytes(factory: str, count: int, dim: int) -> int:
    """Return about how many bytes one index of that kind keeps in memory while it serves.

    The codes behind Refine are not counted: they stay in the memory-mapped file, of which a query
    touches some hundred rows.
    """
    if factory == "Flat":
        return count * dim * 4
    cells, codes = cells_of(factory), factory.partition("IVF")[2].partition(",")[2]
    shared = cells * dim * 4  # centroids
    if has_coded_centroids(factory):
        shared = cells * dim // 4 + 16 * dim * 4  # their codes, and what these stand for
    if codes == "Flat":
        return shared + count * (dim * 4 + 8)  # 8: the id
    if codes == "SQ8":
        return shared + count * (dim + 8)
    if factory.startswith("RR"):
        shared += dim * dim * 4
    one = math.ceil(dim / 8)  # a bit for each dimension
    if "RaBitQ" in codes:
        one += 8  # and two factors
    else:
        shared += 16 * dim * 4  # what the codes stand for
    return (
        shared + count * 8 + (count + 16 * cells) * one
    )  # fast scan pads each cell to whole blocks of 32, by 16 on average


def choose_factory(count: int, dim: int, memory_bytes: int) -> str:
    """Choose the kind of index: the first of the list of which two (image, text) fit in the memory.

    Flat (below FLAT_BELOW vectors only: exact, but every query reads all), IVF,Flat (exact within
    the probed cells), IVF,SQ8 (a quarter of that), RR,IVF,PQx4fs,Refine(SQ8) (a bit for each
    dimension in memory, in codes of four, after a random rotation: without one the few directions
    that carry most of an embedding share their bits with none; re-ranked from disk). There are 4
    sqrt(count) cells, of the last kind 16 sqrt(count) with coded centroids, MOST_CELLS at most;
    fewer where a cell would have under 39 vectors, and down to 2 sqrt(count) where memory is short:
    each cell pads its codes. Where dimensions do not go into codes of four it is RaBitQ, with 2
    sqrt(count) cells: each costs a look-up table. From CODED_FROM vectors on only the last kind is
    left, whatever the memory: it is the fastest then. Raises CallerError when none fits.
    """
    few, cells, eightfold, many = (
        max(1, min(round(factor * math.sqrt(count)), count // POINTS_PER_CELL, MAX_CELLS))
        for factor in (2, 4, 8, 16)
    )
    if dim % DIMS_PER_CODE:
        kinds = [f"RR{dim},IVF{few},{BITS}"]
    else:
        cell_kinds = [
            f"IVF{cell_count}(PQ{dim // DIMS_PER_CENTROID_CODE}x4fs)"
            if cell_count >= CODED_CENTROIDS_FROM
            else f"IVF{cell_count}"
            for cell_count in (many, eightfold, cells, few)
        ]
        kinds = [
            f"RR{dim},{cell_kind},PQ{dim // DIMS_PER_CODE}x4fs,Refine(SQ8)"
            for cell_kind in cell_kinds
        ]
    if count < CODED_FROM:
        kinds = [f"IVF{cells},Flat", f"IVF{cells},SQ8", *kinds]
    if count < FLAT_BELOW:
        kinds = ["Flat", *kinds]
    for kind in kinds:
        if 2 * hot_bytes(kind, count, dim) <= memory_bytes:
            return kind
    least = min(2 * hot_bytes(kind, count, dim) for kind in kinds)
    raise CallerError(
        f"[index] memory_bytes = {memory_bytes} holds no index of {count} vectors of {dim} "
        "dimensions: "
        f"set it to {least} or more, or name a factory"
    )


def building_bytes(
    factory: str, count: int, dim: int, at_once: int, queries: int, is_grown: bool = False
) -> int:
    """Return about how many bytes a process holds at most while it builds and tunes one index of
    that kind.

    `at_once` is how many vectors are encoded before they are put into the cells, `queries` how many
    the tuning asks together. An index that `is_grown` is read whole, with the codes behind Refine,
    and its arrays are copied as they grow.
    """
    hot, chunk, cells = hot_bytes(factory, count, dim), CHUNK_ROWS * dim * 4, cells_of(factory)
    code_bytes = hot_bytes(factory, 2 * at_once, dim) - hot_bytes(factory, at_once, dim)
    training = (
        hot_bytes(factory, 0, dim) + 3 * trained_on(factory, count) * dim * 4
    )  # as read, turned, and in the cells
    encoding = (
        2 * hot_bytes(factory, 0, dim) + code_bytes + 8 * at_once + 3 * chunk
    )  # as read, turned, and with the finer codes
    filling = hot if cells else hot + chunk
    tuning = chunk + queries * (3 * CHUNK_ROWS + 100 * dim) * 4
    growing = (
        2 * (hot + count * dim * factory.endswith("Refine(SQ8)")) + 2 * chunk if is_grown else 0
    )
    return max(training, encoding * bool(cells), filling, tuning, growing) + SCRATCH_BYTES


def empty(factory: str, dim: int) -> Any:
    """Return an index of that kind, untrained. A rotation is the outermost: it serves the codes
    that are re-ranked from as well.

    FAISS's own factory re-ranks from vectors as they come, and then the eight bits of the few
    directions that carry most err more than all others together: of the ten nearest among a million
    clustered vectors a fortieth was lost to that, rotated a hundredth.
    """
    first, _, rest = factory.partition(",") if factory.startswith("RR") else ("", "", factory)
    index = faiss.index_factory(dim, rest, faiss.METRIC_INNER_PRODUCT)
    if not first:
        return index
    whole = faiss.IndexPreTransform(index)
    whole.prepend_transform(faiss.RandomRotationMatrix(dim, int(first[2:])))
    return whole


def train(factory: str, parts: Sequence[NDArray[Any]], seed: int) -> Any:
    """Return an index of that kind, still empty, trained on a sample of the vectors ((n, D) parts).
    Raises DataError as `checked` does.
    """
    count, dim = sum(len(part) for part in parts), parts[0].shape[1]
    index = empty(factory, dim)
    if cells_of(factory):
        size = trained_on(factory, count)
        sample = check_finite(
            take(parts, np.sort(np.random.default_rng(seed).choice(count, size, replace=False)))
        )
        inverted = layers(index)[-1]
        inverted.cp.seed = seed % 2**31
        inverted.cp.min_points_per_centroid = (
            1  # too few is either the rule's choice or the recipe's: no warning on the terminal
        )
        inverted.cp.max_points_per_centroid = TRAINED_PER_CELL
        if has_coded_centroids(factory):
            if rotates := rotation(index):
                rotates.train(sample)
            centres = centroids(rotate(index, sample), inverted.nlist, inverted.cp)
            coarse: Any = faiss.downcast_index(inverted.quantizer)
            coarse.pq.cp.min_points_per_centroid = 1
            coarse.train(centres)
            coarse.add(centres)
        index.train(sample)
    return index


def add(index: Any, vectors: Iterable[Floats]) -> None:
    """Add vectors (n, D) at a time to a trained index. Raises DataError where they hold NaN or
    infinity.
    """
    for chunk in vectors:
        if rotation(index) is None:
            index.add(check_finite(chunk))
        else:
            inner = layers(index)[1]
            inner.add(rotate_exactly(index, check_finite(chunk)))
            index.ntotal = inner.ntotal


def check_finite(vectors: Floats) -> Floats:
    """Return the vectors. Raises DataError where they hold NaN or infinity."""
    if not np.isfinite(vectors).all():
        raise DataError("the embeddings hold NaN or infinity: embed again")
    return vectors

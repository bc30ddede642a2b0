"""Chooses the kind of FAISS index by count, dimensions and memory, estimates the memory of a kind,
and trains an index of it.

Works on vectors and FAISS's factory strings; indexing.ann.index handles files and metadata,
indexing.ann.tuning recall. Legend: N vectors, D dimensions, C cells.
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
"""With fewer vectors, brute force answers exactly in about a millisecond."""
CODED_FROM = 50_000
"""From so many vectors on, small codes with re-ranking answer sooner than whole vectors: in 0.3
(without clusters) to 0.8 (with clusters) of the time at 50,000 x 512."""
POINTS_PER_CELL = 39
"""Minimum number of training vectors for each centroid; FAISS warns of poor centroids below it."""
TRAINED_PER_CELL = 64
"""Training vectors for each centroid. More of them cost time in proportion and change recall by
less than a hundredth."""
TRAINED_PER_CODED_CELL = 32
"""The same where centroids are coded: there are twice the cells, for the same time."""
LEAST_TRAINED = 1 << 16
"""Minimum number of training vectors, even for few cells: eight-bit codes cut off values outside
the range of the training vectors."""
BITS = "RaBitQfs,Refine(SQ8)"
"""Codes of one bit for each dimension in memory; eight-bit codes on disk re-rank."""
DIMS_PER_CODE = 4
"""Dimensions that share a code of four bits: as small as one bit for each, but more exact, and with
one look-up table for a query instead of one for each cell. The dimensions must be a multiple of
it."""
DIMS_PER_CENTROID_CODE = 2
"""Dimensions of a centroid that share a code of four bits: a sixteenth of its bytes, and a query
finds its cells in a sixth of the time."""
MAX_CELLS = 1 << 15
"""Maximum number of cells: more take long to train, with twice the memory. From 4.2 million vectors
on, cells become larger instead."""
CODED_CENTROIDS_FROM = 16 * POINTS_PER_CELL
"""Minimum number of cells for coded centroids: fewer are too few to train the codes, and quick to
search anyway."""
SCRATCH_BYTES = 96 << 20
"""Bytes that FAISS allocates for itself: blocks of products with centroids, heaps of searches."""


def cells_of(factory: str) -> int:
    """Return the number of cells that a factory string names; 0 for Flat."""
    match = re.search(r"IVF(\d+)", factory)
    return int(match[1]) if match else 0


def has_coded_centroids(factory: str) -> bool:
    """Return whether a factory string codes its centroids."""
    return f"IVF{cells_of(factory)}(" in factory


def trained_on(factory: str, count: int) -> int:
    """Return how many of `count` vectors train the cells and codes."""
    per_cell = TRAINED_PER_CODED_CELL if has_coded_centroids(factory) else TRAINED_PER_CELL
    return min(count, max(LEAST_TRAINED, cells_of(factory) * per_cell))


def hot_bytes(factory: str, count: int, dim: int) -> int:
    """Return about how many bytes one index of that kind keeps in memory while it is searched.

    The codes of Refine are not counted: they stay in the memory-mapped file, of which a query reads
    some hundred rows.
    """
    if factory == "Flat":
        return count * dim * 4
    cells, codes = cells_of(factory), factory.partition("IVF")[2].partition(",")[2]
    shared = cells * dim * 4  # centroids
    if has_coded_centroids(factory):
        shared = cells * dim // 4 + 16 * dim * 4  # their codes and the codebook
    if codes == "Flat":
        return shared + count * (dim * 4 + 8)  # 8: the id
    if codes == "SQ8":
        return shared + count * (dim + 8)
    if factory.startswith("RR"):
        shared += dim * dim * 4
    code_bytes = math.ceil(dim / 8)  # a bit for each dimension
    if "RaBitQ" in codes:
        code_bytes += 8  # two factors
    else:
        shared += 16 * dim * 4  # the codebook
    # Fast scan pads each cell to whole blocks of 32 vectors, by 16 on average.
    return shared + count * 8 + (count + 16 * cells) * code_bytes


def choose_factory(count: int, dim: int, memory_bytes: int) -> str:
    """Return the kind of index for `count` vectors: the first in the list below of which two
    (image, text) fit in the memory.

    - Flat, for less than FLAT_BELOW vectors: exact, but every query reads all vectors.
    - IVF,Flat: exact within the probed cells.
    - IVF,SQ8: a quarter of that memory.
    - RR,IVF,PQx4fs,Refine(SQ8): one bit for each dimension in memory, in codes of four dimensions;
      eight-bit codes on disk re-rank. The vectors are rotated at random first, which spreads the
      few directions that carry most of an embedding over all codes.
    - RR,IVF,RaBitQfs,Refine(SQ8) in its place where DIMS_PER_CODE does not divide the dimensions.

    From CODED_FROM vectors on only the last two remain, whatever the memory, because they are the
    fastest. IVF,Flat and IVF,SQ8 have 4 sqrt(count) cells; the PQ kind has 16 sqrt(count) with
    coded centroids, and down to 2 sqrt(count) where memory is short, because each cell pads its
    codes; the RaBitQ kind has 2 sqrt(count), because each cell needs a look-up table. No kind has
    more than MAX_CELLS, or cells of fewer than POINTS_PER_CELL vectors. Raises CallerError where no
    kind fits.
    """
    kinds = _kinds(count, dim)
    for kind in kinds:
        if 2 * hot_bytes(kind, count, dim) <= memory_bytes:
            return kind
    least = min(2 * hot_bytes(kind, count, dim) for kind in kinds)
    raise CallerError(
        f"[index] memory_bytes = {memory_bytes} holds no index of {count} vectors of {dim} "
        f"dimensions: set it to {least} or more, or name a factory"
    )


def _kinds(count: int, dim: int) -> list[str]:
    """Return the kinds of index that suit the vectors, the preferred ones first."""
    few, cells, eightfold, many = (
        max(1, min(round(factor * math.sqrt(count)), count // POINTS_PER_CELL, MAX_CELLS))
        for factor in (2, 4, 8, 16)
    )
    if dim % DIMS_PER_CODE:
        kinds = [f"RR{dim},IVF{few},{BITS}"]
    else:
        kinds = [
            f"RR{dim},{_coded_cells(cell_count, dim)},PQ{dim // DIMS_PER_CODE}x4fs,Refine(SQ8)"
            for cell_count in (many, eightfold, cells, few)
        ]
    if count < CODED_FROM:
        kinds = [f"IVF{cells},Flat", f"IVF{cells},SQ8", *kinds]
    if count < FLAT_BELOW:
        kinds = ["Flat", *kinds]
    return kinds


def _coded_cells(count: int, dim: int) -> str:
    """Return the factory string of so many cells, with coded centroids where there are enough."""
    if count < CODED_CENTROIDS_FROM:
        return f"IVF{count}"
    return f"IVF{count}(PQ{dim // DIMS_PER_CENTROID_CODE}x4fs)"


def building_bytes(
    factory: str, count: int, dim: int, at_once: int, queries: int, is_grown: bool = False
) -> int:
    """Return about how many bytes a process holds at most while it builds and tunes one index of
    that kind.

    `at_once` is the number of vectors that are encoded before they go into the cells, `queries` the
    number that the tuning searches together. An index that `is_grown` is read whole, with the codes
    of Refine, and its arrays are copied as they grow.
    """
    hot, chunk, cells = hot_bytes(factory, count, dim), CHUNK_ROWS * dim * 4, cells_of(factory)
    code_bytes = hot_bytes(factory, 2 * at_once, dim) - hot_bytes(factory, at_once, dim)
    # Three copies of the sample: as read, rotated, and in the clustering.
    training = hot_bytes(factory, 0, dim) + 3 * trained_on(factory, count) * dim * 4
    # Three copies of a chunk: as read, rotated, and as codes of Refine.
    encoding = 2 * hot_bytes(factory, 0, dim) + code_bytes + 8 * at_once + 3 * chunk
    filling = hot if cells else hot + chunk
    tuning = chunk + queries * (3 * CHUNK_ROWS + 100 * dim) * 4
    growing = 0
    if is_grown:
        growing = 2 * (hot + count * dim * factory.endswith("Refine(SQ8)")) + 2 * chunk
    return max(training, encoding * bool(cells), filling, tuning, growing) + SCRATCH_BYTES


def empty(factory: str, dim: int) -> Any:
    """Return an untrained index of that kind, whose rotation is the outermost layer.

    Refine then codes rotated vectors, too. FAISS's own factory codes unrotated ones, where the few
    directions that carry most of a vector lose more to eight bits than all others together: among a
    million clustered vectors that lost a fortieth of the ten nearest, and a hundredth with the
    rotation.
    """
    first, _, rest = factory.partition(",") if factory.startswith("RR") else ("", "", factory)
    index = faiss.index_factory(dim, rest, faiss.METRIC_INNER_PRODUCT)
    if not first:
        return index
    whole = faiss.IndexPreTransform(index)
    whole.prepend_transform(faiss.RandomRotationMatrix(dim, int(first[2:])))
    return whole


def train(factory: str, parts: Sequence[NDArray[Any]], seed: int) -> Any:
    """Return an empty index of that kind, trained on a sample of the vectors ((n, D) parts).

    Raises DataError where they hold NaN or infinity.
    """
    count, dim = sum(len(part) for part in parts), parts[0].shape[1]
    index = empty(factory, dim)
    if not cells_of(factory):
        return index
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(count, trained_on(factory, count), replace=False))
    sample = check_finite(take(parts, rows))
    inverted = layers(index)[-1]
    inverted.cp.seed = seed % 2**31
    # Too few points for each centroid are the choice of the rule or of the recipe: no warning.
    inverted.cp.min_points_per_centroid = 1
    inverted.cp.max_points_per_centroid = TRAINED_PER_CELL
    if has_coded_centroids(factory):
        _train_coded_centroids(index, sample)
    index.train(sample)
    return index


def _train_coded_centroids(index: Any, sample: Floats) -> None:
    """Train the rotation and the centroids of an index, and code the centroids."""
    inverted, rotates = layers(index)[-1], rotation(index)
    if rotates:
        rotates.train(sample)
    centres = centroids(rotate(index, sample), inverted.nlist, inverted.cp)
    coarse: Any = faiss.downcast_index(inverted.quantizer)
    coarse.pq.cp.min_points_per_centroid = 1
    coarse.train(centres)
    coarse.add(centres)


def add(index: Any, vectors: Iterable[Floats]) -> None:
    """Add vectors to a trained index, (n, D) at a time.

    Raises DataError where they hold NaN or infinity.
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

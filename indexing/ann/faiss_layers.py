"""The parts of a FAISS index of one of our kinds: rotation, re-ranking codes, cells and codes.

Legend: B vectors of a call, D dimensions, C cells.
"""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, Rows

BLOCK_BYTES = 1 << 24
"""Maximum bytes of float64 values that an exact product reads or writes at once."""
VECTOR_BITS, MATRIX_BITS = 22, 25
"""Bits after the binary point of a vector and of a matrix in exact products. With the 5 bits that a
sum over 1,024 dimensions can add, they fit into the 53 bits of a float64."""


class _Parts(NamedTuple):
    layers: list[Any]
    rotation: Any
    finer: Any


_cache: weakref.WeakKeyDictionary[Any, _Parts] = weakref.WeakKeyDictionary()
"""Finding the parts again for every query would take as long as probing some cells."""


def layers(index: Any) -> list[Any]:
    """Return the nested indexes, outermost first, each with its own type; the last one has the
    cells, or is Flat.
    """
    return _parts(index).layers


def finer(index: Any) -> Any:
    """Return the index that holds the re-ranking codes, or None."""
    return _parts(index).finer


def rotation(index: Any) -> Any:
    """Return the transform that rotates vectors before they go to the cells, or None."""
    return _parts(index).rotation


def rotate(index: Any, vectors: Floats) -> Floats:
    """Return vectors (B, D), rotated where the index rotates, with FAISS's float32 products."""
    rotates = rotation(index)
    return vectors if rotates is None else rotates.apply(vectors)


def rotate_exactly(index: Any, vectors: Floats) -> Floats:
    """Return vectors (B, D), rotated where the index rotates, with exact products.

    Equal vectors give equal results on any machine and in any batch.
    """
    rotates = rotation(index)
    if rotates is None:
        return vectors
    matrix = faiss.vector_to_array(rotates.A).reshape(rotates.d_out, rotates.d_in)
    return np.concatenate(
        [exact_products(block, matrix).astype(np.float32) for block in _blocks(vectors, matrix)]
    )


def nearest_cells(index: Any, rotated: Floats) -> Rows:
    """Return the cell (B,) of each rotated vector (B, D).

    Equal vectors give equal cells on any machine and in any batch.
    """
    quantizer: Any = faiss.downcast_index(layers(index)[-1].quantizer)
    if not isinstance(quantizer, faiss.IndexFlat):
        # Coded centroids: FAISS adds table entries and does not use BLAS.
        return np.asarray(quantizer.search(rotated, 1)[1][:, 0])
    centroids = quantizer.reconstruct_n(0, quantizer.ntotal)
    return np.concatenate(
        [exact_products(block, centroids).argmax(axis=1) for block in _blocks(rotated, centroids)]
    )


def exact_products(vectors: Floats, matrix: Floats) -> NDArray[np.float64]:
    """Return the dot products (B, C) of vectors (B, D) with the rows of a matrix (C, D).

    Float32 products depend on the order of additions, which BLAS chooses by its kernel, the number
    of threads and a row's place in the batch. Here both sides are rounded to fixed point
    (VECTOR_BITS below the largest number of a vector, MATRIX_BITS below the largest of the matrix),
    so that float64 holds every sum exactly, in any order of additions.
    """
    scales = np.ldexp(1.0, np.frexp(np.abs(vectors).max(axis=1, keepdims=True))[1])
    scale = np.ldexp(1.0, np.frexp(np.abs(matrix).max())[1])
    points = np.rint(vectors * (2.0**VECTOR_BITS / scales))
    return (points @ np.rint(matrix.T * (2.0**MATRIX_BITS / scale))) * (
        scales * scale / 2.0 ** (VECTOR_BITS + MATRIX_BITS)
    )


def _blocks(vectors: Floats, matrix: Floats) -> Iterator[Floats]:
    step = max(1, BLOCK_BYTES // (8 * max(matrix.shape)))
    for start in range(0, len(vectors), step):
        yield vectors[start : start + step]


def _parts(index: Any) -> _Parts:
    if index not in _cache:
        _cache[index] = _find_parts(index)
    return _cache[index]


def _find_parts(index: Any) -> _Parts:
    nested: list[Any] = [faiss.downcast_index(index)]
    rotates = fine = None
    while True:
        outer = nested[-1]
        if isinstance(outer, faiss.IndexPreTransform):
            chain: Any = outer.chain
            rotates = faiss.downcast_VectorTransform(chain.at(0))
            nested.append(faiss.downcast_index(outer.index))
        elif isinstance(outer, faiss.IndexRefine):
            fine = faiss.downcast_index(outer.refine_index)
            nested.append(faiss.downcast_index(outer.base_index))
        else:
            return _Parts(nested, rotates, fine)

"""Parts of a FAISS index of one of our kinds: rotation, re-ranking codes, cells and their codes."""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, Rows

BLOCK_BYTES = 1 << 24
"""Maximum bytes of float64 values that an exact product reads or makes at once."""
VECTOR_BITS, MATRIX_BITS = 22, 25
"""Bits after the point of a vector and of a matrix in products that are exact: with the 5 bits that
a sum over 1,024 dimensions can add they fit into the 53 of a float64."""


class _Inside(NamedTuple):
    layers: list[Any]
    rotation: Any
    finer: Any


_cache: weakref.WeakKeyDictionary[Any, _Inside] = weakref.WeakKeyDictionary()
"""To look for every query would take as long as looking into some cells."""


def layers(index: Any) -> list[Any]:
    """Return an index and what it holds, outermost first, each as what it is; the last one has the
    cells, or is Flat.
    """
    return _inside(index).layers


def finer(index: Any) -> Any:
    """Return what holds the codes to re-rank from, or None."""
    return _inside(index).finer


def rotation(index: Any) -> Any:
    """Return what rotates vectors before they go to cells, or None."""
    return _inside(index).rotation


def rotate(index: Any, vectors: Floats) -> Floats:
    """Return vectors (n, D) as the cells have them."""
    rotates = rotation(index)
    return vectors if rotates is None else rotates.apply(vectors)


def rotate_exactly(index: Any, vectors: Floats) -> Floats:
    """Return vectors (n, D) as the cells store them: equal vectors give equal results, on any
    machine and beside any others.
    """
    rotates = rotation(index)
    if rotates is None:
        return vectors
    matrix = faiss.vector_to_array(rotates.A).reshape(rotates.d_out, rotates.d_in)
    return np.concatenate(
        [exact_products(block, matrix).astype(np.float32) for block in _blocks(vectors, matrix)]
    )


def nearest_cells(index: Any, rotated: Floats) -> Rows:
    """Return the cell of each rotated vector (n,): equal vectors give equal cells, on any machine
    and beside any others.
    """
    quantizer: Any = faiss.downcast_index(layers(index)[-1].quantizer)
    if not isinstance(quantizer, faiss.IndexFlat):
        return np.asarray(
            quantizer.search(rotated, 1)[1][:, 0]
        )  # by tables of a few dimensions each, not by BLAS
    centroids = quantizer.reconstruct_n(0, quantizer.ntotal)
    return np.concatenate(
        [exact_products(block, centroids).argmax(axis=1) for block in _blocks(rotated, centroids)]
    )


def exact_products(vectors: Floats, matrix: Floats) -> NDArray[np.float64]:
    """Return the dot products (n, m) of vectors (n, D) with the rows of a matrix (m, D).

    Float32 products depend on the order of additions, and BLAS chooses that by its kernel, the
    number of threads, and a row's place among the others. Here both sides are rounded to fixed
    point (VECTOR_BITS below the largest number of a vector, MATRIX_BITS below the largest of the
    matrix), so that float64 holds every sum exactly, in whatever order it is made.
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


def _inside(index: Any) -> _Inside:
    if index not in _cache:
        _cache[index] = _look(index)
    return _cache[index]


def _look(index: Any) -> _Inside:
    chain_layers: list[Any] = [faiss.downcast_index(index)]
    rotates = fine = None
    while True:
        if isinstance(chain_layers[-1], faiss.IndexPreTransform):
            chain: Any = chain_layers[-1].chain
            rotates = faiss.downcast_VectorTransform(chain.at(0))
            chain_layers.append(faiss.downcast_index(chain_layers[-1].index))
        elif isinstance(chain_layers[-1], faiss.IndexRefine):
            fine = faiss.downcast_index(chain_layers[-1].refine_index)
            chain_layers.append(faiss.downcast_index(chain_layers[-1].base_index))
        else:
            return _Inside(chain_layers, rotates, fine)

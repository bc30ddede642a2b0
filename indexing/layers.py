"""What is inside a FAISS index of one of our kinds: a rotation, what re-ranks, the cells and the codes in them."""

import weakref
from typing import Any, NamedTuple

import faiss

from indexing.embeddings import Floats


class _Inside(NamedTuple):
    layers: list[Any]
    rotation: Any
    finer: Any


_known: weakref.WeakKeyDictionary[Any, _Inside] = weakref.WeakKeyDictionary()
"""To look for every query would take as long as looking into some cells."""


def layers(index: Any) -> list[Any]:
    """Return an index and what it holds, outermost first, each as what it is; the last one has the cells, or is Flat."""
    return _inside(index).layers


def finer(index: Any) -> Any:
    """Return what holds the codes to re-rank from, or None."""
    return _inside(index).finer


def rotation(index: Any) -> Any:
    """Return what rotates vectors before they go to cells, or None."""
    return _inside(index).rotation


def turned(index: Any, vectors: Floats) -> Floats:
    """Return vectors (n, D) as the cells have them."""
    rotates = rotation(index)
    return vectors if rotates is None else rotates.apply(vectors)


def _inside(index: Any) -> _Inside:
    if index not in _known:
        _known[index] = _look(index)
    return _known[index]


def _look(index: Any) -> _Inside:
    found: list[Any] = [faiss.downcast_index(index)]
    rotates = fine = None
    while True:
        if isinstance(found[-1], faiss.IndexPreTransform):
            chain: Any = found[-1].chain
            rotates = faiss.downcast_VectorTransform(chain.at(0))
            found.append(faiss.downcast_index(found[-1].index))
        elif isinstance(found[-1], faiss.IndexRefine):
            fine = faiss.downcast_index(found[-1].refine_index)
            found.append(faiss.downcast_index(found[-1].base_index))
        else:
            return _Inside(found, rotates, fine)

"""The parts of an index are found in any order of its layers."""

import faiss
import numpy as np
import pytest

from indexing.ann.factory import empty
from indexing.ann.faiss_layers import finer, layers, rotate
from indexing.ann.tuning import Effort, search
from tests.helpers.embed_folders import vectors

DIM = 32
VECTORS = vectors(1500, DIM).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def test_layers_are_found_in_either_order() -> None:
    for factory, make in (
        ("RR32,IVF4,PQ8x4fs,Refine(SQ8)", empty),
        ("RR32,IVF4,PQ8x4fs,Refine(SQ8)", _by_faiss),
        ("IVF4,Flat", empty),
    ):
        index = make(factory, DIM)
        index.train(VECTORS)
        index.add(VECTORS)
        assert isinstance(layers(index)[-1], faiss.IndexIVF)
        assert (finer(index) is None) == ("Refine" not in factory)
        at = layers(index)[-1].quantizer.search(rotate(index, VECTORS), 1)[1][:, 0]
        sizes = [layers(index)[-1].invlists.list_size(cell) for cell in range(4)]
        assert np.bincount(at, minlength=4).tolist() == sizes, "the cells hold rotated vectors"
        assert (search(index, VECTORS[:50], 1, Effort(4, 8))[1][:, 0] == np.arange(50)).all()


def _by_faiss(factory: str, dim: int) -> faiss.Index:
    return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)

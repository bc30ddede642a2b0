"""The rule that chooses a kind of index, the memory of a kind, and the recall of its codes."""

import faiss
import numpy as np
import pytest

from indexing.ann.factory import CODED_FROM, FLAT_BELOW, choose_factory, hot_bytes
from indexing.ann.tuning import Effort, brute_force, recalls, search
from infra.errors import CallerError
from tests.helpers.embed_folders import KINDS, filled, spread_out, vectors

DIM = 32
VECTORS = vectors(1500, DIM).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def test_the_rule_takes_the_largest_kind_that_fits_and_small_codes_for_many() -> None:
    assert choose_factory(FLAT_BELOW - 1, 512, 2**31) == "Flat"
    assert choose_factory(FLAT_BELOW, 512, 2**31) == "IVF512,Flat"
    assert choose_factory(CODED_FROM - 1, 512, 2**30) == "IVF894,Flat"
    assert choose_factory(CODED_FROM - 1, 512, 2**26) == "IVF894,SQ8"
    assert (
        choose_factory(CODED_FROM - 1, 512, 2**24)
        == "RR512,IVF1282(PQ256x4fs),PQ128x4fs,Refine(SQ8)"
    )
    assert (
        choose_factory(CODED_FROM, 512, 2**33) == "RR512,IVF1282(PQ256x4fs),PQ128x4fs,Refine(SQ8)"
    )
    assert choose_factory(200_000, 510, 2**26) == "RR510,IVF894,RaBitQfs,Refine(SQ8)"
    with pytest.raises(
        CallerError, match=r"memory_bytes = 1000 .* set it to (\d+) or more"
    ) as error:
        choose_factory(200_000, 512, 1000)
    least = int(str(error.value).split("set it to ")[1].split()[0])
    assert choose_factory(200_000, 512, least) == "RR512,IVF894(PQ256x4fs),PQ128x4fs,Refine(SQ8)"
    assert choose_factory(FLAT_BELOW, 512, 2**23) == "RR512,IVF512,PQ128x4fs,Refine(SQ8)", (
        "so few centroids are not coded"
    )
    assert (
        choose_factory(10_000_000, 512, 2**33) == "RR512,IVF32768(PQ256x4fs),PQ128x4fs,Refine(SQ8)"
    )
    assert (
        choose_factory(1_000_000, 512, 2**33) == "RR512,IVF16000(PQ256x4fs),PQ128x4fs,Refine(SQ8)"
    )


def test_where_memory_is_short_cells_become_fewer_before_an_index_is_refused() -> None:
    kinds, memory = (
        [],
        2 * hot_bytes("Flat", 101_931, 128) // 16,
    )  # 32 bytes a vector, which padded cells would fill
    with pytest.raises(CallerError):
        while True:
            kinds.append(choose_factory(101_931, 128, memory))
            memory = 2 * hot_bytes(kinds[-1], 101_931, 128) - 1
    assert kinds == [
        f"RR128,{cells},PQ32x4fs,Refine(SQ8)" for cells in ("IVF1277(PQ64x4fs)", "IVF639(PQ64x4fs)")
    ]
    assert choose_factory(101_931, 128, 2**30) == "RR128,IVF2613(PQ64x4fs),PQ32x4fs,Refine(SQ8)"


@pytest.mark.parametrize("factory", KINDS)
def test_hot_bytes_equal_the_bytes_of_an_index(factory: str) -> None:
    index = filled(factory.removesuffix(",Refine(SQ8)"), [VECTORS], 0)
    assert len(faiss.serialize_index(index)) == pytest.approx(
        hot_bytes(factory, len(VECTORS), DIM), rel=0.1
    )


def test_rotated_vectors_keep_their_order_in_a_bit_for_each_dimension() -> None:
    sample, queries = spread_out(
        [4000, 100], 128, -0.7
    )  # few directions carry most, as in CLIP's embeddings
    truth = brute_force([sample], queries, 10)
    recall_of = {}
    for first in ("", "RR128,"):
        index = filled(f"{first}IVF16,RaBitQfs,Refine(SQ8)", [sample], 0)
        recall_of[first] = recalls(
            [sample], queries, search(index, queries, 10, Effort(16, 8))[1], truth
        ).mean()
    assert recall_of["RR128,"] > recall_of[""] + 0.1
    assert recall_of["RR128,"] > 0.95


def test_rotated_codes_re_rank_better_than_those_of_faiss_factory() -> None:
    """Eight bits of the directions that carry most lose more than eight bits of rotated ones."""
    sample, queries = spread_out([4000, 200], 128, -0.7)
    truth = brute_force([sample], queries, 10)
    theirs = faiss.index_factory(
        128, "RR128,IVF16,PQ32x4fs,Refine(SQ8)", faiss.METRIC_INNER_PRODUCT
    )
    theirs.train(sample)
    theirs.add(sample)
    ours = filled("RR128,IVF16,PQ32x4fs,Refine(SQ8)", [sample], 0)
    reached = [
        recalls([sample], queries, search(index, queries, 10, Effort(16, 64))[1], truth).mean()
        for index in (theirs, ours)
    ]
    assert reached[1] > reached[0] + 0.005

"""The rule that chooses a kind of index, what a kind takes, and what its cells and codes are
worth.
"""

import faiss
import numpy as np
import pytest

from indexing.ann.factory import CODED_FROM, FLAT_BELOW, choose_factory, empty, hot_bytes
from indexing.ann.faiss_layers import finer, layers, rotate
from indexing.ann.kmeans import centroids
from indexing.ann.tuning import Effort, brute_force, recalls, search
from infra.errors import CallerError
from tests.helpers.embed_folders import KINDS, filled, spread_out, vectors

DIM = 32
GIVEN = vectors(1500, DIM).astype(np.float32)


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
    ) as refused:
        choose_factory(200_000, 512, 1000)
    named = int(str(refused.value).split("set it to ")[1].split()[0])
    assert choose_factory(200_000, 512, named) == "RR512,IVF894(PQ256x4fs),PQ128x4fs,Refine(SQ8)"
    assert choose_factory(FLAT_BELOW, 512, 2**23) == "RR512,IVF512,PQ128x4fs,Refine(SQ8)", (
        "so few centroids are as they are"
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
        f"RR128,{each},PQ32x4fs,Refine(SQ8)" for each in ("IVF1277(PQ64x4fs)", "IVF639(PQ64x4fs)")
    ]
    assert choose_factory(101_931, 128, 2**30) == "RR128,IVF2613(PQ64x4fs),PQ32x4fs,Refine(SQ8)"


@pytest.mark.parametrize("factory", KINDS)
def test_the_rule_knows_what_a_kind_takes(factory: str) -> None:
    index = filled(factory.removesuffix(",Refine(SQ8)"), [GIVEN], 0)
    assert len(faiss.serialize_index(index)) == pytest.approx(
        hot_bytes(factory, len(GIVEN), DIM), rel=0.1
    )


def test_turned_vectors_keep_their_order_in_a_bit_for_each_dimension() -> None:
    given, queries = spread_out(
        [4000, 100], 128, -0.7
    )  # few directions carry most, as in what CLIP makes
    truth = brute_force([given], queries, 10)
    found = {}
    for first in ("", "RR128,"):
        index = filled(f"{first}IVF16,RaBitQfs,Refine(SQ8)", [given], 0)
        found[first] = recalls(
            [given], queries, search(index, queries, 10, Effort(16, 8))[1], truth
        ).mean()
    assert found["RR128,"] > found[""] + 0.1
    assert found["RR128,"] > 0.95


def test_what_is_turned_is_also_ranked_better_than_by_faiss_own_order() -> None:
    """Eight bits of the directions that carry most err more than eight bits of turned ones, and
    those decide whom a query gets.
    """
    given, queries = spread_out([4000, 200], 128, -0.7)
    truth = brute_force([given], queries, 10)
    theirs = faiss.index_factory(
        128, "RR128,IVF16,PQ32x4fs,Refine(SQ8)", faiss.METRIC_INNER_PRODUCT
    )
    theirs.train(given)
    theirs.add(given)
    ours = filled("RR128,IVF16,PQ32x4fs,Refine(SQ8)", [given], 0)
    reached = [
        recalls([given], queries, search(each, queries, 10, Effort(16, 64))[1], truth).mean()
        for each in (theirs, ours)
    ]
    assert reached[1] > reached[0] + 0.005


def test_layers_are_told_in_either_order() -> None:
    for factory, made in (
        ("RR32,IVF4,PQ8x4fs,Refine(SQ8)", empty),
        ("RR32,IVF4,PQ8x4fs,Refine(SQ8)", _by_faiss),
        ("IVF4,Flat", empty),
    ):
        index = made(factory, DIM)
        index.train(GIVEN)
        index.add(GIVEN)
        assert isinstance(layers(index)[-1], faiss.IndexIVF)
        assert (finer(index) is None) == ("Refine" not in factory)
        at = layers(index)[-1].quantizer.search(rotate(index, GIVEN), 1)[1][:, 0]
        sizes = [layers(index)[-1].invlists.list_size(cell) for cell in range(4)]
        assert np.bincount(at, minlength=4).tolist() == sizes, "the cells have what is turned"
        assert (search(index, GIVEN[:50], 1, Effort(4, 8))[1][:, 0] == np.arange(50)).all()


def _by_faiss(factory: str, dim: int) -> faiss.Index:
    return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)


@pytest.mark.parametrize("count", [1, 2, 250])
def test_cells_are_found_group_by_group_as_well_as_at_once(count: int) -> None:
    parameters = faiss.ClusteringParameters()
    parameters.spherical, parameters.min_points_per_centroid, parameters.seed = True, 1, 3
    for given in (GIVEN, spread_out([9000], DIM, -0.5)[0]):
        found, again = (centroids(given, count, parameters) for _ in range(2))
        assert found.shape == (count, DIM) and np.allclose(
            np.linalg.norm(found, axis=1), 1, atol=1e-5
        )
        assert (found == again).all()
        at_once = faiss.Clustering(DIM, count, parameters)
        at_once.niter = 12
        at_once.train(given, faiss.IndexFlatIP(DIM))
        whole = faiss.vector_to_array(at_once.centroids).reshape(count, DIM)
        nearness = [float((given @ each.T).max(axis=1).mean()) for each in (found, whole)]
        assert nearness[0] > nearness[1] - 0.005


def test_cells_are_found_where_most_vectors_are_one() -> None:
    parameters = faiss.ClusteringParameters()
    parameters.spherical, parameters.min_points_per_centroid = True, 1
    given = np.concatenate([np.tile(GIVEN[:1], (900, 1)), GIVEN[:100]])
    assert np.isfinite(centroids(given, 100, parameters)).all()
    assert centroids(given, 1000, parameters).shape == (1000, DIM), "as many as vectors"

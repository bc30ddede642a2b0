"""Search returns k distinct pictures, best first, however often a picture stands in the index."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from indexing.index import Index, IndexConfig, build
from indexing.search import search, search_key
from infra.errors import CallerError
from tests.embedded import vectors, write_embed

COUNT, DIM, COPIES = 600, 32, 12


@pytest.fixture(scope="module", params=["Flat", "IVF15,Flat"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    faiss.omp_set_num_threads(1)
    embed, out = tmp_path_factory.mktemp("embed"), tmp_path_factory.mktemp("index")
    write_embed(embed, COUNT, DIM, copies=COPIES)
    build(IndexConfig(factory=request.param, queries=32), embed, out)
    return Index.open(out)


def test_a_picture_that_stands_twelve_times_is_found_once(index: Index) -> None:
    query = vectors(1, DIM, seed=8).astype(np.float32)
    found = search(index, query, 20)
    assert len({int(each["key"][1:]) // COPIES for each in found}) == len(found) == 20
    assert [each["score"] for each in found] == sorted((each["score"] for each in found), reverse=True)


def test_results_are_the_best_distinct_pictures(index: Index, tmp_path: Path) -> None:
    image = write_embed(tmp_path, COUNT, DIM, copies=COPIES).astype(np.float32)
    query = image[300:301]
    right = np.argsort(-(image[::COPIES] @ query[0]))[:3]
    assert [int(each["key"][1:]) // COPIES for each in search(index, query, 3)] == right.tolist()


def test_a_result_carries_its_own_metadata(index: Index) -> None:
    for each in search(index, vectors(1, DIM, seed=8), 5):
        number = int(each["key"][1:])
        assert each.keys() == {"key", "score", "caption", "url"}
        assert (each["caption"], each["url"]) == (f"picture {number}", f"https://example.org/{number}.png")
        assert type(each["score"]) is float


def test_more_than_there_are_gives_all_distinct_ones(index: Index) -> None:
    assert len(search(index, vectors(1, DIM, seed=8), 1000)) == COUNT // COPIES


def test_the_text_index_can_be_searched(index: Index) -> None:
    scores, _ = index.search(vectors(1, DIM, seed=8), 1, "text")
    assert search(index, vectors(1, DIM, seed=8), 1, "text")[0]["score"] == pytest.approx(float(scores[0, 0]))


@pytest.mark.parametrize("count", [0, 2])
def test_only_one_query_is_taken(index: Index, count: int) -> None:
    with pytest.raises(ValueError, match=f"one query, not {count}"):
        search(index, np.ones((count, DIM)), 5)


def test_more_like_a_sample_leaves_that_picture_out(index: Index, tmp_path: Path) -> None:
    image = write_embed(tmp_path, COUNT, DIM, copies=COPIES).astype(np.float32)
    own = 7 * COPIES + 5  # not the first copy of its picture
    right = np.argsort(-(image[::COPIES] @ image[own]))[1:5]
    found = search_key(index, f"k{own:06d}", 4)
    assert [int(each["key"][1:]) // COPIES for each in found] == right.tolist()


def test_a_key_that_is_not_there_is_a_callers_mistake(index: Index) -> None:
    with pytest.raises(CallerError, match="'nobody'"):
        search_key(index, "nobody", 4)

"""A view returns the best distinct pictures of all segments, without pairs that were taken down."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from indexing.ann.index import Index, IndexConfig, build
from indexing.ann.keys import NUMBER_BITS, number_of
from indexing.ann.view import Filter, Segment, View, make_filter
from infra.storage.removal_log import Removals
from tests.helpers.embed_folders import vectors, write_embed
from tests.helpers.stage_folders import shards_in

COUNT, DIM, COPIES = 600, 32, 12
QUERY = vectors(1, DIM, seed=8)[0].astype(np.float32)


@pytest.fixture(scope="module", params=["Flat", "IVF15,Flat"])
def view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> View:
    faiss.omp_set_num_threads(1)
    embed, out = tmp_path_factory.mktemp("embed"), tmp_path_factory.mktemp("index")
    write_embed(embed, COUNT, DIM, copies=COPIES)
    build(IndexConfig(factory=request.param, queries=32), embed, out)
    return View([Segment(Index.open(out), shards_in(embed))], Removals(), "clip")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return write_embed(tmp_path_factory.mktemp("again"), COUNT, DIM, copies=COPIES).astype(
        np.float32
    )


def pictures(hits: list) -> list[int]:
    return [int(hit.facts["key"][1:]) // COPIES for hit in hits]


def test_a_picture_with_twelve_rows_is_returned_once(view: View) -> None:
    found = view.search(QUERY, 20)
    assert len(set(pictures(found))) == len(found) == 20
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


def test_results_are_the_best_distinct_pictures(view: View, image: np.ndarray) -> None:
    right = np.argsort(-(image[::COPIES] @ image[300]))[:3]
    assert pictures(view.search(image[300], 3)) == right.tolist()


def test_a_hit_carries_its_own_metadata(view: View) -> None:
    for hit in view.search(QUERY, 5):
        number = int(hit.facts["key"][1:])
        assert (hit.facts["caption"], hit.facts["origin"]) == (
            f"picture {number}",
            f"https://example.org/{number}.png",
        )
        assert type(hit.score) is float and hit.row == number


def test_pages_follow_each_other_without_gap_or_repeat(view: View) -> None:
    whole = pictures(view.search(QUERY, 30))  # of copies any may be returned
    paged = [
        picture
        for offset in range(0, 30, 7)
        for picture in pictures(view.search(QUERY, 7, offset=offset))
    ]
    assert len(set(paged)) == len(paged) and len(set(whole) & set(paged[:30])) >= 28
    if view.segments[0].index.facts["factory"] == "Flat":
        assert paged[:30] == whole
    assert view.search(QUERY, 7, offset=10_000) == []


@pytest.mark.parametrize("factory", ["IVF60,SQ8", "RR32,IVF30,PQ8x4fs,Refine(SQ8)"])
@pytest.mark.parametrize("near", [None, 0.9])
def test_deep_pages_of_an_approximate_index_neither_repeat_nor_skip(
    tmp_path: Path, factory: str, near: float | None
) -> None:
    faiss.omp_set_num_threads(1)
    write_embed(tmp_path / "embed", 3000, DIM, copies=2)
    build(IndexConfig(factory=factory, queries=64), tmp_path / "embed", _folder(tmp_path / "index"))
    view = View([Segment(Index.open(tmp_path / "index"), shards_in(tmp_path))], Removals(), "clip")
    for query in vectors(4, DIM, seed=8).astype(np.float32):
        whole = {hit.facts["sha256"] for hit in view.search(query, 312, near=near)}
        pages = [view.search(query, 24, offset=offset, near=near) for offset in range(0, 312, 24)]
        paged = [hit.facts["sha256"] for page in pages for hit in page]
        assert (
            len(set(paged)) == len(paged) and len(whole) > 200 and abs(len(paged) - len(whole)) < 5
        )
        assert len(whole & set(paged)) > 0.85 * len(whole)
        assert all(
            [hit.score for hit in page] == sorted((hit.score for hit in page), reverse=True)
            for page in pages
        )


def test_a_search_among_copies_has_a_maximum_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss.omp_set_num_threads(1)
    write_embed(tmp_path / "embed", 3000, DIM, copies=3000)
    build(IndexConfig(factory="Flat", queries=2), tmp_path / "embed", _folder(tmp_path / "index"))
    view = View([Segment(Index.open(tmp_path / "index"), shards_in(tmp_path))], Removals(), "clip")
    monkeypatch.setattr("indexing.ann.view.FETCHED", 1024)
    monkeypatch.setattr("indexing.ann.view.FETCHED_APART", 256)
    fetched: list[int] = []
    search = Index.search
    monkeypatch.setattr(
        Index,
        "search",
        lambda self, vector, k, *more: fetched.append(k) or search(self, vector, k, *more),
    )
    assert len(view.search(QUERY, 5)) == 1 and fetched == [10, 64, 256, 1024]
    fetched.clear()
    assert len(view.search(QUERY, 5, near=0.9)) == 1 and fetched == [10, 64, 256]
    fetched.clear()
    assert len(view.search(QUERY, 24, offset=24)) == 0 and fetched == [24, 96, 384, 1024], (
        "the first fetch is as deep as a page"
    )


def test_facets_are_counted_once_for_a_version(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, counted = View(view.segments, Removals(), "clip"), []
    column = Index.column
    monkeypatch.setattr(
        Index, "column", lambda self, name: counted.append(name) or column(self, name)
    )
    assert fresh.facets() == fresh.facets() and len(counted) == len(set(counted))


def test_a_version_depends_on_the_content_alone(view: View) -> None:
    segment = view.segments[0]
    one, same = View([segment], Removals(), "clip"), View([segment], Removals(), "clip")
    removed = one.after(Removals(frozenset({"k000001"})))
    more = removed.after(Removals(frozenset({"k000001", "k000002"})))
    assert one.version == same.version == one.after(Removals(frozenset({"nobody"}))).version
    assert (
        len(
            {
                one.version,
                removed.version,
                more.version,
                View([segment], Removals(), "other").version,
            }
        )
        == 4
    )
    assert more.version == one.after(Removals(frozenset({"k000001", "k000002"}))).version, (
        "in one step or two"
    )
    assert more.after(Removals()).version == one.version, "an entry may be taken back"
    assert one.after(Removals()) is one


def test_a_large_k_returns_all_distinct_pictures(view: View) -> None:
    assert len(view.search(QUERY, 1000)) == COUNT // COPIES


def test_the_captions_can_be_searched(view: View) -> None:
    scores, _ = view.segments[0].index.search(QUERY[None], 1, "text")
    assert view.search(QUERY, 1, "text")[0].score == pytest.approx(float(scores[0, 0]))


def test_a_search_leaves_out_the_picture_it_came_from(view: View, image: np.ndarray) -> None:
    sample = view.find_key(f"k{7 * COPIES + 5:06d}")  # not the first copy of its picture
    assert sample is not None
    right = np.argsort(-(image[::COPIES] @ image[sample.row]))[1:5]
    assert (
        pictures(view.search(view.vector(sample), 4, without=frozenset({sample.facts["sha256"]})))
        == right.tolist()
    )


@pytest.mark.parametrize("field", ["keys", "origins", "stored_sha256"])
def test_rows_taken_down_are_left_out_and_the_next_best_moves_up(view: View, field: str) -> None:
    before = view.search(QUERY, 6)
    first = before[0].facts
    rows = range(before[0].row // COPIES * COPIES, before[0].row // COPIES * COPIES + COPIES)
    every = {
        "keys": {f"k{row:06d}" for row in rows},
        "origins": {f"https://example.org/{row}.png" for row in rows},
        "stored_sha256": {first["sha256"]},
    }
    after = view.after(Removals(**{field: frozenset(every[field])}))
    assert pictures(after.search(QUERY, 5)) == pictures(before)[1:]
    assert after.count == view.count - COPIES
    assert after.find_key(first["key"]) is None and after.find_number(number_of(first["key"])) == []
    assert view.search(QUERY, 6) == before, "a running query finishes on its version"


def test_a_filter_returns_what_brute_force_returns(tmp_path: Path) -> None:
    faiss.omp_set_num_threads(1)
    vectors_of = write_embed(tmp_path / "embed", COUNT, DIM).astype(np.float32)
    build(
        IndexConfig(factory="IVF15,Flat", queries=32),
        tmp_path / "embed",
        _folder(tmp_path / "index"),
    )
    view = View([Segment(Index.open(tmp_path / "index"), shards_in(tmp_path))], Removals(), "clip")
    styles = np.array(["plain" if row % 40 else "rare" for row in range(COUNT)])
    view.segments[0].index.column = lambda name: (
        _column(styles) if name == "style" else Index.column(view.segments[0].index, name)
    )  # type: ignore[method-assign]
    right = np.flatnonzero(styles == "rare")[np.argsort(-(vectors_of[styles == "rare"] @ QUERY))]
    rare = make_filter({"style": ["rare"]})
    assert [hit.row for hit in view.search(QUERY, 5, chosen=rare)] == right[:5].tolist()
    assert len(view.search(QUERY, 100, chosen=rare)) == (styles == "rare").sum()
    assert view.search(QUERY, 5, chosen=make_filter({"style": ["none"]})) == []
    assert view.search(QUERY, 5, chosen=Filter(min_side_px=9)) == [], "all sides are 8"
    assert len(view.search(QUERY, 5, chosen=Filter(min_side_px=8, max_side_px=8))) == 5
    assert view.facets()["style"] == {"plain": 585, "rare": 15}
    with pytest.raises(ValueError, match="cannot filter by 'shard'"):
        make_filter({"shard": ["x"]})


def test_of_near_copies_only_the_best_is_returned(view: View) -> None:
    found = view.search(QUERY, 50, near=0.6)
    vectors_of = np.stack([view.vector(hit) for hit in found])
    cosines = vectors_of @ vectors_of.T
    assert (cosines[np.triu_indices(len(found), 1)] < 0.6).all()
    assert pictures(found)[0] == pictures(view.search(QUERY, 1))[0]
    assert len(found) < 50


def test_two_segments_answer_as_one(tmp_path: Path) -> None:
    whole = write_embed(tmp_path / "embed", 400, DIM, parts=1)
    for part, rows in (("a", slice(0, 250)), ("b", slice(250, 400))):
        folder = _folder(tmp_path / part)
        write_embed(folder, 400, DIM, parts=1)
        _cut(folder, rows)
    for name in ("embed", "a", "b"):
        build(
            IndexConfig(factory="Flat", queries=8),
            tmp_path / name,
            _folder(tmp_path / f"{name}-index"),
        )
    segments = {
        name: Segment(Index.open(tmp_path / f"{name}-index"), shards_in(tmp_path))
        for name in ("embed", "a", "b")
    }
    one, two = (
        View([segments["embed"]], Removals(), "c"),
        View([segments["a"], segments["b"]], Removals(), "c"),
    )
    assert [hit.facts["key"] for hit in two.search(QUERY, 50)] == [
        hit.facts["key"] for hit in one.search(QUERY, 50)
    ]
    assert two.count == one.count == len(whole)
    hit = two.find_key("k000300")
    assert hit is not None and (hit.segment, hit.row) == (1, 50)


def test_a_keys_number_depends_on_the_key_alone(view: View) -> None:
    keys = [f"k{row:06d}" for row in range(COUNT)]
    numbers = [number_of(key) for key in keys]
    assert len(set(numbers)) == COUNT and all(0 <= number < 2**NUMBER_BITS for number in numbers)
    assert [view.find_number(number)[0].facts["key"] for number in numbers[::97]] == keys[::97]
    longer = [number_of(key) for key in ("k", "k0", "a key longer than eight bytes", "déjà vu")]
    assert len({*longer, *numbers}) == COUNT + 4
    assert view.find_key("nobody") is None and view.find_number(5) == []


def _folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _column(values: np.ndarray):  # type: ignore[no-untyped-def]
    return pa.chunked_array([values.tolist()], pa.string())


def _cut(folder: Path, rows: slice) -> None:
    import json

    import pyarrow.parquet as pq

    for name in ("img_emb", "text_emb"):
        file = folder / name / f"{name}_0000.npy"
        np.save(file, np.load(file)[rows])
    file = folder / "metadata" / "metadata_0000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(rows.start, rows.stop - rows.start), file)
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"count": rows.stop - rows.start}))

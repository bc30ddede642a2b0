"""Searching with an effort, and the least effort that reaches a recall."""

import faiss
import numpy as np
import pytest

from indexing.ann.tuning import (
    STEPS,
    Effort,
    Measured,
    Sample,
    Selection,
    _probed,
    brute_force,
    fewest_cells,
    recalls,
    search,
    tune,
)
from tests.helpers.embed_folders import KINDS, filled, spread_out, vectors

DIM = 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def test_other_queries_meet_the_target_as_well() -> None:
    """Tuned to the least effort that a sample allows, every other index would miss it; unclustered
    vectors make recall vary most.
    """
    indexed, *others = spread_out([6000, *[128] * 8, 2000], 48, -0.5)
    index = filled("IVF96,Flat", [indexed], 0)
    truth = brute_force([indexed], others[-1], 10)
    reached = []
    for sampled in others[:-1]:
        facts = tune(index, [indexed], [Sample(sampled, None)], 0.9)
        assert facts["target_met"] and facts["recall@10"] >= 0.9
        effort = Effort(facts["nprobe"], 0, facts["margin"])
        chosen = recalls(
            [indexed],
            sampled[::2],
            search(index, sampled[::2], 10, effort)[1],
            brute_force([indexed], sampled[::2], 10),
        )
        assert chosen.mean() - 1.645 * chosen.std() / 8 >= 0.9, (
            "one half chose with errors to spare"
        )
        judged = recalls(
            [indexed],
            sampled[1::2],
            search(index, sampled[1::2], 10, effort)[1],
            brute_force([indexed], sampled[1::2], 10),
        )
        assert judged.mean() == pytest.approx(facts["recall@10"], abs=1e-6), (
            "the other half measured"
        )
        reached.append(
            recalls([indexed], others[-1], search(index, others[-1], 10, effort)[1], truth).mean()
        )
    assert np.mean(np.array(reached) >= 0.9) > 0.8 and np.mean(reached) < 0.95


def test_a_query_that_finds_itself_does_not_count() -> None:
    indexed = vectors(300, DIM, seed=1).astype(np.float32)
    rows = np.arange(0, 300, 10)
    others = np.setdiff1d(np.arange(300), rows)
    shuffled = indexed.copy()
    shuffled[others] = indexed[
        np.roll(others, 1)
    ]  # every query is where it should be, its neighbours are not
    index = faiss.index_factory(DIM, "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(shuffled)
    facts = tune(index, [indexed], [Sample(indexed[rows], rows)], 0.9)
    assert facts["recall@1"] < 0.5 and not facts["target_met"]
    assert tune(index, [indexed], [Sample(indexed[rows], None)], 0.9)["recall@1"] == 1


@pytest.mark.parametrize("needed", [1, 5, 64, 100])
def test_the_fewest_cells_are_found_to_an_eighth(needed: int) -> None:
    cells, reached = fewest_cells(1, 100, 0.9, lambda cells: min(1.0, 0.9 * cells / needed))
    assert needed <= cells <= max(needed + 1, needed * 1.2)
    assert reached >= 0.9


def test_no_fewer_cells_are_tried_than_named() -> None:
    tried: list[int] = []
    assert fewest_cells(12, 24, 0.9, lambda cells: tried.append(cells) or 0.95) == (
        12,
        0.95,
    ) and tried == [12]
    assert (
        fewest_cells(12, 24, 0.9, lambda cells: tried.append(cells) or cells / 100) == (24, 0.24)
        and min(tried) == 12
    )


def test_cells_are_not_added_where_the_codes_lose_the_rest() -> None:
    tried: list[int] = []
    best = fewest_cells(1, 1 << 20, 0.9, lambda cells: tried.append(cells) or min(0.6, 0.2 * cells))
    assert best == (4, 0.6) and max(tried) <= 16


@pytest.mark.parametrize("factory", KINDS[1:])
def test_a_margin_gives_each_query_the_cells_that_are_near_it(factory: str) -> None:
    indexed, queries = (
        vectors(1500, DIM).astype(np.float32),
        vectors(60, DIM, seed=7).astype(np.float32),
    )
    index = filled(factory, [indexed], 0)
    wide = search(index, queries, 10, Effort(20, 8, 0.3))
    alone = [search(index, query[None], 10, Effort(20, 8, 0.3)) for query in queries]
    assert np.array_equal(wide[1], np.concatenate([rows for _, rows in alone])), (
        "together and one by one they find the same"
    )
    assert np.allclose(wide[0], np.concatenate([scores for scores, _ in alone]), atol=1e-6)
    fixed = {
        int(nprobe): search(index, queries, 10, Effort(int(nprobe), 8))
        for nprobe in STEPS[STEPS <= 20]
    }
    matching = [
        [nprobe for nprobe, (_, rows) in fixed.items() if (rows[at] == wide[1][at]).all()]
        for at in range(len(queries))
    ]
    assert all(matching), "every query gets what a fixed number of cells gives"
    assert np.array_equal(
        search(index, queries, 10, Effort(20, 8, 3.0))[1],
        search(index, queries, 10, Effort(20, 8))[1],
    )
    none = search(index, queries, 10, Effort(20, 8, 0.0))[1]
    few = np.mean(
        [(rows == expected).all() for rows, expected in zip(none, fixed[1][1], strict=True)]
    )
    assert few > 0.9, (
        "without a margin nearly all look into one cell, and further only for want of ten"
    )


def test_a_selection_looks_at_as_many_of_its_rows() -> None:
    indexed, queries = spread_out([3000, 60], DIM, -0.3)
    index = filled("IVF50,Flat", [indexed], 0)
    mask = np.arange(3000) % 10 == 0
    selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    truth = brute_force([indexed[mask]], queries, 10)
    reached = {}
    for share in (0.1, 1.0):
        scores, rows = search(index, queries, 10, Effort(8, 0, 0.15), Selection(selector, share))
        assert mask[rows].all()
        reached[share] = float((scores >= truth[:, -1:] - 1e-5).mean())
    assert reached[0.1] > 0.95 > reached[1.0] + 0.05


def test_a_margin_is_chosen_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the queries lie in tight clusters and need one cell, the others between all and need
    most: who gives all the same is slow.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(400, DIM))
    tight = centres[rng.integers(0, 400, 40_000)] + 0.05 * rng.normal(size=(40_000, DIM))
    loose = rng.normal(size=(20_000, DIM))
    indexed = np.concatenate([tight, loose]).astype(np.float32)
    indexed /= np.linalg.norm(indexed, axis=1, keepdims=True)
    rows = np.sort(rng.choice(len(indexed), 512, replace=False))
    index = filled("IVF400,Flat", [indexed], 0)
    # Cells stand for seconds here, which other processes change.
    monkeypatch.setattr(
        Measured,
        "seconds",
        lambda self, k, effort: _probed(self.index, indexed[rows], effort).astype(float).tolist(),
    )
    facts = tune(index, [indexed], [Sample(indexed[rows], rows)], 0.95)
    assert facts["target_met"] and facts["margin"] is not None

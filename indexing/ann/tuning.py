"""Searching a FAISS index of any of our kinds with given effort, its recall against brute force,
and the least effort for a recall.

Effort is the number of probed cells and of candidates re-ranked. It is chosen on one half of
sampled queries, with a margin for their number, and judged on the other half. Legend: B queries, N
vectors, D dimensions, k results.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.ann.faiss_layers import finer, layers, rotate
from indexing.data.embedding_store import Floats, Rows, chunks, take

DEPTHS = (1, 10, 100)
"""The k at which recall is measured; the middle one is held against the target."""
SAME_SCORE = 1e-5
"""Vectors whose exact scores differ by less are equally right answers: one caption may stand on
many pictures."""
K_FACTORS = (2, 4, 8, 16, 32, 64, 128)
"""Candidates that are re-ranked, as multiples of k."""
SATURATED = 0.002
"""Where doubling the probed cells gains less recall than this, what is missing is lost by the
codes."""
Z_SURE = 1.645
"""So many standard errors below the sampled recall the true one lies in one of twenty samples; a
second sample then has to agree."""
TIMED, ROUNDS = 64, 3
"""Queries that efforts are timed with, and how often each."""
MAX_RANKED = 4096
"""Candidates that a query re-ranks at most."""
THINNED = 4
"""Of many queries one of so many is asked for a hundred."""
WIDER = 2
"""So many times the cells that every query needs, where all have the same, may one of them look
into by a margin."""
HALVINGS = 6
"""Number of times that the range of a margin is halved."""
STEPS = np.unique(np.ceil(1.08 ** np.arange(320)).astype(np.int64))
"""Numbers of cells that a margin leads to."""


class Effort(NamedTuple):
    """Effort of a query: cells probed, candidates re-ranked, margin of scores."""

    nprobe: int
    """Cells looked into, at most; 0: there are none."""
    k_factor: float
    """Candidates re-ranked for each result; 0: none are."""
    margin: float | None = None
    """Cells are left out whose centroid scores less than the nearest one's by more than that; None:
    none are."""


class Selection(NamedTuple):
    """The rows that a search may return: a FAISS selector, and the share (0, 1] of all that it lets
    by.
    """

    selector: Any
    share: float


class Sample(NamedTuple):
    """Queries to tune with (B, D), and their own rows (B,) where they are vectors of the index: no
    query's finding itself counts.
    """

    vectors: Floats
    rows: Rows | None

    def part(self, first: int) -> "Sample":
        """Return every other query, from the first or the second on; the only one is in both."""
        return self.every(2, first if len(self.vectors) > 1 else 0)

    def every(self, step: int, first: int = 0) -> "Sample":
        """Return one of so many queries."""
        return Sample(
            self.vectors[first::step], None if self.rows is None else self.rows[first::step]
        )


def search(
    index: Any, queries: Floats, k: int, effort: Effort, selection: Selection | None = None
) -> tuple[Floats, Rows]:
    """Search with this effort, and with more cells where they hold fewer than k vectors; k is at
    most what the selection lets by.

    Of a selection as many rows are looked at as without one. Returns scores and rows, (B, k) each.
    Safe from several threads: the effort is of the query, not of the index.
    """
    if len(queries) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    selector = selection.selector if selection else None
    if effort.nprobe == 0:
        flat_params = faiss.SearchParameters()
        flat_params.sel = selector
        return cast(tuple[Floats, Rows], index.search(queries, k, params=flat_params))
    if isinstance(index, faiss.IndexPreTransform):
        index, queries = layers(index)[1], rotate(index, queries)
    inside = layers(index)
    kinds = tuple(type(layer) for layer in inside)
    k_factor = float(max(1, min(effort.k_factor, index.ntotal // k)))
    make = _parameters if selector is None else _parameters.__wrapped__

    def search_cells(part: Floats, nprobe: int) -> tuple[Floats, Rows]:
        return cast(
            tuple[Floats, Rows],
            index.search(part, k, params=make(kinds, nprobe, k_factor, selector)),
        )

    cell_count = inside[-1].nlist
    probed = _probed(index, queries, effort)
    if selection:
        probed = np.ceil(probed / selection.share).astype(np.int64)
    probed = np.minimum(probed, cell_count)
    if (probed == probed[0]).all():
        scores, rows = search_cells(queries, int(probed[0]))
    else:
        scores, rows = (
            np.empty((len(queries), k), np.float32),
            np.empty((len(queries), k), np.int64),
        )
        for nprobe in np.unique(probed):
            same = probed == nprobe
            scores[same], rows[same] = search_cells(queries[same], int(nprobe))
    for few in np.flatnonzero((rows < 0).any(axis=1)):
        nprobe = int(probed[few])
        while (rows[few] < 0).any():
            assert nprobe < cell_count, "with every cell probed every vector is found"
            nprobe = min(cell_count, 2 * nprobe)
            scores[few], rows[few] = (
                answer[0] for answer in search_cells(queries[few : few + 1], nprobe)
            )
    return scores, rows


def _probed(index: Any, queries: Floats, effort: Effort) -> Rows:
    """Return how many cells each query looks into (B,): few numbers, so that queries can be asked
    together.
    """
    if effort.margin is None:
        return np.full(len(queries), effort.nprobe)
    near = layers(index)[-1].quantizer.search(rotate(index, queries), effort.nprobe)[0]
    count = (near >= near[:, :1] - effort.margin).sum(axis=1)
    return np.minimum(STEPS[np.searchsorted(STEPS, count)], effort.nprobe)


@lru_cache(1024)
def _parameters(kinds: tuple[type, ...], nprobe: int, k_factor: float, selector: Any) -> Any:
    """Return FAISS's parameters for a search: to make them takes as long as looking into some
    cells.
    """
    # whose type stubs do not know that parameters take arguments, which keeps alive what they are
    # given
    faiss_module: Any = faiss
    params = faiss_module.SearchParametersIVF(nprobe=nprobe, sel=selector)
    for kind in kinds[-2::-1]:
        if kind is faiss.IndexRefine:
            params = faiss_module.IndexRefineSearchParameters(
                k_factor=k_factor, base_index_params=params
            )
        else:
            params = faiss_module.SearchParametersPreTransform(index_params=params)
    return params


def brute_force(parts: Sequence[NDArray[Any]], queries: Floats, k: int) -> Floats:
    """Return the k best exact scores (B, k), best first."""
    best = np.empty((len(queries), 0), np.float32)
    for chunk in chunks(parts):
        best = np.concatenate([best, queries @ chunk.T], axis=1)
        best = -np.partition(-best, min(k, best.shape[1]) - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1)


def recalls(parts: Sequence[NDArray[Any]], queries: Floats, rows: Rows, truth: Floats) -> Floats:
    """Return each query's share (B,) of found rows (B, k) that score, exactly, no less than the
    k-th best of `truth` (B, >= k).
    """
    exact = np.einsum("bd,bkd->bk", queries, take(parts, rows))
    return np.asarray((exact >= truth[:, rows.shape[1] - 1, None] - SAME_SCORE).mean(1), np.float32)


class Measured:
    """Recall of an index on samples of queries, against brute force over `parts`; the worst of the
    samples counts.
    """

    def __init__(
        self, index: Any, parts: Sequence[NDArray[Any]], samples: Sequence[Sample]
    ) -> None:
        """Compute the truth of every query."""
        self.index, self.parts, self.samples = index, parts, samples
        skips = [int(sample.rows is not None) for sample in samples]
        # Of the scores of a vector of the index the best is its own.
        self.truth = [
            brute_force(parts, sample.vectors, max(DEPTHS) + skip)[:, skip:]
            for sample, skip in zip(samples, skips, strict=True)
        ]

    def recall(self, k: int, effort: Effort, z: float = 0.0) -> float:
        """Return the recall@k, less `z` of its standard errors."""
        worst = 1.0
        for sample, truth in zip(self.samples, self.truth, strict=True):
            wanted = min(k, truth.shape[1])
            if wanted == 0:  # an index of one vector has no other
                continue
            measured = recalls(
                self.parts, sample.vectors, self._search_sample(sample, wanted, effort), truth
            )
            worst = min(worst, float(measured.mean() - z * measured.std() / len(measured) ** 0.5))
        return worst

    def thinned(self) -> "Measured":
        """Return the same with every fourth query, of many: a hundred results say more of a query
        than ten do, and take longer.
        """
        thinned_copy = copy.copy(self)
        steps = [THINNED if len(sample.vectors) > THINNED * TIMED else 1 for sample in self.samples]
        thinned_copy.samples = [
            sample.every(step) for sample, step in zip(self.samples, steps, strict=True)
        ]
        thinned_copy.truth = [
            neighbours[::step] for neighbours, step in zip(self.truth, steps, strict=True)
        ]
        return thinned_copy

    def seconds(self, k: int, effort: Effort) -> list[float]:
        """Return what some of the queries take, one by one."""
        queries = self._all_queries()
        taken = []
        for query in queries[:: max(1, len(queries) // TIMED)]:
            started = time.perf_counter()
            search(self.index, query[None], min(k, self.index.ntotal), effort)
            taken.append(time.perf_counter() - started)
        return taken

    def span(self, nprobe: int) -> float:
        """Return the margin with which every query looks into that many cells."""
        near = layers(self.index)[-1].quantizer.search(
            rotate(self.index, self._all_queries()), nprobe
        )[0]
        return float((near[:, 0] - near[:, -1]).max())

    def _all_queries(self) -> Floats:
        return np.concatenate([sample.vectors for sample in self.samples])

    def _search_sample(self, sample: Sample, k: int, effort: Effort) -> Rows:
        if sample.rows is None:
            return search(self.index, sample.vectors, k, effort)[1]
        _, rows = search(
            self.index,
            sample.vectors,
            k + 1,
            effort._replace(k_factor=effort.k_factor * k / (k + 1)),
        )
        is_other = rows != sample.rows[:, None]
        is_other[is_other.all(1), -1] = (
            False  # where it is not among them, the last one is too many
        )
        return rows[is_other].reshape(len(rows), k)


def tune(
    index: Any, parts: Sequence[NDArray[Any]], samples: Sequence[Sample], target: float
) -> dict[str, Any]:
    """Find the effort that reaches the target recall@10 in the least time, for each of several
    samples of queries; measure there.

    The same for recall@100, told as "deep": who wants more than ten needs more cells. The other
    half of the samples judges, and the recall that is told is its own, with the effort for that
    many. Where no effort reaches the target, the best recall wins. nprobe is 0 for Flat, k_factor 0
    where nothing is re-ranked.
    """
    tuning, judging = (
        Measured(index, parts, [sample.part(half) for sample in samples]) for half in (0, 1)
    )
    best = least_effort(tuning, judging, DEPTHS[1], target)
    deep = least_effort(tuning.thinned(), judging.thinned(), DEPTHS[2], target)
    taken_ms = np.array(tuning.seconds(DEPTHS[1], best)) * 1000
    figures = {f"recall@{k}": judging.recall(k, effort_for(k, best, deep)) for k in DEPTHS}
    return {
        **best._asdict(),
        "deep": deep._asdict(),
        "target_met": figures[f"recall@{DEPTHS[1]}"] >= target,
        **figures,
        "latency_p50_ms": round(float(np.percentile(taken_ms, 50)), 4),
        "latency_p99_ms": round(float(np.percentile(taken_ms, 99)), 4),
    }


def effort_for(k: int, few: Effort, many: Effort) -> Effort:
    """Return the effort for k results, of those for ten and for a hundred; nobody re-ranks fewer
    candidates than ten results have.

    Between the two the cells grow by a power of k: what is missing of the recall is then about the
    same.
    """
    if k <= DEPTHS[1]:
        effort = few
    elif k >= DEPTHS[2]:
        effort = many
    else:
        share = math.log(k / DEPTHS[1]) / math.log(DEPTHS[2] / DEPTHS[1])
        cells, ranked = (
            a ** (1 - share) * b**share
            for a, b in ((few.nprobe, many.nprobe), (few.k_factor, many.k_factor))
        )
        margin = (
            None
            if few.margin is None or many.margin is None
            else few.margin + share * (many.margin - few.margin)
        )
        effort = Effort(round(cells), ranked, margin)
    return effort._replace(k_factor=max(effort.k_factor, few.k_factor * DEPTHS[1] / k))


def least_effort(tuning: Measured, judging: Measured, k: int, target: float) -> Effort:
    """Return the effort that reaches the target recall@k in the least time.

    Queries of the other modality lie far from all vectors and need more cells, so the worst sample
    counts. For every k_factor, the largest first, the fewest cells that do are found by doubling
    and halving, and the least margin that does where a query may look into WIDER times as many;
    with Z_SURE standard errors to spare, or the target would be missed on other queries as often as
    it is met. The fastest of these efforts wins, and gets more cells where the queries that judge
    miss the target still.
    """
    index = tuning.index
    if isinstance(index, faiss.IndexFlat):
        return Effort(0, 0)
    cells = int(layers(index)[-1].nlist)
    saturated_from = -(
        -4 * k * cells // index.ntotal
    )  # in fewer there may be no k vectors, and more are looked into anyhow

    def surely(effort: Effort) -> float:
        return tuning.recall(k, effort, Z_SURE)

    def of_cells(k_factor: int, nprobe: int) -> float:
        return surely(Effort(nprobe, k_factor))

    highest_k_factor, *less_ranked = (
        [k_factor for k_factor in K_FACTORS[::-1] if k_factor * k <= MAX_RANKED]
        if finer(index)
        else [0]
    )
    nprobe, reached = fewest_cells(
        1, cells, target, partial(of_cells, highest_k_factor), saturated_from
    )
    enough = [Effort(nprobe, highest_k_factor)]
    if reached < target:
        return enough[0]
    for k_factor in less_ranked:
        fewest = enough[-1].nprobe
        nprobe, reached = fewest_cells(
            fewest, min(cells, WIDER * fewest), target, partial(of_cells, k_factor)
        )
        if reached < target:
            break  # with less re-ranked still it takes more cells than that saves
        if nprobe == fewest:
            enough.pop()  # which re-ranks more, and looks into as many
        enough.append(Effort(nprobe, k_factor))
    for candidate_effort in tuple(enough):
        widest = min(cells, WIDER * candidate_effort.nprobe)
        enough.append(
            _least_margin(
                Effort(widest, candidate_effort.k_factor, tuning.span(widest)), target, surely
            )
        )
    # In turns, and candidate_effort query's best round: another process that takes the cores for a
    # while slows all of them.
    rounds = [[tuning.seconds(k, effort) for effort in enough] for _ in range(ROUNDS)]
    best = enough[int(np.min(rounds, axis=0).mean(axis=1).argmin())]
    while best.nprobe < cells and judging.recall(k, best) < target:
        wider = None if best.margin is None else best.margin * 1.05
        best = Effort(min(cells, best.nprobe + max(1, best.nprobe // 8)), best.k_factor, wider)
    return best


def _least_margin(widest: Effort, target: float, recall_of: Callable[[Effort], float]) -> Effort:
    """Return the effort with the least margin whose recall reaches the target, up to that of
    `widest`, with which it does.
    """
    low, high = 0.0, widest.margin or 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if recall_of(widest._replace(margin=middle)) >= target else (middle, high)
        )
    return widest._replace(margin=high)


def fewest_cells(
    least: int,
    highest: int,
    target: float,
    recall_of: Callable[[int], float],
    saturated_from: int = 1,
) -> tuple[int, float]:
    """Return the least number of cells, `least` to `most`, whose recall reaches the target, to an
    eighth, and that recall.

    Where none does, the number with the best recall: no more are tried once doubling from
    `saturated_from` cells or more gains next to nothing.
    """
    tried: dict[int, float] = {}
    cells, before = least, 0.0
    while True:
        tried[cells] = recall_of(cells)
        if tried[cells] >= target:
            break
        if cells == highest or (
            cells >= 2 * saturated_from and tried[cells] > 0.5 and tried[cells] - before < SATURATED
        ):
            return max(tried.items(), key=lambda tried_cell: tried_cell[1])
        cells, before = min(highest, 2 * cells), tried[cells]
    low, high = max((cell for cell in tried if tried[cell] < target), default=least - 1), cells
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        tried[middle] = recall_of(middle)
        low, high = (low, middle) if tried[middle] >= target else (middle, high)
    return high, tried[high]

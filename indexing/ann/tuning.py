"""Searches a FAISS index with a given effort, measures its recall against brute force, and finds
the least effort that reaches a recall.

Effort is the number of probed cells and of re-ranked candidates. One half of the sampled queries
chooses it, with some standard errors to spare; the other half measures the recall. Legend: B
queries, N vectors, D dimensions, k results.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, NotRequired, cast

import faiss
import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from indexing.ann.faiss_layers import finer, layers, rotate
from indexing.data.embedding_store import Floats, Rows, chunks, take

DEPTHS = (1, 10, 100)
"""The k at which recall is measured; the target applies to the middle one."""
SAME_SCORE = 1e-5
"""Vectors whose exact scores differ by less are equally right answers: many pictures may have the
same caption."""
K_FACTORS = (2, 4, 8, 16, 32, 64, 128)
"""Candidates that are re-ranked, as multiples of k."""
SATURATED = 0.002
"""Where doubling the probed cells gains less recall than this, the codes lose the rest."""
Z_SURE = 1.645
"""Standard errors by which the sampled recall must exceed the target: in one of twenty samples the
true recall is still below it, so a second sample has to agree."""
TIMED, ROUNDS = 64, 3
"""Number of queries that time an effort, and how often each one is timed."""
MAX_RANKED = 4096
"""Maximum number of candidates that a query re-ranks."""
THINNED = 4
"""Of many queries, one of so many measures recall@100."""
WIDER = 2
"""With a margin, a query may probe so many times the cells that are enough without one."""
HALVINGS = 6
"""Number of times that the range of the margin is halved."""
STEPS = np.unique(np.ceil(1.08 ** np.arange(320)).astype(np.int64))
"""Numbers of cells that a query with a margin may probe."""


class EffortFacts(TypedDict):
    """An `Effort` in index.json."""

    nprobe: int
    k_factor: float
    margin: NotRequired[float | None]


Recalls = TypedDict("Recalls", {"recall@1": float, "recall@10": float, "recall@100": float})
"""Recall against brute force, by number of results (DEPTHS)."""


class Latencies(TypedDict):
    """Milliseconds that a query takes."""

    latency_p50_ms: float
    latency_p99_ms: float


class Tuned(EffortFacts, Recalls, Latencies):
    """A tuned index: its effort for ten results, recalls and latencies."""

    deep: EffortFacts
    """The effort for a hundred results."""
    target_met: bool


class Effort(NamedTuple):
    """Effort of a query: probed cells, re-ranked candidates, margin of scores."""

    nprobe: int
    """Maximum number of probed cells; 0 for an index without cells."""
    k_factor: float
    """Re-ranked candidates for each result; 0 for an index that re-ranks nothing."""
    margin: float | None = None
    """A cell is skipped where its centroid scores lower than the best one by more than this; None
    skips none."""

    @property
    def facts(self) -> EffortFacts:
        """The fields as index.json holds them."""
        return {"nprobe": self.nprobe, "k_factor": self.k_factor, "margin": self.margin}


class Selection(NamedTuple):
    """The rows that a search may return: a FAISS selector, and their share (0, 1] of all rows."""

    selector: Any
    share: float


class Sample(NamedTuple):
    """Queries to tune with (B, D), and their rows (B,) where they are vectors of the index: a query
    that finds itself does not count.
    """

    vectors: Floats
    rows: Rows | None

    def part(self, first: int) -> "Sample":
        """Return every second query, from number `first` (0 or 1) on; a single query is in both
        halves.
        """
        return self.every(2, first if len(self.vectors) > 1 else 0)

    def every(self, step: int, first: int = 0) -> "Sample":
        """Return every `step`-th query, from number `first` on."""
        return Sample(
            self.vectors[first::step], None if self.rows is None else self.rows[first::step]
        )


def search(
    index: Any, queries: Floats, k: int, effort: Effort, selection: Selection | None = None
) -> tuple[Floats, Rows]:
    """Search with this effort; return scores and rows, (B, k) each, best first.

    `k` is at most the number of rows that may be returned. More cells are probed where the probed
    ones hold fewer than k vectors. With a selection as many selected rows are looked at as rows
    without one. Safe from several threads: the effort belongs to the query, not to the index.
    """
    if len(queries) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    if effort.nprobe == 0:
        flat_params = faiss.SearchParameters()
        flat_params.sel = selection.selector if selection else None
        return cast(tuple[Floats, Rows], index.search(queries, k, params=flat_params))
    if isinstance(index, faiss.IndexPreTransform):
        index, queries = layers(index)[1], rotate(index, queries)
    cells = _Cells(index, k, effort, selection)
    probed = _probed(index, queries, effort)
    if selection:
        probed = np.ceil(probed / selection.share).astype(np.int64)
    probed = np.minimum(probed, cells.count)
    scores, rows = cells.search_groups(queries, probed)
    cells.search_deeper(queries, probed, scores, rows)
    return scores, rows


class _Cells:
    """Searches of one index of cells for k results, with a number of probed cells for each query;
    vectors are already rotated.
    """

    def __init__(self, index: Any, k: int, effort: Effort, selection: Selection | None) -> None:
        inside = layers(index)
        self.index, self.k, self.count = index, k, int(inside[-1].nlist)
        self.kinds = tuple(type(layer) for layer in inside)
        self.k_factor = float(max(1, min(effort.k_factor, index.ntotal // k)))
        self.selector = selection.selector if selection else None

    def search(self, queries: Floats, nprobe: int) -> tuple[Floats, Rows]:
        """Search with the same number of cells for all queries."""
        if self.selector is None:
            params = _cached_parameters(self.kinds, nprobe, self.k_factor)
        else:
            params = _parameters(self.kinds, nprobe, self.k_factor, self.selector)
        return cast(tuple[Floats, Rows], self.index.search(queries, self.k, params=params))

    def search_groups(self, queries: Floats, probed: Rows) -> tuple[Floats, Rows]:
        """Search with `probed` (B,) cells for each query, queries with equal numbers together."""
        if (probed == probed[0]).all():
            return self.search(queries, int(probed[0]))
        scores = np.empty((len(queries), self.k), np.float32)
        rows = np.empty((len(queries), self.k), np.int64)
        for nprobe in np.unique(probed):
            same = probed == nprobe
            scores[same], rows[same] = self.search(queries[same], int(nprobe))
        return scores, rows

    def search_deeper(self, queries: Floats, probed: Rows, scores: Floats, rows: Rows) -> None:
        """Search the queries again, in place, whose cells held fewer than k vectors (row -1), with
        more and more cells.
        """
        for number in np.flatnonzero((rows < 0).any(axis=1)):
            nprobe = int(probed[number])
            while (rows[number] < 0).any():
                assert nprobe < self.count, "with every cell probed every vector is found"
                nprobe = min(self.count, 2 * nprobe)
                query_scores, query_rows = self.search(queries[number : number + 1], nprobe)
                scores[number], rows[number] = query_scores[0], query_rows[0]


def _probed(index: Any, queries: Floats, effort: Effort) -> Rows:
    """Return the number of cells to probe for each query (B,); numbers are rounded up to STEPS, so
    that many queries share one.
    """
    if effort.margin is None:
        return np.full(len(queries), effort.nprobe)
    near = layers(index)[-1].quantizer.search(rotate(index, queries), effort.nprobe)[0]
    count = (near >= near[:, :1] - effort.margin).sum(axis=1)
    return np.minimum(STEPS[np.searchsorted(STEPS, count)], effort.nprobe)


@lru_cache(1024)
def _cached_parameters(kinds: tuple[type, ...], nprobe: int, k_factor: float) -> Any:
    """Return FAISS's parameters for a search of all rows; making them anew for every query would
    take as long as probing some cells.
    """
    return _parameters(kinds, nprobe, k_factor, None)


def _parameters(kinds: tuple[type, ...], nprobe: int, k_factor: float, selector: Any) -> Any:
    """Return FAISS's parameters for a search of an index whose layers have these types, outermost
    first.
    """
    # `Any`: FAISS's type stubs do not know the constructors' keyword arguments. Only objects that
    # are passed as arguments are kept alive by the parameters; attributes that are set are not.
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
    """Return each query's share (B,) of its rows (B, k) whose exact score is no less than the k-th
    best of `truth` (B, >= k), less SAME_SCORE.
    """
    exact = np.einsum("bd,bkd->bk", queries, take(parts, rows))
    return np.asarray((exact >= truth[:, rows.shape[1] - 1, None] - SAME_SCORE).mean(1), np.float32)


class Measured:
    """Recall of an index on samples of queries, against brute force over `parts`; the worst sample
    counts.
    """

    def __init__(
        self, index: Any, parts: Sequence[NDArray[Any]], samples: Sequence[Sample]
    ) -> None:
        """Compute the best exact scores of every query."""
        self.index, self.parts, self.samples = index, parts, samples
        skips = [int(sample.rows is not None) for sample in samples]
        # The best score of a vector of the index is its score with itself.
        self.truth = [
            brute_force(parts, sample.vectors, max(DEPTHS) + skip)[:, skip:]
            for sample, skip in zip(samples, skips, strict=True)
        ]

    def recall(self, k: int, effort: Effort, z: float = 0.0) -> float:
        """Return the recall@k, less `z` of its standard errors."""
        worst = 1.0
        for sample, truth in zip(self.samples, self.truth, strict=True):
            wanted = min(k, truth.shape[1])
            if wanted == 0:  # the index holds no vector but the query
                continue
            rows = self._search_sample(sample, wanted, effort)
            measured = recalls(self.parts, sample.vectors, rows, truth)
            worst = min(worst, float(measured.mean() - z * measured.std() / len(measured) ** 0.5))
        return worst

    def thinned(self) -> "Measured":
        """Return a copy with every fourth query where there are many: for recall@100 fewer queries
        are enough, and each takes longer.
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
        """Return the seconds that about TIMED of the queries take, searched one by one."""
        queries = self._all_queries()
        taken = []
        for query in queries[:: max(1, len(queries) // TIMED)]:
            started = time.perf_counter()
            search(self.index, query[None], min(k, self.index.ntotal), effort)
            taken.append(time.perf_counter() - started)
        return taken

    def span(self, nprobe: int) -> float:
        """Return the least margin with which every query probes `nprobe` cells."""
        near = layers(self.index)[-1].quantizer.search(
            rotate(self.index, self._all_queries()), nprobe
        )[0]
        return float((near[:, 0] - near[:, -1]).max())

    def _all_queries(self) -> Floats:
        return np.concatenate([sample.vectors for sample in self.samples])

    def _search_sample(self, sample: Sample, k: int, effort: Effort) -> Rows:
        if sample.rows is None:
            return search(self.index, sample.vectors, k, effort)[1]
        same_ranked = effort._replace(k_factor=effort.k_factor * k / (k + 1))
        _, rows = search(self.index, sample.vectors, k + 1, same_ranked)
        is_other = rows != sample.rows[:, None]
        is_other[is_other.all(1), -1] = False  # a query that did not find itself loses the last row
        return rows[is_other].reshape(len(rows), k)


def tune(
    index: Any, parts: Sequence[NDArray[Any]], samples: Sequence[Sample], target: float
) -> Tuned:
    """Find the effort that reaches the target recall@10 in the least time on all samples; return it
    with its recalls and latencies.

    "deep" is the effort for the target recall@100: more results need more cells. One half of each
    sample chooses the efforts, the other half measures the reported recalls, each with the effort
    for its k. Where no effort reaches the target, the one with the best recall is returned. nprobe
    is 0 for Flat, k_factor 0 where nothing is re-ranked.
    """
    tuning, judging = (
        Measured(index, parts, [sample.part(half) for sample in samples]) for half in (0, 1)
    )
    best = least_effort(tuning, judging, DEPTHS[1], target)
    deep = least_effort(tuning.thinned(), judging.thinned(), DEPTHS[2], target)
    taken_ms = np.array(tuning.seconds(DEPTHS[1], best)) * 1000
    at_1, at_10, at_100 = (judging.recall(k, effort_for(k, best, deep)) for k in DEPTHS)
    return {
        **best.facts,
        "deep": deep.facts,
        "target_met": at_10 >= target,
        "recall@1": at_1,
        "recall@10": at_10,
        "recall@100": at_100,
        "latency_p50_ms": round(float(np.percentile(taken_ms, 50)), 4),
        "latency_p99_ms": round(float(np.percentile(taken_ms, 99)), 4),
    }


def effort_for(k: int, few: Effort, many: Effort) -> Effort:
    """Return the effort for k results, between `few` (for ten) and `many` (for a hundred).

    Between ten and a hundred results, cells and candidates grow as a power of k, which loses about
    the same share of the recall for every k. At least as many candidates are re-ranked as for ten.
    """
    if k <= DEPTHS[1]:
        effort = few
    elif k >= DEPTHS[2]:
        effort = many
    else:
        share = math.log(k / DEPTHS[1]) / math.log(DEPTHS[2] / DEPTHS[1])
        cells = few.nprobe ** (1 - share) * many.nprobe**share
        k_factor = few.k_factor ** (1 - share) * many.k_factor**share
        margin = None
        if few.margin is not None and many.margin is not None:
            margin = few.margin + share * (many.margin - few.margin)
        effort = Effort(round(cells), k_factor, margin)
    return effort._replace(k_factor=max(effort.k_factor, few.k_factor * DEPTHS[1] / k))


def least_effort(tuning: Measured, judging: Measured, k: int, target: float) -> Effort:
    """Return the effort that reaches the target recall@k in the least time.

    The worst sample counts: queries of the other modality lie far from all vectors and need more
    cells. Candidates are the efforts of `_efforts_without_margin`, and each of them with more cells
    and a margin. They reach the target with Z_SURE standard errors to spare, or other queries would
    miss it as often as they meet it. The fastest candidate wins, and gets more cells while the
    judging queries still miss the target.
    """
    index = tuning.index
    if isinstance(index, faiss.IndexFlat):
        return Effort(0, 0)
    cells = int(layers(index)[-1].nlist)
    efforts, is_reached = _efforts_without_margin(tuning, k, target)
    if not is_reached:
        return efforts[0]
    for effort in tuple(efforts):
        widest = min(cells, WIDER * effort.nprobe)
        wide = Effort(widest, effort.k_factor, tuning.span(widest))
        efforts.append(_least_margin(wide, target, partial(_sure_recall, tuning, k)))
    best = _fastest(tuning, k, efforts)
    while best.nprobe < cells and judging.recall(k, best) < target:
        wider = None if best.margin is None else best.margin * 1.05
        best = Effort(min(cells, best.nprobe + max(1, best.nprobe // 8)), best.k_factor, wider)
    return best


def _efforts_without_margin(tuning: Measured, k: int, target: float) -> tuple[list[Effort], bool]:
    """Return the efforts that reach the target, one for each useful k_factor with the fewest cells,
    the largest k_factor first; and whether any effort reaches it.

    Where none does, the only effort is the one with the best recall.
    """
    index = tuning.index
    cells = int(layers(index)[-1].nlist)
    k_factors = [k_factor for k_factor in K_FACTORS[::-1] if k_factor * k <= MAX_RANKED]
    highest_k_factor, *lower_k_factors = k_factors if finer(index) else [0]

    def recall_with(k_factor: int, nprobe: int) -> float:
        return _sure_recall(tuning, k, Effort(nprobe, k_factor))

    # Fewer cells than this may hold fewer than k vectors, and then the search probes more anyway.
    saturated_from = -(-4 * k * cells // index.ntotal)
    nprobe, recall = fewest_cells(
        1, cells, target, partial(recall_with, highest_k_factor), saturated_from
    )
    efforts = [Effort(nprobe, highest_k_factor)]
    if recall < target:
        return efforts, False
    for k_factor in lower_k_factors:
        fewest = efforts[-1].nprobe
        most = min(cells, WIDER * fewest)
        nprobe, recall = fewest_cells(fewest, most, target, partial(recall_with, k_factor))
        if recall < target:
            break  # with even less re-ranking, more cells cost more than that saves
        if nprobe == fewest:
            efforts.pop()  # it re-ranks more and probes as many cells
        efforts.append(Effort(nprobe, k_factor))
    return efforts, True


def _sure_recall(tuning: Measured, k: int, effort: Effort) -> float:
    return tuning.recall(k, effort, Z_SURE)


def _fastest(tuning: Measured, k: int, efforts: Sequence[Effort]) -> Effort:
    """Return the effort with the lowest mean time a query.

    Efforts take turns and each query's best round counts, because another process may take the
    cores for a while.
    """
    rounds = [[tuning.seconds(k, effort) for effort in efforts] for _ in range(ROUNDS)]
    return efforts[int(np.min(rounds, axis=0).mean(axis=1).argmin())]


def _least_margin(widest: Effort, target: float, recall_of: Callable[[Effort], float]) -> Effort:
    """Return the effort with the least margin that reaches the target; `widest` reaches it with its
    own margin.
    """
    low, high = 0.0, widest.margin or 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if recall_of(widest._replace(margin=middle)) >= target:
            high = middle
        else:
            low = middle
    return widest._replace(margin=high)


def fewest_cells(
    least: int,
    highest: int,
    target: float,
    recall_of: Callable[[int], float],
    saturated_from: int = 1,
) -> tuple[int, float]:
    """Return the least number of cells, from `least` to `highest`, that reaches the target recall,
    within an eighth of it, and its recall.

    Where none reaches it, return the number with the best recall. Doubling stops once it gains less
    than SATURATED from `saturated_from` cells or more.
    """
    tried: dict[int, float] = {}
    cells, before = least, 0.0
    while True:
        tried[cells] = recall_of(cells)
        if tried[cells] >= target:
            break
        is_saturated = cells >= 2 * saturated_from and tried[cells] - before < SATURATED
        if cells == highest or (is_saturated and tried[cells] > 0.5):
            best = max(tried, key=lambda number: tried[number])
            return best, tried[best]
        cells, before = min(highest, 2 * cells), tried[cells]
    low, high = max((cell for cell in tried if tried[cell] < target), default=least - 1), cells
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        tried[middle] = recall_of(middle)
        if tried[middle] >= target:
            high = middle
        else:
            low = middle
    return high, tried[high]

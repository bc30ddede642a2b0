"""Searching a FAISS index of any of our kinds with given effort, its recall against brute force, and the least effort for a recall.

Effort is the number of probed cells and of candidates re-ranked. It is chosen on one half of sampled queries, with a margin for their
number, and judged on the other half. Legend: B queries, N vectors, D dimensions, k results.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Floats, Rows, chunks, take

DEPTHS = (1, 10, 100)
"""The k at which recall is measured; the middle one is held against the target."""
SAME_SCORE = 1e-5
"""Vectors whose exact scores differ by less are equally right answers: one caption may stand on many pictures."""
K_FACTORS = (2, 4, 8, 16, 32, 64, 128)
"""How many times k are re-ranked, where anything is."""
SATURATED = 0.002
"""Where doubling the probed cells gains less recall than this, what is missing is lost by the codes."""
Z_SURE = 1.2816
"""So many standard errors below the sampled recall the true one lies in one of ten samples; a second sample then has to agree."""
TIMED, ROUNDS = 64, 3
"""Queries that efforts are timed with, and how often each."""


class Effort(NamedTuple):
    """What a query may spend: cells looked into (0: there are none), and candidates re-ranked for each result (0: none are)."""

    nprobe: int
    k_factor: float


class Sample(NamedTuple):
    """Queries to tune with (B, D), and their own rows (B,) where they are vectors of the index: no query's finding itself counts."""

    vectors: Floats
    rows: Rows | None

    def part(self, first: int) -> "Sample":
        """Return every other query, from the first or the second on; the only one is in both."""
        some = slice(first if len(self.vectors) > 1 else 0, None, 2)
        return Sample(self.vectors[some], None if self.rows is None else self.rows[some])


def search(index: Any, queries: Floats, k: int, effort: Effort, selector: Any = None) -> tuple[Floats, Rows]:
    """Search with this effort, and with more cells where they hold fewer than k vectors; k is at most what the selector lets by.

    Returns scores and rows, (B, k) each. Safe from several threads: the effort is of the query, not of the index.
    """
    if len(queries) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    if effort.nprobe == 0:
        flat_params = faiss.SearchParameters()
        flat_params.sel = selector
        return cast(tuple[Floats, Rows], index.search(queries, k, params=flat_params))
    k_factor = float(max(1, min(effort.k_factor, index.ntotal // k))) if effort.k_factor else 0.0
    is_rotated = k_factor > 0 and isinstance(faiss.downcast_index(index.base_index), faiss.IndexPreTransform)
    make = _parameters if selector is None else _parameters.__wrapped__
    params = make(effort.nprobe, k_factor, is_rotated, selector)
    scores, rows = index.search(queries, k, params=params)
    short = (rows < 0).any(axis=1)
    if short.any():
        cells = faiss.extract_index_ivf(index).nlist
        assert effort.nprobe < cells, "with every cell probed every vector is found"
        more = Effort(min(cells, 2 * effort.nprobe), effort.k_factor)
        scores[short], rows[short] = search(index, queries[short], k, more, selector)
    return scores, rows


@lru_cache(256)
def _parameters(nprobe: int, k_factor: float, is_rotated: bool, selector: Any) -> Any:
    """Return FAISS's parameters for a search: to make them takes as long as looking into some cells."""
    made: Any = faiss  # whose type stubs do not know that parameters take arguments, which keeps alive what they are given
    cells = made.SearchParametersIVF(nprobe=nprobe, sel=selector)
    if not k_factor:
        return cells
    base = made.SearchParametersPreTransform(index_params=cells) if is_rotated else cells
    return made.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=base)


def brute_force(parts: Sequence[NDArray[Any]], queries: Floats, k: int) -> Floats:
    """Return the k best exact scores (B, k), best first."""
    best = np.empty((len(queries), 0), np.float32)
    for chunk in chunks(parts):
        best = np.concatenate([best, queries @ chunk.T], axis=1)
        best = -np.partition(-best, min(k, best.shape[1]) - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1)


def recalls(parts: Sequence[NDArray[Any]], queries: Floats, rows: Rows, truth: Floats) -> Floats:
    """Return each query's share (B,) of found rows (B, k) that score, exactly, no less than the k-th best of `truth` (B, >= k)."""
    exact = np.einsum("bd,bkd->bk", queries, take(parts, rows))
    return np.asarray((exact >= truth[:, rows.shape[1] - 1, None] - SAME_SCORE).mean(1), np.float32)


class Measured:
    """Recall of an index on samples of queries, against brute force over `parts`; the worst of the samples counts."""

    def __init__(self, index: Any, parts: Sequence[NDArray[Any]], samples: Sequence[Sample]) -> None:
        """Compute the truth of every query."""
        self.index, self.parts, self.samples = index, parts, samples
        own = [int(each.rows is not None) for each in samples]
        # Of the scores of a vector of the index the best is its own.
        self.truth = [brute_force(parts, each.vectors, max(DEPTHS) + skip)[:, skip:] for each, skip in zip(samples, own, strict=True)]

    def recall(self, k: int, effort: Effort, z: float = 0.0) -> float:
        """Return the recall@k, less `z` of its standard errors."""
        worst = 1.0
        for sample, truth in zip(self.samples, self.truth, strict=True):
            wanted = min(k, truth.shape[1])
            if wanted == 0:  # an index of one vector has no other
                continue
            found = recalls(self.parts, sample.vectors, self._found(sample, wanted, effort), truth)
            worst = min(worst, float(found.mean() - z * found.std() / len(found) ** 0.5))
        return worst

    def _found(self, sample: Sample, k: int, effort: Effort) -> Rows:
        if sample.rows is None:
            return search(self.index, sample.vectors, k, effort)[1]
        _, rows = search(self.index, sample.vectors, k + 1, Effort(effort.nprobe, effort.k_factor * k / (k + 1)))
        is_other = rows != sample.rows[:, None]
        is_other[is_other.all(1), -1] = False  # where it is not among them, the last one is too many
        return rows[is_other].reshape(len(rows), k)


def tune(index: Any, parts: Sequence[NDArray[Any]], samples: Sequence[Sample], target: float) -> dict[str, Any]:
    """Find the effort that reaches the target recall@10 in the least time, for each of several samples of queries; measure there.

    Queries of the other modality lie far from all vectors and need more cells, so the worst sample counts. For every k_factor the fewest
    cells that do are found by doubling and halving, on one half of each sample and with Z_SURE standard errors to spare, or the target
    would be missed on other queries as often as it is met; the fastest of these pairs wins. The other half judges: it gets more cells
    where it misses the target still, and the recall that is told is its own. Where no effort reaches the target, the best recall wins.
    nprobe is 0 for Flat, k_factor 0 where nothing is re-ranked.
    """
    tuning, judging = (Measured(index, parts, [each.part(half) for each in samples]) for half in (0, 1))
    k = DEPTHS[1]

    def surely(k_factor: int, cells: int) -> float:
        return tuning.recall(k, Effort(cells, k_factor), Z_SURE)

    asked = np.concatenate([each.vectors for each in samples])
    timed = asked[:: max(1, len(asked) // TIMED)]

    def seconds(effort: Effort) -> list[float]:
        taken = []
        for query in timed:
            started = time.perf_counter()
            search(index, query[None], min(k, index.ntotal), effort)
            taken.append(time.perf_counter() - started)
        return taken

    if isinstance(index, faiss.IndexFlat):
        best = Effort(0, 0)
    else:
        cells = most = int(faiss.extract_index_ivf(index).nlist)
        found = []
        for k_factor in K_FACTORS if isinstance(index, faiss.IndexRefine) else (0,):
            nprobe, reached = fewest_cells(most, target, partial(surely, k_factor))
            found.append((Effort(nprobe, k_factor), reached))
            if reached >= target:
                most = nprobe  # who re-ranks more and looks into as many cells is slower
        enough = [effort for effort, reached in found if reached >= target]
        # In turns, and the best round of each: another process that takes the cores for a while slows all of them.
        rounds = [[float(np.median(seconds(each))) for each in enough] for _ in range(ROUNDS)]
        best = enough[int(np.min(rounds, axis=0).argmin())] if enough else max(found, key=lambda each: each[1])[0]
        while enough and best.nprobe < cells and judging.recall(k, best) < target:
            best = Effort(min(cells, best.nprobe + max(1, best.nprobe // 8)), best.k_factor)
    taken_ms = np.array(seconds(best)) * 1000
    told = {f"recall@{depth}": judging.recall(depth, best) for depth in DEPTHS}
    return {
        "nprobe": best.nprobe,
        "k_factor": best.k_factor,
        "target_met": told[f"recall@{k}"] >= target,
        **told,
        "latency_p50_ms": round(float(np.percentile(taken_ms, 50)), 4),
        "latency_p99_ms": round(float(np.percentile(taken_ms, 99)), 4),
    }


def fewest_cells(most: int, target: float, recall_of: Callable[[int], float]) -> tuple[int, float]:
    """Return the least number of cells, 1 to `most`, whose recall reaches the target, to an eighth, and that recall.

    Where none does, the number with the best recall: no more are tried once doubling gains next to nothing.
    """
    tried: dict[int, float] = {}
    cells, before = 1, 0.0
    while True:
        tried[cells] = recall_of(cells)
        if tried[cells] >= target:
            break
        if cells == most or (before > 0 and tried[cells] > 0.5 and tried[cells] - before < SATURATED):
            return max(tried.items(), key=lambda each: each[1])
        cells, before = min(most, 2 * cells), tried[cells]
    low, high = max((each for each in tried if tried[each] < target), default=0), cells
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        tried[middle] = recall_of(middle)
        low, high = (low, middle) if tried[middle] >= target else (middle, high)
    return high, tried[high]

"""Searching a FAISS index of any of our kinds with given effort, its recall against brute force, and the least effort for a recall.

Effort is the number of probed cells and of candidates re-ranked. Legend: B queries, N vectors, D dimensions, k results.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Floats, Rows, chunks, take

DEPTHS = (1, 10, 100)
"""The k at which recall is measured; the middle one is held against the target."""
SAME_SCORE = 1e-5
"""Vectors whose exact scores differ by less are equally right answers: one caption may stand on many pictures."""
K_FACTORS = (2, 4, 8, 16, 32, 64)
"""How many times k are re-ranked, where anything is."""
SATURATED = 0.002
"""Where doubling the probed cells gains less recall than this, what is missing is lost by the codes."""
TIMED = 64


class Effort(NamedTuple):
    """What a query may spend: cells looked into (0: there are none), and candidates re-ranked for each result (0: none are)."""

    nprobe: int
    k_factor: int


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
    cells = faiss.extract_index_ivf(index).nlist
    cell_params = faiss.SearchParametersIVF()
    cell_params.nprobe, cell_params.sel = effort.nprobe, selector
    params: Any = cell_params
    if effort.k_factor:
        params = faiss.IndexRefineSearchParameters()
        params.k_factor = float(max(1, min(effort.k_factor, index.ntotal // k)))
        params.base_index_params = cell_params
        if isinstance(faiss.downcast_index(index.base_index), faiss.IndexPreTransform):
            rotated = faiss.SearchParametersPreTransform()
            rotated.index_params = cell_params
            params.base_index_params = rotated
    scores, rows = index.search(queries, k, params=params)
    short = (rows < 0).any(axis=1)
    if short.any():
        assert effort.nprobe < cells, "with every cell probed every vector is found"
        more = Effort(min(cells, 2 * effort.nprobe), effort.k_factor)
        scores[short], rows[short] = search(index, queries[short], k, more, selector)
    return scores, rows


def brute_force(parts: Sequence[NDArray[Any]], queries: Floats, k: int) -> Floats:
    """Return the k best exact scores (B, k), best first."""
    best = np.empty((len(queries), 0), np.float32)
    for chunk in chunks(parts):
        best = np.concatenate([best, queries @ chunk.T], axis=1)
        best = -np.partition(-best, min(k, best.shape[1]) - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1)


def recall(parts: Sequence[NDArray[Any]], queries: Floats, rows: Rows, truth: Floats) -> float:
    """Return the share of the found rows (B, k) that score, exactly, no less than the k-th best of `truth` (B, >= k)."""
    exact = np.einsum("bd,bkd->bk", queries, take(parts, rows))
    return float((exact >= truth[:, rows.shape[1] - 1, None] - SAME_SCORE).mean())


def tune(index: Any, parts: Sequence[NDArray[Any]], queries: Sequence[Floats], target: float) -> dict[str, Any]:
    """Find the effort that reaches the target recall@10 in the least time, for each of several kinds of queries; measure there.

    Queries of the other modality lie far from all vectors and need more cells, so the worst kind counts. For every k_factor the fewest
    cells that do are found by doubling and halving; the fastest of these pairs wins. Where none reaches the target, the best recall
    does. nprobe is 0 for Flat, k_factor 0 where nothing is re-ranked.
    """
    truth = [brute_force(parts, each, max(DEPTHS)) for each in queries]
    k = min(DEPTHS[1], index.ntotal)

    def recall_at(k: int, effort: Effort) -> float:
        k = min(k, index.ntotal)
        found = (search(index, each, k, effort)[1] for each in queries)
        return min(recall(parts, each, rows, right) for each, rows, right in zip(queries, found, truth, strict=True))

    def recall_of(k_factor: int, cells: int) -> float:
        return recall_at(k, Effort(cells, k_factor))

    asked = np.concatenate(queries)
    timed = asked[:: max(1, len(asked) // TIMED)]

    def seconds(effort: Effort) -> list[float]:
        taken = []
        for query in timed:
            started = time.perf_counter()
            search(index, query[None], k, effort)
            taken.append(time.perf_counter() - started)
        return taken

    if isinstance(index, faiss.IndexFlat):
        found = [(Effort(0, 0), recall_at(k, Effort(0, 0)))]
    else:
        found, most = [], int(faiss.extract_index_ivf(index).nlist)
        for k_factor in K_FACTORS if isinstance(index, faiss.IndexRefine) else (0,):
            nprobe, reached = fewest_cells(most, target, partial(recall_of, k_factor))
            found.append((Effort(nprobe, k_factor), reached))
            if reached >= target:
                most = nprobe  # who re-ranks more and looks into as many cells is slower
    enough = [effort for effort, reached in found if reached >= target]
    best = min(enough, key=lambda each: float(np.median(seconds(each)))) if enough else max(found, key=lambda each: each[1])[0]
    taken_ms = np.array(seconds(best)) * 1000
    return {
        "nprobe": best.nprobe,
        "k_factor": best.k_factor,
        "target_met": dict(found)[best] >= target,
        **{f"recall@{depth}": recall_at(depth, best) for depth in DEPTHS},
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

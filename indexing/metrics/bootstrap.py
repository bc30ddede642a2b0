"""Figures with their 95 % intervals: a mean over samples that hang together in groups, and how sure
one can be of it.

A figure is {"value", "low", "high", "n", "groups", ...}: n samples in so many independent groups.
Drawings of one concept by several hands are no independent samples, so whole groups are resampled.
Legend: N samples, G groups, R resamples.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959964
RESAMPLES_AT_ONCE = 256

Figure = dict[str, Any]


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent trials (Wilson 1927); it has a width at
    0 and at 1 as well.
    """
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def mean_figure(
    values: ArrayLike, groups: ArrayLike, resamples: int, seed: int, **more: Any
) -> Figure:
    """Return the mean of `values` (N,) with the bootstrap's 95 % interval over whole groups (N
    labels); `more` joins the figure.

    Where all groups agree on 0 or 1, resampling them would give no width: then it is Wilson's
    interval of as many trials as there are groups. No samples give a value of None; one group that
    is not at 0 or 1 gives no interval.
    """
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return {"value": None, "low": None, "high": None, "n": 0, "groups": 0, **more}
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(group, numbers), np.bincount(group)  # (G,)
    value, count = float(numbers.mean()), len(sizes)
    low: float | None = None
    high: float | None = None
    if value in (0.0, 1.0) and np.isin(numbers, (0, 1)).all():
        low, high = wilson(value, count)
    elif count > 1:
        weights = _resampled(count, resamples, seed)
        low, high = _middle_95(
            np.concatenate([(weight @ sums) / (weight @ sizes) for weight in weights])
        )
    return {"value": value, "low": low, "high": high, "n": len(numbers), "groups": count, **more}


def class_mean_figure(
    hits: ArrayLike, classes: ArrayLike, groups: ArrayLike, resamples: int, seed: int, **more: Any
) -> Figure:
    """Return the mean over classes of each class's share of `hits` (N,), so that a rare class
    counts as much as a common one.

    Interval as in mean_figure; a class that a resample misses is left out of that resample.
    """
    numbers = np.asarray(hits, np.float64)
    if not len(numbers):
        return {"value": None, "low": None, "high": None, "n": 0, "groups": 0, **more}
    _, label = np.unique(np.asarray(classes), return_inverse=True)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    pairs, pair = np.unique(
        np.stack([group, label]), axis=1, return_inverse=True
    )  # which groups hold which classes
    right, sizes = np.bincount(pair, numbers), np.bincount(pair).astype(np.float64)

    def mean_over_classes(times: NDArray[Any]) -> float:
        drawn = np.bincount(pairs[1], times * sizes)
        return float((np.bincount(pairs[1], times * right)[drawn > 0] / drawn[drawn > 0]).mean())

    value, count = mean_over_classes(np.ones(len(sizes))), int(group.max()) + 1
    low: float | None = None
    high: float | None = None
    if value in (0.0, 1.0):
        low, high = wilson(value, count)
    elif count > 1:
        weights = np.concatenate(_resampled(count, resamples, seed))
        low, high = _middle_95(np.array([mean_over_classes(draw[pairs[0]]) for draw in weights]))
    return {"value": value, "low": low, "high": high, "n": len(numbers), "groups": count, **more}


def set_figure(
    distance: Callable[[NDArray[Any], NDArray[Any]], float],
    groups: ArrayLike,
    other_groups: ArrayLike | None,
    resamples: int,
    seed: int,
    **more: Any,
) -> Figure:
    """Return a distance between two sets with the bootstrap's 95 % interval; `distance(u, v)` takes
    how often each sample counts.

    Whole groups of the one set, N labels, are drawn, and of the other one its own, M labels; None
    says that the sets belong together sample by sample (a caption's real picture and its drawing),
    and are drawn together. Samples that stand in a set twice bring most distances nearer or further
    by themselves, so the bounds are moved by as much as the resamples' mean lies off the value.
    """
    sums_of, at = (
        np.unique(np.asarray(group_list), return_inverse=True)[1]
        if group_list is not None
        else None
        for group_list in (groups, other_groups)
    )
    assert sums_of is not None
    count, n = int(sums_of.max()) + 1, len(sums_of)
    value = distance(np.ones(n), np.ones(n if at is None else len(at)))
    low: float | None = None
    high: float | None = None
    if min(count, int(at.max()) + 1 if at is not None else count) > 2:
        drawn = np.concatenate(_resampled(count, resamples, seed)).astype(np.float64)
        others = (
            drawn
            if at is None
            else np.concatenate(_resampled(int(at.max()) + 1, resamples, seed + 1)).astype(
                np.float64
            )
        )
        means = np.array(
            [
                distance(u[sums_of], v[sums_of if at is None else at])
                for u, v in zip(drawn, others, strict=True)
                if min(np.count_nonzero(u), np.count_nonzero(v)) > 1
            ]
        )
        low, high = _middle_95(means + (value - means.mean()))
    return {"value": value, "low": low, "high": high, "n": n, "groups": count, **more}


def _resampled(count: int, resamples: int, seed: int) -> list[NDArray[np.float32]]:
    """Return how often each group is drawn, (R, G) in several pieces."""
    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    pieces = [
        min(RESAMPLES_AT_ONCE, resamples - start)
        for start in range(0, resamples, RESAMPLES_AT_ONCE)
    ]
    return [rng.multinomial(count, even, size=piece).astype(np.float32) for piece in pieces]


def _middle_95(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

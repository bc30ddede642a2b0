"""Figures with 95 % bootstrap intervals: means and distances of samples that belong to groups.

A figure counts n samples in a number of independent groups. Several drawings of one concept are not
independent samples, so whole groups are resampled.
Legend: N samples, G groups, R resamples.
"""

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.959964
"""The 97.5th percentile of the standard normal distribution."""
RESAMPLES_AT_ONCE = 256


class FigureNotes(TypedDict, total=False):
    """What may be added to a figure."""

    unit: str
    """Default: share, where 0.5 is 50 %; another name is a scale of its own."""
    chance: float | None
    """Accuracy of a uniform guess."""
    majority: float | None
    """Accuracy of always naming the most frequent class."""


class Figure(FigureNotes):
    """A mean or distance over n samples in `groups` independent groups, with its 95 % interval."""

    value: float | None
    low: float | None
    """This and `high` are both None where there is no interval."""
    high: float | None
    n: int
    groups: int


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent trials (Wilson 1927); its width is
    positive even for shares of 0 and 1.
    """
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def mean_figure(
    values: ArrayLike, groups: ArrayLike, resamples: int, seed: int, **more: Unpack[FigureNotes]
) -> Figure:
    """Return the mean of `values` (N,) with its 95 % bootstrap interval over whole groups (N
    labels); `more` is added to the figure.

    Where all values are 0 or all are 1, resampling gives no width: the interval is then Wilson's,
    with a trial for each group. Without samples the value is None. A single group has no interval
    unless its values are all 0 or all 1.
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
    hits: ArrayLike,
    classes: ArrayLike,
    groups: ArrayLike,
    resamples: int,
    seed: int,
    **more: Unpack[FigureNotes],
) -> Figure:
    """Return the mean over classes of each class's share of `hits` (N,): a rare class counts as
    much as a common one.

    The interval is that of mean_figure; a resample without a class leaves that class out.
    """
    numbers = np.asarray(hits, np.float64)
    if not len(numbers):
        return {"value": None, "low": None, "high": None, "n": 0, "groups": 0, **more}
    _, label = np.unique(np.asarray(classes), return_inverse=True)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    # The (group, class) pairs that occur, and the pair of each sample.
    pairs, pair = np.unique(np.stack([group, label]), axis=1, return_inverse=True)
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
    **more: Unpack[FigureNotes],
) -> Figure:
    """Return a distance between two sets with its 95 % bootstrap interval; `distance(u, v)` takes
    the number of times that each sample counts (N,) and (M,).

    Whole groups are resampled: of the first set by N labels, of the other set by its own M labels.
    `other_groups` = None means that the sets are paired sample by sample (a caption's real and
    generated picture): both are then resampled together. Repeated samples bias most distances, so
    the bounds are shifted by the difference of the value and the resamples' mean.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    other_group = group
    if other_groups is not None:
        _, other_group = np.unique(np.asarray(other_groups), return_inverse=True)
    n, count, other_count = len(group), int(group.max()) + 1, int(other_group.max()) + 1
    value = distance(np.ones(n), np.ones(len(other_group)))
    low: float | None = None
    high: float | None = None
    if min(count, other_count) > 2:
        draws = np.concatenate(_resampled(count, resamples, seed)).astype(np.float64)
        other_draws = draws
        if other_groups is not None:
            resampled = _resampled(other_count, resamples, seed + 1)
            other_draws = np.concatenate(resampled).astype(np.float64)
        distances = np.array(
            [
                distance(u[group], v[other_group])
                for u, v in zip(draws, other_draws, strict=True)
                if min(np.count_nonzero(u), np.count_nonzero(v)) > 1
            ]
        )
        low, high = _middle_95(distances + (value - distances.mean()))
    return {"value": value, "low": low, "high": high, "n": n, "groups": count, **more}


def _resampled(count: int, resamples: int, seed: int) -> list[NDArray[np.float32]]:
    """Return how often each resample draws each group: (R, G) in pieces of RESAMPLES_AT_ONCE."""
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

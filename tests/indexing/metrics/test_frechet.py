"""Distances are their closed forms and brute-force sums, 0 for equal sets, and grow with what is
changed.
"""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from indexing.metrics import frechet
from indexing.metrics.bootstrap import set_figure


def test_frechet_is_the_closed_form_and_that_of_the_matrix_root() -> None:
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)),
        rng.normal(size=(300, 4)) * [1, 2, 3, 4] + 1,
    )
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        s_x + s_y - 2 * sqrtm(s_x @ s_y).real
    )
    assert frechet.frechet(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet.frechet(x, x + 2) == pytest.approx(4 * 4)  # a shift alone
    many = rng.normal(size=(4000, 3))
    assert frechet.frechet(many, 3 * many) == pytest.approx(
        np.trace(np.cov(many.T)) * 4 + (2 * many.mean(0) ** 2).sum() * 2, rel=0.02
    )


def test_the_kernel_distance_is_its_double_sum_and_unbiased() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 0.5
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = lambda a: np.mean(  # noqa: E731
        [k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
    )
    expected = pairs(x) + pairs(y) - 2 * np.mean([[k(a, b) for b in y] for a in x])
    assert frechet.kernel_distance(x, y) == pytest.approx(expected)
    same = [frechet.kernel_distance(*rng.normal(size=(2, 40, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200) and min(same) < 0


def test_cmmd_is_its_double_sum() -> None:
    rng = np.random.default_rng(0)
    x, y = (
        each / np.linalg.norm(each, axis=1, keepdims=True)
        for each in (rng.normal(size=(6, 4)), rng.normal(size=(5, 4)))
    )
    k = lambda a, b: np.exp(-((a - b) ** 2).sum() / 200)  # noqa: E731
    mean = lambda a, b: np.mean([[k(p, q) for q in b] for p in a])  # noqa: E731
    assert frechet.cmmd(x, y) == pytest.approx(
        1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-6
    )
    assert frechet.cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_tell_quality_from_diversity() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2))
    narrow = 0.1 * rng.normal(size=(200, 2))
    inside, covered = frechet.precision_recall(real, narrow)
    assert inside.mean() > 0.95 and covered.mean() < 0.3
    inside, covered = frechet.precision_recall(real, real + 100)
    assert not inside.any() and not covered.any()
    line = np.arange(6.0)[
        :, None
    ]  # each ball reaches to the third nearest: 2 in the middle, 3 at the ends
    inside, covered = frechet.precision_recall(line, np.array([[-3.0], [-3.1], [2.5], [50.0]]))
    assert inside.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="each set must have more than k = 3"):
        frechet.precision_recall(line[:3], line)


DISTANCES = {
    "frechet": frechet.frechet_of,
    "kernel_distance": frechet.kernel_distance_of,
    "cmmd": frechet.cmmd_of,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_a_picture_that_counts_twice_is_as_one_that_stands_there_twice(name: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(7, 4)) + 1
    u, v = np.array([2, 1, 1, 0, 1, 1, 3, 1, 1]), np.array([1, 0, 2, 1, 1, 1, 1])
    counted = DISTANCES[name](x, y)(u.astype(float), v.astype(float))
    if name == "kernel_distance":  # all pairs but those of a picture with itself
        k = lambda a, b: (a @ b / 4 + 1) ** 3  # noqa: E731
        within = [
            sum(c[i] * c[j] * k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)
            / (c.sum() ** 2 - (c**2).sum())
            for z, c in ((x, u), (y, v))
        ]
        across = sum(u[i] * v[j] * k(x[i], y[j]) for i in range(9) for j in range(7)) / (
            u.sum() * v.sum()
        )
        assert counted == pytest.approx(sum(within) - 2 * across)
    else:
        assert counted == pytest.approx(
            getattr(frechet, name)(np.repeat(x, u, 0), np.repeat(y, v, 0))
        )


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dims", [4, 96])
def test_the_interval_of_a_distance_is_as_wide_as_fresh_samples_differ(
    name: str, dims: int
) -> None:
    rng = np.random.default_rng(3)

    def sets() -> tuple[np.ndarray, np.ndarray]:
        x, y = rng.normal(size=(2, 48, dims)) * np.linspace(0.5, 1.5, dims)
        return x / np.sqrt(dims), (0.8 * y + 0.8) / np.sqrt(dims)

    values = [DISTANCES[name](*sets())(np.ones(48), np.ones(48)) for _ in range(200)]
    widths = []
    for trial in range(8):
        figure = set_figure(DISTANCES[name](*sets()), range(48), range(48), 200, trial)
        assert (
            figure["low"] < figure["value"] < figure["high"]
            and figure["n"] == figure["groups"] == 48
        )
        widths.append(figure["high"] - figure["low"])
    ratio = np.mean(widths) / (2 * 1.96 * np.std(values))
    assert (
        0.75 < ratio < (1.6 if (name, dims) == ("frechet", 96) else 1.3)
    )  # wide where there are fewer pictures than dimensions


def test_sets_that_belong_together_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * 5
    y = x + 0.01 * rng.normal(size=(40, 3)) + 1
    together, apart = (
        set_figure(frechet.frechet_of(x, y), range(40), other, 200, 0)
        for other in (None, range(40))
    )
    assert together["value"] == apart["value"] and together["high"] - together["low"] < 0.1 * (
        apart["high"] - apart["low"]
    )
    often = set_figure(
        frechet.frechet_of(np.repeat(x, 5, 0), np.repeat(y + x, 5, 0)),
        np.repeat(range(40), 5),
        None,
        200,
        0,
    )
    once = set_figure(frechet.frechet_of(x, y + x), range(40), None, 200, 0)
    assert often["groups"] == 40 and often["high"] - often["low"] == pytest.approx(
        once["high"] - once["low"], rel=0.1
    )
    two = set_figure(frechet.frechet_of(x, y), np.repeat([0, 1], 20), None, 200, 0)
    assert two["low"] is None and two["high"] is None

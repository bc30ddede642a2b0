"""Intervals are those of independent formulas, and samples of one group count as one."""

import numpy as np
import pytest
from scipy import stats

from indexing.metrics.bootstrap import class_mean_figure, mean_figure, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 30), (7, 30), (30, 30), (500, 10_000)])
def test_wilson_agrees_with_scipy(hits: int, n: int) -> None:
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_the_bootstrap_of_independent_samples_has_the_normal_width() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    figure = mean_figure(values, range(2000), 4000, seed=1)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert figure["value"] == pytest.approx(values.mean())
    assert (figure["low"], figure["high"]) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert (figure["n"], figure["groups"]) == (2000, 2000)


def test_copies_of_a_sample_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).random(100) < 0.4
    once = mean_figure(values, range(100), 2000, seed=1)
    often = mean_figure(np.repeat(values, 20), np.repeat(np.arange(100), 20), 2000, seed=1)
    assert (often["low"], often["high"], often["groups"]) == pytest.approx(
        (once["low"], once["high"], once["groups"])
    )
    assert often["n"] == 2000
    assert mean_figure(np.repeat(values, 20), range(2000), 2000, seed=1)["low"] > once["low"]


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(300):
        shares = rng.beta(2, 3, 60)  # groups of four whose shares differ; the mean over all is 0.4
        hits = (rng.random((60, 4)) < shares[:, None]).ravel()
        figure = mean_figure(hits, np.repeat(np.arange(60), 4), 400, trial)
        held += figure["low"] <= 0.4 <= figure["high"]
    assert 0.9 <= held / 300 <= 0.985


def test_groups_of_unequal_size_do_not_widen_the_interval() -> None:
    sizes = np.random.default_rng(0).integers(1, 30, 50)
    hits = np.concatenate(
        [[0, 1] * size for size in sizes]
    )  # half of every group, whatever its size
    figure = mean_figure(hits, np.repeat(np.arange(50), 2 * sizes), 500, seed=0)
    assert (figure["low"], figure["high"]) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_unanimous_groups_still_have_a_width(value: float) -> None:
    figure = mean_figure([value] * 40, np.repeat(np.arange(10), 4), 500, seed=0)
    assert (figure["low"], figure["high"]) == wilson(value, 10)
    assert figure["high"] - figure["low"] > 0.2


def test_no_samples_and_a_single_group_have_no_interval() -> None:
    assert mean_figure([], [], 500, 0, chance=0.1) == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "groups": 0,
        "chance": 0.1,
    }
    alone = mean_figure([0, 1, 1], ["a", "a", "a"], 500, 0)
    assert (alone["value"], alone["low"], alone["high"]) == (pytest.approx(2 / 3), None, None)
    assert class_mean_figure([], [], [], 500, 0)["value"] is None


def test_the_class_mean_gives_classes_equal_weights() -> None:
    hits, classes = [1] * 90 + [0] * 10, ["common"] * 90 + ["rare"] * 10
    figure = class_mean_figure(hits, classes, range(100), 1000, seed=0)
    assert figure["value"] == 0.5
    mixed = np.random.default_rng(3).random(200) < 0.3
    one_class = class_mean_figure(mixed, ["x"] * 200, range(200), 2000, seed=4)
    plain = mean_figure(mixed, range(200), 2000, seed=4)
    assert (one_class["value"], one_class["low"], one_class["high"]) == pytest.approx(
        (plain["value"], plain["low"], plain["high"]), abs=1e-6
    )


def test_the_class_mean_of_a_resample_leaves_out_missing_classes() -> None:
    # Two groups, a class each: a resample holds both (0.5), only the right one (1) or only the
    # wrong one (0).
    figure = class_mean_figure([1, 0], ["a", "b"], ["g", "h"], 2000, seed=0)
    assert (figure["value"], figure["low"], figure["high"]) == (0.5, 0.0, 1.0)

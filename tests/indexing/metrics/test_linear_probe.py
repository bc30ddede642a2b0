"""The probe is scikit-learn's logistic regression, its sweep and its draws keep to their own
half.
"""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from indexing.metrics import linear_probe


def blobs(
    n: int = 120, d: int = 6, classes: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (
        np.random.default_rng(9).normal(size=(classes, d))[labels] * 1.5 + rng.normal(size=(n, d))
    ).astype(np.float32), labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_the_probe_equals_scikit_learns_logistic_regression(penalty: float) -> None:
    x, y = blobs()
    weights = linear_probe.fit(x, y, 3, penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=5000).fit(x, y)
    ours = weights - weights.mean(1, keepdims=True)
    assert np.allclose(ours[:-1].T, theirs.coef_ - theirs.coef_.mean(0), atol=2e-2)
    assert (linear_probe.predict(x, weights) == theirs.predict(x)).mean() > 0.99


def test_a_probe_learns_and_a_penalty_shrinks_it() -> None:
    x, y = blobs(400)
    train, judged = linear_probe.halves(y, 0)
    assert linear_probe.right(x, y, train, judged, 3, 1e-3).mean() > 0.8
    assert (
        np.abs(linear_probe.fit(x, y, 3, 1.0)[:-1]).sum()
        < np.abs(linear_probe.fit(x, y, 3, 1e-4)[:-1]).sum() / 3
    )


def test_the_sweep_takes_a_strong_penalty_where_features_are_noise() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    x = rng.normal(size=(60, 200)).astype(np.float32)
    x[:, 0] += 3 * y
    assert linear_probe.sweep(x, y, 2, 0) >= 1e-2


def test_halves_and_draws() -> None:
    y = np.array([0] * 10 + [1] * 5 + [2])
    train, judged = linear_probe.halves(y, 0)
    assert (
        sorted([*train, *judged]) == list(range(16))
        and np.bincount(y[train]).tolist() == [5, 2]
        and 15 in judged
    )
    drawn = linear_probe.few(y, 3, 0)
    assert np.bincount(y[drawn]).tolist() == [3, 3, 1] and not np.array_equal(
        drawn, linear_probe.few(y, 3, 1)
    )


def test_the_rotation_changes_no_probe() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 90)).astype(np.float32), rng.integers(0, 3, 40)
    train, other = linear_probe.standardised(x[:30], x[30:])
    assert train.shape[1] <= 30 and other.shape[1] == train.shape[1]
    mean, scale = x[:30].mean(0), np.sqrt(((x[:30] - x[:30].mean(0)) ** 2).mean())
    plain, plain_other = (x[:30] - mean) / scale, (x[30:] - mean) / scale
    logits = [
        a @ w[:-1] + w[-1]
        for a, w in (
            (other, linear_probe.fit(train, y[:30], 3, 0.1)),
            (plain_other, linear_probe.fit(plain, y[:30], 3, 0.1)),
        )
    ]
    assert np.allclose(
        logits[0] - logits[0].mean(1, keepdims=True),
        logits[1] - logits[1].mean(1, keepdims=True),
        atol=5e-3,
    )


def test_standardising_uses_the_training_rows_alone() -> None:
    train, other = linear_probe.standardised(
        np.array([[1.0, 3], [3, 7], [2, 5]], np.float32), np.array([[2.0, 5]], np.float32)
    )
    assert (
        np.allclose(train.mean(0), 0)
        and np.allclose((train**2).mean(), 1)
        and np.allclose(other, 0)
    )

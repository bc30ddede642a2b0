"""Linear probes on frozen features: multinomial logistic regression, a sweep of its regularisation,
and few-shot subsets (CLIP, section 3.2).

Pure functions on arrays. Legend: N samples, D dimensions, C classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of L2 regularisation to choose from."""
ITERATIONS = 100
"""Maximum number of L-BFGS iterations."""


def standardised(train: Floats, *others: Floats) -> list[Floats]:
    """Return training features (N, D) and other features, shifted and scaled so that the training
    ones have mean 0 and, over all dimensions together, variance 1.

    With fewer samples than dimensions, as in few-shot probes, the features are also projected onto
    the span of the training ones. That makes a fit many times cheaper and changes no probe, because
    an L2-penalised probe has no weight outside that span.
    """
    mean = train.mean(0)
    scale = float(np.sqrt(((train - mean) ** 2).mean())) or 1.0
    scaled = [np.asarray((features - mean) / scale, np.float32) for features in (train, *others)]
    if len(train) >= train.shape[1]:
        return scaled
    _, size, axes = np.linalg.svd(scaled[0], full_matrices=False)
    axes = axes[size > 1e-5 * size.max(initial=1e-9)]
    return [features @ axes.T for features in scaled]


def fit(
    features: Floats, labels: NDArray[np.int64], classes: int, penalty: float
) -> NDArray[np.float64]:
    """Return the weights (D + 1, C), whose last row is the bias.

    L-BFGS minimises the mean cross-entropy + penalty / 2 |W|^2; the bias is not penalised.
    """
    from scipy.optimize import minimize  # takes half a second

    ones = np.ones((len(features), 1), np.float32)
    x = np.concatenate([features, ones], 1).astype(np.float64)  # (N, D + 1)
    target = np.eye(classes)[labels]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(x.shape[1], classes)
        logits = x @ weights
        logits -= logits.max(1, keepdims=True)
        exp = np.exp(logits)
        total = exp.sum(1, keepdims=True)
        cross_entropy = float((np.log(total[:, 0]) - (logits * target).sum(1)).mean())
        value = cross_entropy + penalty / 2 * float((weights[:-1] ** 2).sum())
        gradient = x.T @ (exp / total - target) / len(x)
        gradient[:-1] += penalty * weights[:-1]
        return value, gradient.ravel()

    solution = minimize(
        loss,
        np.zeros(x.shape[1] * classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ITERATIONS},
    )
    return np.asarray(solution.x.reshape(x.shape[1], classes), np.float64)


def predict(features: Floats, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the most likely class (N,) of each row."""
    return np.asarray((features @ weights[:-1] + weights[-1]).argmax(1), np.int64)


def sweep(features: Floats, labels: NDArray[np.int64], classes: int, seed: int) -> float:
    """Return the penalty with the best accuracy on a held-out fifth; of equals the strongest."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = max(1, len(order) // 5)
    train, judged = order[held_out:], order[:held_out]
    accuracy = []
    for penalty in PENALTIES:
        weights = fit(features[train], labels[train], classes, penalty)
        accuracy.append(float((predict(features[judged], weights) == labels[judged]).mean()))
    return max(zip(accuracy, PENALTIES, strict=True))[1]


def halves(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and the rows to judge, half of each class each; the only row of a
    class is judged.
    """
    rng = np.random.default_rng(seed)
    train: list[int] = []
    for label in np.unique(labels):
        class_rows = rng.permutation(np.flatnonzero(labels == label))
        train += class_rows[: len(class_rows) // 2].tolist()
    is_train = np.zeros(len(labels), bool)
    is_train[train] = True
    return np.flatnonzero(is_train), np.flatnonzero(~is_train)


def few(labels: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """Return at most `shots` random rows of each class."""
    rng = np.random.default_rng(seed)
    class_rows = [
        rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(class_rows))


def right(
    features: Floats,
    labels: NDArray[np.int64],
    train: Sequence[int] | NDArray[np.int64],
    judged: NDArray[np.int64],
    classes: int,
    penalty: float,
) -> NDArray[np.bool_]:
    """Return which judged rows a probe classifies correctly that is trained on the rows `train`."""
    train_features, others = standardised(features[train], features[judged])
    return np.asarray(
        predict(others, fit(train_features, labels[train], classes, penalty)) == labels[judged]
    )

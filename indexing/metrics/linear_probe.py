"""A linear probe on frozen features: multinomial logistic regression, its regularisation swept, and
few-shot curves (CLIP, section 3.2).

Pure functions on arrays. Legend: N samples, D dimensions, C classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from indexing.data.embedding_store import Floats

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 100


def standardised(train: Floats, *others: Floats) -> list[Floats]:
    """Return features with the training ones' mean 0 and, in all dimensions together, variance 1,
    rotated into the span of those.

    The rotation changes no probe: an L2-penalised one has no weight outside the span of what it
    saw. With fewer pictures than dimensions, as in few-shot probes, it makes a fit many times
    cheaper.
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
    """Return weights (D + 1, C), the last row the bias: mean cross-entropy + penalty / 2 |W|^2,
    minimised by L-BFGS; the bias is free.
    """
    x = np.concatenate([features, np.ones((len(features), 1), np.float32)], 1).astype(
        np.float64
    )  # (N, D + 1)
    target = np.eye(classes)[labels]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(x.shape[1], classes)
        logits = x @ weights
        logits -= logits.max(1, keepdims=True)
        exp = np.exp(logits)
        total = exp.sum(1, keepdims=True)
        value = float(
            (np.log(total[:, 0]) - (logits * target).sum(1)).mean()
        ) + penalty / 2 * float((weights[:-1] ** 2).sum())
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
    """Return the likeliest class of each row (N,)."""
    return np.asarray((features @ weights[:-1] + weights[-1]).argmax(1), np.int64)


def sweep(features: Floats, labels: NDArray[np.int64], classes: int, seed: int) -> float:
    """Return the penalty that does best on a fifth held back, of equals the strongest."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held = max(1, len(order) // 5)
    train, judged = order[held:], order[:held]
    accuracy = [
        float(
            (
                predict(features[judged], fit(features[train], labels[train], classes, p))
                == labels[judged]
            ).mean()
        )
        for p in PENALTIES
    ]
    return max(zip(accuracy, PENALTIES, strict=True))[1]


def halves(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and those to judge, half of each class to either; a class of one
    is judged only.
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
    """Return rows with at most so many of each class, drawn by the seed."""
    rng = np.random.default_rng(seed)
    return np.sort(
        np.concatenate(
            [
                rng.permutation(np.flatnonzero(labels == label))[:shots]
                for label in np.unique(labels)
            ]
        )
    )


def right(
    features: Floats,
    labels: NDArray[np.int64],
    train: Sequence[int] | NDArray[np.int64],
    judged: NDArray[np.int64],
    classes: int,
    penalty: float,
) -> NDArray[np.bool_]:
    """Return which of the judged rows a probe trained on the others names rightly."""
    train_features, others = standardised(features[train], features[judged])
    return np.asarray(
        predict(others, fit(train_features, labels[train], classes, penalty)) == labels[judged]
    )

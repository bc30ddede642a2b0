"""Zero-shot classification: the class whose words lie nearest to the picture's embedding (Radford
et al. 2021, section 3.1).

A class is asked for by its own name in several templates, or by the names of what belongs to it.
Pure functions on unit vectors; texts are embedded by a callable. Legend: N pictures, C classes, T
templates, M members of classes, D dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.bootstrap import class_mean_figure, mean_figure

EncodeTexts = Callable[[list[str]], NDArray[Any]]

DEPTHS = (1, 5)
SAME_SCORE = 1e-6
"""A class that scores within this of the right one stands before it: an embedding that tells
nothing apart gets nothing right."""
PICTURES_AT_ONCE = 1024
LISTED_CLASSES = 128
"""Up to as many classes are listed one by one."""


def class_embeddings(
    encode_texts: EncodeTexts, names: Sequence[str], templates: Sequence[str]
) -> Floats:
    """Embed every name in every template (with one `{}`), normalise, average over templates,
    normalise: (C, D).
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = unit(np.asarray(encode_texts(prompts), np.float32))  # (C * T, D)
    return unit(vectors.reshape(len(names), len(templates), -1).mean(1))  # (C, D)


def member_scores(
    images: Floats, members: Floats, class_of: NDArray[np.int64], count: int
) -> Floats:
    """Return each class's score (N, C) as that of its best member: texts (M, D) of the classes
    `class_of` (M,), C = `count`.

    Words such as "objects" say little about a picture, the names of objects do (Novack et al. 2023,
    CHiLS). A class without members scores -1.
    """
    order = np.argsort(class_of, kind="stable")
    present, starts = np.unique(class_of[order], return_index=True)
    scores = np.full((len(images), count), -1, np.float32)
    for start in range(0, len(images), PICTURES_AT_ONCE):
        similarities = images[start : start + PICTURES_AT_ONCE] @ members[order].T  # (n, M)
        scores[start : start + PICTURES_AT_ONCE, present] = np.maximum.reduceat(
            similarities, starts, axis=1
        )
    return scores


def ranks(scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many classes stand before the right one, (N,), for scores (N, C); a tie stands
    before it.
    """
    label_score = np.take_along_axis(scores, labels[:, None], axis=1)
    return (scores >= label_score - SAME_SCORE).sum(1) - 1  # the right one itself is among them


def score(
    scores: Floats,
    labels: Sequence[int] | NDArray[np.int64],
    names: Sequence[str],
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return top-1, top-5 and the mean per class for class scores (N, C) and right classes `labels`
    (N,), with 95 % intervals.

    `groups` (N) names what hangs together, as in indexing.metrics.bootstrap. `chance` is a uniform
    guess among all classes, `majority` always saying the class that is most frequent in these very
    pictures. `per_class` lists classes with pictures, when there are not too many.
    """
    right = np.asarray(labels, np.int64)
    count = len(names)
    majority = float(np.bincount(right).max() / len(right)) if len(right) else None
    rank = ranks(scores, right)
    figures: dict[str, Any] = {"n": len(right), "classes": count}
    for depth in DEPTHS:
        more = {"chance": min(depth, count) / count} | (
            {"majority": majority} if depth == 1 else {}
        )
        figures[f"top_{depth}"] = mean_figure(rank < depth, groups, resamples, seed, **more)
    figures["mean_per_class"] = class_mean_figure(
        rank < 1, right, groups, resamples, seed, chance=1 / count
    )
    if count <= LISTED_CLASSES:
        figures["per_class"] = [
            {
                "class": names[label],
                "n": int((right == label).sum()),
                "value": float((rank[right == label] < 1).mean()),
            }
            for label in np.unique(right)
        ]
    return figures

"""Zero-shot classification: a picture's class is the one whose text embedding is nearest (Radford
et al. 2021, section 3.1).

A class is described by its name in several templates, or by the names of its members. Pure
functions on unit vectors; a callable embeds the texts. Legend: N pictures, C classes, T templates,
M members of classes, D dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.bootstrap import class_mean_figure, mean_figure

EncodeTexts = Callable[[list[str]], NDArray[Any]]
"""N texts -> vectors (N, D)."""

DEPTHS = (1, 5)
SAME_SCORE = 1e-6
"""A wrong class ranks before the right one unless it scores lower by more than this, so that an
embedding that is equal for all classes is never right."""
PICTURES_AT_ONCE = 1024
LISTED_CLASSES = 128
"""Maximum number of classes that are listed one by one."""


def class_embeddings(
    encode_texts: EncodeTexts, names: Sequence[str], templates: Sequence[str]
) -> Floats:
    """Return the class embeddings (C, D): every name in every template (each with one `{}`) is
    embedded and normalised; the mean over templates is normalised again.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = unit(np.asarray(encode_texts(prompts), np.float32))  # (C * T, D)
    return unit(vectors.reshape(len(names), len(templates), -1).mean(1))  # (C, D)


def member_scores(
    images: Floats, members: Floats, class_of: NDArray[np.int64], count: int
) -> Floats:
    """Return each class's score (N, C), that of its best member; `members` (M, D) belong to the
    classes `class_of` (M,), and C is `count`.

    The names of objects describe a picture better than a word such as "objects" (Novack et al.
    2023, CHiLS). A class without members scores -1.
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
    """Return how many classes rank before the right one (N,), for scores (N, C); ties rank before
    it.
    """
    label_score = np.take_along_axis(scores, labels[:, None], axis=1)
    return (scores >= label_score - SAME_SCORE).sum(1) - 1  # less the right class itself


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

    `groups` (N) are the labels that indexing.metrics.bootstrap resamples. `chance` is the accuracy
    of a uniform guess among all classes, `majority` that of always answering the most frequent
    class of these pictures. `per_class` lists the classes that have pictures, where there are at
    most LISTED_CLASSES classes.
    """
    right = np.asarray(labels, np.int64)
    count = len(names)
    majority = float(np.bincount(right).max() / len(right)) if len(right) else None
    rank = ranks(scores, right)
    figures: dict[str, Any] = {"n": len(right), "classes": count}
    for depth in DEPTHS:
        more: dict[str, float | None] = {"chance": min(depth, count) / count}
        if depth == 1:
            more["majority"] = majority
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

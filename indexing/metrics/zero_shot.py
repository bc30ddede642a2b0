"""Zero-shot classification: a picture's class is the one whose text embedding is nearest (Radford
et al. 2021, section 3.1).

A class is described by its name in several templates, or by the names of its members. Pure
functions on unit vectors; a callable embeds the texts. Legend: N pictures, C classes, T templates,
M members of classes, D dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.bootstrap import Figure, class_mean_figure, mean_figure

EncodeTexts = Callable[[list[str]], NDArray[Any]]
"""N texts -> vectors (N, D)."""

SAME_SCORE = 1e-6
"""A wrong class ranks before the right one unless it scores lower by more than this, so that an
embedding that is equal for all classes is never right."""
PICTURES_AT_ONCE = 1024
LISTED_CLASSES = 128
"""Maximum number of classes that are listed one by one."""

ClassShare = TypedDict("ClassShare", {"class": str, "n": int, "value": float})
"""The share of a class's n pictures that are classified correctly."""


class Classification(TypedDict):
    """The figures of n pictures that are classified into a number of classes, see `score`."""

    n: int
    classes: int
    top_1: Figure
    top_5: Figure
    mean_per_class: Figure
    per_class: NotRequired[list[ClassShare]]
    members: NotRequired[int]
    """Member names that represent the classes, where members do."""


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
) -> Classification:
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
    chance = 1 / count
    figures: Classification = {
        "n": len(right),
        "classes": count,
        "top_1": mean_figure(rank < 1, groups, resamples, seed, chance=chance, majority=majority),
        "top_5": mean_figure(rank < 5, groups, resamples, seed, chance=min(5, count) / count),
        "mean_per_class": class_mean_figure(
            rank < 1, right, groups, resamples, seed, chance=chance
        ),
    }
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

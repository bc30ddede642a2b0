"""Retrieval both ways: how often the right caption is among a picture's k nearest, and the right picture among a caption's.

Pictures and captions are told apart by what they are: a caption that stands on several pictures is one caption with several right
answers, and equal pictures are one picture. Pure functions on unit vectors. Legend: P pictures, Q captions, D dimensions.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Floats
from indexing.intervals import mean_figure

DEPTHS = (1, 5, 10)
SAME_SCORE = 1e-6
"""A wrong answer that scores within this of the best right one stands before it."""
QUERIES_AT_ONCE = 1024


def retrieval(
    images: Floats,
    texts: Floats,
    pictures: Sequence[Hashable],
    captions: Sequence[str],
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return recall@1/5/10 from pictures to captions and back, with 95 % intervals and chance, for N pairs.

    Pair i is the picture `pictures[i]` (an id; equal ids are one picture) with embedding images[i] (N, D), and the caption captions[i]
    with texts[i] (N, D). A picture with many captions stands in many pairs. `groups[i]` names what hangs together (the concept).
    """
    picture_of, first_picture = _distinct(pictures)
    caption_of, first_caption = _distinct(captions)
    is_right = np.zeros((len(first_picture), len(first_caption)), bool)  # (P, Q)
    is_right[picture_of, caption_of] = True
    image, text = images[first_picture], texts[first_caption]
    return {
        "n": len(captions),
        "pictures": len(first_picture),
        "captions": len(first_caption),
        "image_to_text": _one_way(image, text, is_right, [groups[i] for i in first_picture], resamples, seed),
        "text_to_image": _one_way(text, image, is_right.T, [groups[i] for i in first_caption], resamples, seed),
    }


def right_places(queries: Floats, gallery: Floats, is_right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many wrong answers stand before the best right one for each query, (B,); `is_right` is (B, gallery)."""
    places = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        scores = queries[start : start + QUERIES_AT_ONCE] @ gallery.T
        right = is_right[start : start + QUERIES_AT_ONCE]
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        places.append(((scores >= best - SAME_SCORE) & ~right).sum(1))
    return np.concatenate(places) if places else np.zeros(0, np.int64)


def chance_of_hit(right: int, size: int, k: int) -> float:
    """Return how likely k different answers drawn out of `size` hold one of the `right` ones (hypergeometric)."""
    return 1 - math.comb(size - right, k) / math.comb(size, k) if k < size else 1.0


def _distinct(things: Sequence[Hashable]) -> tuple[NDArray[np.int64], list[int]]:
    """Number equal things alike in order of appearance; return the numbers and where each stands first."""
    numbers: dict[Hashable, int] = {}
    first: list[int] = []
    for place, thing in enumerate(things):
        if thing not in numbers:
            numbers[thing] = len(first)
            first.append(place)
    return np.array([numbers[thing] for thing in things], np.int64), first


def _one_way(
    queries: Floats, gallery: Floats, is_right: NDArray[np.bool_], groups: Sequence[Any], resamples: int, seed: int
) -> dict[str, Any]:
    places = right_places(queries, gallery, is_right)
    rights, times = np.unique(is_right.sum(1), return_counts=True)
    found = {}
    for k in DEPTHS:
        chances = [chance_of_hit(int(right), len(gallery), k) for right in rights]
        chance = float(np.average(chances, weights=times)) if chances else None
        found[f"recall@{k}"] = mean_figure(places < k, groups, resamples, seed, chance=chance)
    return found

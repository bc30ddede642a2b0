"""Retrieval in both directions: how often the right caption is among a picture's k nearest, and
the right picture among a caption's.

Equal captions of several pictures are one caption with several right answers, and equal pictures
are one picture. Pure functions on unit vectors; a callable embeds the texts. Legend: N pairs of a
picture and a caption, B distinct queries, D dimensions.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.metrics.zero_shot import EncodeTexts

SAME_SCORE = 1e-6
"""A wrong answer ranks before the best right one unless it scores lower by more than this."""
QUERIES_AT_ONCE = 1024

Recalls = TypedDict("Recalls", {"recall@1": Figure, "recall@5": Figure, "recall@10": Figure})
"""The shares of queries with a right answer among the k nearest."""


class BothWays(TypedDict):
    """Recall from pictures to captions and back, over n pairs."""

    n: int
    pictures: int
    captions: int
    image_to_text: Recalls
    text_to_image: Recalls


@dataclass(frozen=True)
class _Side:
    """Distinct pictures or captions: their vectors (B, D), the number of each one in every pair
    (N,), and the group of each (B).
    """

    vectors: Floats
    number_of: NDArray[np.int64]
    groups: Sequence[Any]


def retrieval(
    images: Floats,
    texts: Floats,
    pictures: Sequence[Hashable],
    captions: Sequence[str],
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> BothWays:
    """Return recall@1/5/10 from pictures to captions and back, with 95 % intervals and chance, for
    N pairs.

    Pair i is the picture `pictures[i]` (an id; equal ids are one picture) with embedding images[i]
    (N, D), and the caption captions[i] with texts[i] (N, D). A picture with many captions is in
    many pairs. `groups[i]` is the label that intervals resample by (the concept).
    """
    picture_of, first_picture = _distinct(pictures)
    caption_of, first_caption = _distinct(captions)
    picture_side = _Side(images[first_picture], picture_of, [groups[i] for i in first_picture])
    caption_side = _Side(texts[first_caption], caption_of, [groups[i] for i in first_caption])
    return _both_ways(picture_side, caption_side, resamples, seed)


def retrieval_of_all(
    images: Floats,
    pictures: Sequence[Hashable],
    captions: Sequence[Sequence[str]],
    encode_texts: EncodeTexts,
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> BothWays:
    """Return the same for all captions of each of N pictures, as COCO's figures are computed (with
    5 captions for each picture).

    A picture counts as a hit where any of its captions is among the k nearest; every caption is a
    query for its picture.
    """
    row_of = [row for row, own_captions in enumerate(captions) for _ in own_captions]
    all_captions = [caption for own_captions in captions for caption in own_captions]
    picture_of, first_picture = _distinct([pictures[row] for row in row_of])
    caption_of, first_caption = _distinct(all_captions)
    texts = unit(np.asarray(encode_texts([all_captions[i] for i in first_caption]), np.float32))
    picture_rows = [row_of[i] for i in first_picture]
    picture_side = _Side(images[picture_rows], picture_of, [groups[row] for row in picture_rows])
    caption_side = _Side(texts, caption_of, [groups[row_of[i]] for i in first_caption])
    return _both_ways(picture_side, caption_side, resamples, seed)


def _both_ways(pictures: _Side, captions: _Side, resamples: int, seed: int) -> BothWays:
    return {
        "n": len(pictures.number_of),
        "pictures": len(pictures.vectors),
        "captions": len(captions.vectors),
        "image_to_text": _one_way(pictures, captions, resamples, seed),
        "text_to_image": _one_way(captions, pictures, resamples, seed),
    }


def right_ranks(
    queries: Floats, gallery: Floats, query_of: NDArray[np.int64], answer_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many wrong answers rank before the best right one, for each query (B,).

    Pair i says that gallery row answer_of[i] is right for query query_of[i]; both are (N,).
    """
    rank_parts = []
    order = np.argsort(query_of, kind="stable")
    query_of, answer_of = query_of[order], answer_of[order]
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        scores = queries[start : start + QUERIES_AT_ONCE] @ gallery.T
        batch = slice(*np.searchsorted(query_of, [start, start + QUERIES_AT_ONCE]))
        right = np.zeros(scores.shape, bool)
        right[query_of[batch] - start, answer_of[batch]] = True
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        rank_parts.append(((scores >= best - SAME_SCORE) & ~right).sum(1))
    return np.concatenate(rank_parts) if rank_parts else np.zeros(0, np.int64)


def chance_of_hit(right: int, size: int, k: int) -> float:
    """Return the probability that k distinct random answers of `size` contain one of the `right`
    ones (hypergeometric).
    """
    return 1 - math.comb(size - right, k) / math.comb(size, k) if k < size else 1.0


def _distinct(values: Sequence[Hashable]) -> tuple[NDArray[np.int64], list[int]]:
    """Number distinct values in order of appearance; return the number of each value (N,), and the
    position of the first of each.
    """
    numbers: dict[Hashable, int] = {}
    first: list[int] = []
    for position, value in enumerate(values):
        if value not in numbers:
            numbers[value] = len(first)
            first.append(position)
    return np.array([numbers[value] for value in values], np.int64), first


def _one_way(queries: _Side, gallery: _Side, resamples: int, seed: int) -> Recalls:
    """Return recall@k for every depth, with `queries` as queries into `gallery`."""
    ranks = right_ranks(queries.vectors, gallery.vectors, queries.number_of, gallery.number_of)
    # A pair may occur twice.
    distinct_pairs = np.unique(np.stack([queries.number_of, gallery.number_of]), axis=1)
    answers = np.bincount(distinct_pairs[0], minlength=len(queries.vectors))
    answer_counts, times = np.unique(answers, return_counts=True)

    def recall_at(k: int) -> Figure:
        chances = [chance_of_hit(int(right), len(gallery.vectors), k) for right in answer_counts]
        chance = float(np.average(chances, weights=times)) if chances else None
        return mean_figure(ranks < k, queries.groups, resamples, seed, chance=chance)

    return {"recall@1": recall_at(1), "recall@5": recall_at(5), "recall@10": recall_at(10)}

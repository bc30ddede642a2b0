"""Retrieval both ways: how often the right caption is among a picture's k nearest, and the right
picture among a caption's.

Pictures and captions are told apart by what they are: a caption that stands on several pictures is
one caption with several right answers, and equal pictures are one picture. Pure functions on unit
vectors; texts are embedded by a callable. Legend: N pairs, P pictures, Q captions, R right answers
(picture and caption), D dimensions.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, unit
from indexing.metrics.bootstrap import mean_figure
from indexing.metrics.zero_shot import EncodeTexts

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
    """Return recall@1/5/10 from pictures to captions and back, with 95 % intervals and chance, for
    N pairs.

    Pair i is the picture `pictures[i]` (an id; equal ids are one picture) with embedding images[i]
    (N, D), and the caption captions[i] with texts[i] (N, D). A picture with many captions stands in
    many pairs. `groups[i]` names what hangs together (the concept).
    """
    picture_of, first_picture = _distinct(pictures)
    caption_of, first_caption = _distinct(captions)
    named = ([groups[i] for i in first_picture], [groups[i] for i in first_caption])
    return _both_ways(
        images[first_picture],
        texts[first_caption],
        picture_of,
        caption_of,
        named,
        len(captions),
        resamples,
        seed,
    )


def retrieval_of_all(
    images: Floats,
    pictures: Sequence[Hashable],
    captions: Sequence[Sequence[str]],
    encode_texts: EncodeTexts,
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the same with all captions of each of N pictures, as COCO's figures are counted (5
    captions a picture there).

    A picture is found right where any of its captions is among the k nearest; every caption asks
    for its picture.
    """
    of = [number for number, captions_of in enumerate(captions) for _ in captions_of]
    all_captions = [caption for captions_of in captions for caption in captions_of]
    picture_of, first_picture = _distinct([pictures[number] for number in of])
    caption_of, first_caption = _distinct(all_captions)
    texts = unit(np.asarray(encode_texts([all_captions[i] for i in first_caption]), np.float32))
    named = ([groups[of[i]] for i in first_picture], [groups[of[i]] for i in first_caption])
    return _both_ways(
        images[[of[i] for i in first_picture]],
        texts,
        picture_of,
        caption_of,
        named,
        len(all_captions),
        resamples,
        seed,
    )


def _both_ways(
    images: Floats,
    texts: Floats,
    picture_of: NDArray[np.int64],
    caption_of: NDArray[np.int64],
    groups: tuple[Sequence[Any], Sequence[Any]],
    n: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    return {
        "n": n,
        "pictures": len(images),
        "captions": len(texts),
        "image_to_text": _one_way(
            images, texts, picture_of, caption_of, groups[0], resamples, seed
        ),
        "text_to_image": _one_way(
            texts, images, caption_of, picture_of, groups[1], resamples, seed
        ),
    }


def right_ranks(
    queries: Floats, gallery: Floats, query_of: NDArray[np.int64], answer_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many wrong answers stand before the best right one for each query, (B,); right is
    answer_of[r] for query_of[r], (R,).
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
    """Return how likely k different answers drawn out of `size` hold one of the `right` ones
    (hypergeometric).
    """
    return 1 - math.comb(size - right, k) / math.comb(size, k) if k < size else 1.0


def _distinct(things: Sequence[Hashable]) -> tuple[NDArray[np.int64], list[int]]:
    """Number equal things alike in order of appearance; return the numbers and where each stands
    first.
    """
    numbers: dict[Hashable, int] = {}
    first: list[int] = []
    for number, thing in enumerate(things):
        if thing not in numbers:
            numbers[thing] = len(first)
            first.append(number)
    return np.array([numbers[thing] for thing in things], np.int64), first


def _one_way(
    queries: Floats,
    gallery: Floats,
    query_of: NDArray[np.int64],
    answer_of: NDArray[np.int64],
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    ranks_right = right_ranks(queries, gallery, query_of, answer_of)
    answers = np.bincount(
        np.unique(np.stack([query_of, answer_of]), axis=1)[0], minlength=len(queries)
    )  # a pair may stand there twice
    rights, times = np.unique(answers, return_counts=True)
    figures = {}
    for k in DEPTHS:
        chances = [chance_of_hit(int(right), len(gallery), k) for right in rights]
        chance = float(np.average(chances, weights=times)) if chances else None
        figures[f"recall@{k}"] = mean_figure(
            ranks_right < k, groups, resamples, seed, chance=chance
        )
    return figures

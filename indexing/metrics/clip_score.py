"""CLIP scores of generated pictures, and the training pictures that are nearest to them.

Pure functions on arrays. Legend: P prompts, K pictures of each, N pictures, M queries, D
dimensions, S side.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, Rows, unit
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.metrics.zero_shot import ranks

EncodeImages = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""Pictures (N, S, S, 3) RGB -> vectors (N, D)."""
Generate = Callable[[list[str], int, int], NDArray[np.uint8]]
"""(P prompts, K, seed) -> pictures (P, K, S, S, 3) RGB."""

SCALE = 100
AT_ONCE = 256
"""Pictures that are encoded at a time."""


class ClipScores(TypedDict):
    """How well pictures follow their prompts, see `clip_scores`."""

    clip_score: Figure
    mismatched: Figure
    own_prompt_first: Figure


def encoded(encode: EncodeImages, pictures: NDArray[np.uint8], is_unit: bool = True) -> Floats:
    """Return vectors (N, D) of pictures (N, S, S, 3), encoded AT_ONCE at a time.

    They are unit vectors unless `is_unit` is false.
    """
    pieces = [
        np.asarray(encode(pictures[start : start + AT_ONCE]), np.float32)
        for start in range(0, len(pictures), AT_ONCE)
    ]
    vectors = np.concatenate(pieces)
    return unit(vectors) if is_unit else vectors


def clip_scores(images: Floats, texts: Floats, resamples: int, seed: int) -> ClipScores:
    """Return how well pictures (P, K, D) follow their prompts (P, D); all are unit vectors.

    `clip_score`: the mean of 100 max(cos, 0) with the picture's prompt (Hessel et al. 2021, without
    the factor of 2.5). `mismatched`: the same with all other prompts, as a baseline.
    `own_prompt_first`: the share of pictures whose prompt scores highest of the P. Intervals
    resample prompts. With a single prompt, the last two have no value.
    """
    prompts, count = images.shape[:2]
    cosines = np.einsum("pkd,qd->pkq", images, texts)  # (P, K, P)
    scores = SCALE * np.maximum(cosines, 0)
    is_same_prompt = np.eye(prompts, dtype=bool)
    prompt_scores = scores.transpose(0, 2, 1)[is_same_prompt]  # (P, K)
    others = (
        (scores.sum(2) - prompt_scores) / (prompts - 1) if prompts > 1 else np.zeros((0, count))
    )
    groups = np.repeat(np.arange(prompts), count)
    labels = groups if prompts > 1 else groups[:0]
    first = ranks(cosines.reshape(-1, prompts)[: len(labels)], labels) < 1
    return {
        "clip_score": mean_figure(prompt_scores.ravel(), groups, resamples, seed, unit="score"),
        "mismatched": mean_figure(
            others.ravel(), groups[: others.size], resamples, seed, unit="score"
        ),
        "own_prompt_first": mean_figure(first, labels, resamples, seed, chance=1 / prompts),
    }


def pair_clip_score(
    images: Floats, texts: Floats, groups: Sequence[Any], resamples: int, seed: int
) -> Figure:
    """Return the mean of 100 max(cos, 0) of real pictures (N, D) with their captions (N, D), to
    compare generated pictures with.
    """
    return mean_figure(
        SCALE * np.maximum(np.einsum("nd,nd->n", images, texts), 0),
        groups,
        resamples,
        seed,
        unit="score",
    )


def nearest_by_embedding(queries: Floats, gallery: Iterable[Floats]) -> tuple[Floats, Rows]:
    """Return the cosine (M,) and the row (M,) of the nearest gallery vector of each query (M, D).

    The gallery comes in pieces (n, D). The row is -1 where it is empty.
    """
    best = np.full(len(queries), -np.inf, np.float32)
    row = np.full(len(queries), -1, np.int64)
    start = 0
    for piece in gallery:
        if len(piece):
            scores = queries @ piece.T
            nearest = scores.argmax(1)
            score = scores[np.arange(len(queries)), nearest]
            is_better = score > best
            best[is_better], row[is_better] = score[is_better], start + nearest[is_better]
        start += len(piece)
    return best, row


def nearest_by_pixels(
    queries: NDArray[np.uint8], gallery: Iterable[NDArray[np.uint8]]
) -> tuple[Floats, Rows]:
    """Return the root mean square difference (M,), 0 to 255, and the row (M,) of the nearest
    gallery picture of each query (M, S, S, 3).

    The gallery comes in pieces (n, S, S, 3). The row is -1 where it is empty.
    """
    flat = queries.reshape(len(queries), -1).astype(np.float32)
    squares = (flat * flat).sum(1)
    best = np.full(len(queries), np.inf, np.float32)
    row = np.full(len(queries), -1, np.int64)
    start = 0
    for piece in gallery:
        if len(piece):
            other = piece.reshape(len(piece), -1).astype(np.float32)
            # Squared distances (M, n).
            distance = squares[:, None] + (other * other).sum(1) - 2 * flat @ other.T
            nearest = distance.argmin(1)
            nearest_distance = distance[np.arange(len(queries)), nearest]
            is_better = nearest_distance < best
            best[is_better] = nearest_distance[is_better]
            row[is_better] = start + nearest[is_better]
        start += len(piece)
    return np.sqrt(np.maximum(best, 0) / flat.shape[1], dtype=np.float32), row

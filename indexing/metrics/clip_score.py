"""What can be said of generated pictures by numbers: whether they follow their prompts, and whether
they copy training pictures.

Pure functions on arrays. Legend: P prompts, K pictures of each, N training pictures, M queries, D
dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, Rows, unit
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.metrics.zero_shot import ranks

EncodeImages = Callable[[NDArray[np.uint8]], NDArray[Any]]
Generate = Callable[[list[str], int, int], NDArray[np.uint8]]

SCALE = 100
AT_ONCE = 256
"""Pictures that are encoded at a time."""


def encoded(encode: EncodeImages, pictures: NDArray[np.uint8], is_unit: bool = True) -> Floats:
    """Return vectors (N, D) of pictures (N, S, S, 3), encoded AT_ONCE at a time and made unit
    vectors unless told otherwise.
    """
    pieces = [
        np.asarray(encode(pictures[start : start + AT_ONCE]), np.float32)
        for start in range(0, len(pictures), AT_ONCE)
    ]
    vectors = np.concatenate(pieces)
    return unit(vectors) if is_unit else vectors


def clip_scores(images: Floats, texts: Floats, resamples: int, seed: int) -> dict[str, Figure]:
    """Return how well pictures (P, K, D) follow the prompts (P, D) that they were drawn from; all
    unit vectors.

    `clip_score`: the mean of 100 max(cos, 0) with the own prompt (Hessel et al. 2021, without its
    factor of 2.5). `mismatched`: the same with all other prompts, what an unrelated picture scores.
    `own_prompt_first`: how often the own prompt scores highest of the P. Intervals resample
    prompts. A single prompt has no other ones, so those two have no value then.
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
    """Return the mean of 100 max(cos, 0) of real pictures (N, D) with their captions (N, D): what a
    faithful sample would score.
    """
    return mean_figure(
        SCALE * np.maximum(np.einsum("nd,nd->n", images, texts), 0),
        groups,
        resamples,
        seed,
        unit="score",
    )


def nearest_by_embedding(queries: Floats, gallery: Iterable[Floats]) -> tuple[Floats, Rows]:
    """Return the cosine and the row of the nearest of all gallery vectors, given in pieces (·, D),
    for each query (M, D).
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
    """Return the root mean square difference (0 to 255) and the row of the nearest gallery picture
    for each query, all (·, S, S, 3).
    """
    flat = queries.reshape(len(queries), -1).astype(np.float32)
    squares = (flat * flat).sum(1)
    best = np.full(len(queries), np.inf, np.float32)
    row = np.full(len(queries), -1, np.int64)
    start = 0
    for piece in gallery:
        if len(piece):
            other = piece.reshape(len(piece), -1).astype(np.float32)
            distance = (
                squares[:, None] + (other * other).sum(1) - 2 * flat @ other.T
            )  # (M, piece), squared
            nearest = distance.argmin(1)
            value = distance[np.arange(len(queries)), nearest]
            is_better = value < best
            best[is_better], row[is_better] = value[is_better], start + nearest[is_better]
        start += len(piece)
    return np.sqrt(np.maximum(best, 0) / flat.shape[1], dtype=np.float32), row

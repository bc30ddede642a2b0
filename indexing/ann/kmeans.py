"""K-means on the sphere in groups, which takes a third of the time of k-means at once. Legend: N
vectors, D dimensions, C centroids.
"""

import math
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats

ROUGH_ROUNDS, LAST_ROUNDS = 10, 2
"""Rounds of k-means within groups of vectors, and then over all vectors."""


def centroids(vectors: Floats, count: int, parameters: Any) -> Floats:
    """Return centroids (count, D) of vectors (n, D) by k-means on the sphere, in a third of the
    time that it takes at once.

    About sqrt(count) groups are found first, then centroids in each of them, as many as its share
    of the vectors, and at last two rounds over all vectors, which repair what is wrong at the
    borders of groups.
    """
    rough = _clustered(vectors, round(math.sqrt(count)), parameters, ROUGH_ROUNDS)
    group = _nearest(rough, vectors)
    ends = np.round(
        np.cumsum(np.bincount(group, minlength=len(rough))) * count / len(vectors)
    ).astype(int)
    shares = np.diff(ends, prepend=0)
    within = [
        _clustered(vectors[group == group_number], int(share), parameters, ROUGH_ROUNDS)
        for group_number, share in enumerate(shares)
        if share
    ]
    return _clustered(vectors, count, parameters, LAST_ROUNDS, np.concatenate(within))


def _clustered(
    vectors: Floats, count: int, parameters: Any, rounds: int, begun: Floats | None = None
) -> Floats:
    """Return centroids (count, D) after so many rounds of k-means, from those begun with where
    there are.
    """
    clustering = faiss.Clustering(vectors.shape[1], count, parameters)
    clustering.niter = rounds
    if begun is not None:
        faiss.copy_array_to_vector(begun.ravel(), clustering.centroids)
    clustering.train(vectors, faiss.IndexFlatIP(vectors.shape[1]))
    trained_centroids: Floats = faiss.vector_to_array(clustering.centroids).reshape(count, -1)
    return trained_centroids


def _nearest(centres: Floats, vectors: Floats) -> NDArray[np.int64]:
    """Return which of the centroids scores best for each vector (n,)."""
    index = faiss.IndexFlatIP(centres.shape[1])
    index.add(centres)
    return np.asarray(index.search(vectors, 1)[1][:, 0])

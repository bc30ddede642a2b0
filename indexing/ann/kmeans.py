"""Spherical k-means in two levels, which takes a third of the time of plain k-means.

Legend: N vectors, D dimensions, C centroids.
"""

import math
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats

ROUGH_ROUNDS, LAST_ROUNDS = 10, 2
"""Rounds of k-means within groups of vectors, and of the last k-means over all vectors."""


def centroids(vectors: Floats, count: int, parameters: Any) -> Floats:
    """Return `count` centroids (C, D) of vectors (N, D); `parameters` is a
    faiss.ClusteringParameters.

    The first k-means finds about sqrt(count) groups. A k-means within each group finds a number of
    centroids in proportion to the group's share of the vectors. Two last rounds over all vectors
    correct the centroids at the borders of groups.
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
    vectors: Floats, count: int, parameters: Any, rounds: int, initial: Floats | None = None
) -> Floats:
    """Return `count` centroids (C, D) after so many rounds of k-means, which starts from `initial`
    (C, D) where it is not None.
    """
    clustering = faiss.Clustering(vectors.shape[1], count, parameters)
    clustering.niter = rounds
    if initial is not None:
        faiss.copy_array_to_vector(initial.ravel(), clustering.centroids)
    clustering.train(vectors, faiss.IndexFlatIP(vectors.shape[1]))
    trained_centroids: Floats = faiss.vector_to_array(clustering.centroids).reshape(count, -1)
    return trained_centroids


def _nearest(centres: Floats, vectors: Floats) -> NDArray[np.int64]:
    """Return the number of the centroid (N,) that scores best for each vector."""
    index = faiss.IndexFlatIP(centres.shape[1])
    index.add(centres)
    return np.asarray(index.search(vectors, 1)[1][:, 0])

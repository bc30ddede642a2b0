"""Two-level k-means is as good as plain k-means, and survives equal vectors."""

import faiss
import numpy as np
import pytest

from indexing.ann.kmeans import centroids
from tests.helpers.embed_folders import spread_out, vectors

DIM = 32
VECTORS = vectors(1500, DIM).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.mark.parametrize("count", [1, 2, 250])
def test_two_levels_are_as_good_as_plain_kmeans(count: int) -> None:
    parameters = faiss.ClusteringParameters()
    parameters.spherical, parameters.min_points_per_centroid, parameters.seed = True, 1, 3
    for sample in (VECTORS, spread_out([9000], DIM, -0.5)[0]):
        two_level, again = (centroids(sample, count, parameters) for _ in range(2))
        assert two_level.shape == (count, DIM) and np.allclose(
            np.linalg.norm(two_level, axis=1), 1, atol=1e-5
        )
        assert (two_level == again).all()
        at_once = faiss.Clustering(DIM, count, parameters)
        at_once.niter = 12
        at_once.train(sample, faiss.IndexFlatIP(DIM))
        whole = faiss.vector_to_array(at_once.centroids).reshape(count, DIM)
        nearness = [float((sample @ means.T).max(axis=1).mean()) for means in (two_level, whole)]
        assert nearness[0] > nearness[1] - 0.005


def test_equal_vectors_give_finite_centroids() -> None:
    parameters = faiss.ClusteringParameters()
    parameters.spherical, parameters.min_points_per_centroid = True, 1
    sample = np.concatenate([np.tile(VECTORS[:1], (900, 1)), VECTORS[:100]])
    assert np.isfinite(centroids(sample, 100, parameters)).all()
    assert centroids(sample, 1000, parameters).shape == (1000, DIM), "as many centroids as vectors"

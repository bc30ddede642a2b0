"""Distances between a set of generated and a set of real pictures, on features of a network that is named beside every figure.

Pure functions on features; sample counts decide what they mean. Legend: N real and M generated pictures, D dimensions.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3


def frechet(real: NDArray[Any], made: NDArray[Any]) -> float:
    """Return |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of Gaussians fitted to both (Dowson & Landau 1982).

    It is FID on Inception's features alone; with fewer pictures than dimensions it is far too large, and comparable at equal counts only.
    """
    own, other = (np.asarray(each, np.float64) for each in (real, made))
    shift = own.mean(0) - other.mean(0)
    a, b = ((each - each.mean(0)) / np.sqrt(max(1, len(each) - 1)) for each in (own, other))  # S = a^T a
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()  # tr (S_1 S_2)^(1/2), without a D x D root
    return float(shift @ shift + (a**2).sum() + (b**2).sum() - 2 * cross)


def kernel_distance(real: NDArray[Any], made: NDArray[Any]) -> float:
    """Return the unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018); it may fall below 0."""
    x, y = (np.asarray(each, np.float64) for each in (real, made))

    def kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    of_x, of_y = kernel(x, x), kernel(y, y)
    within = [(each.sum() - np.trace(each)) / (len(each) * (len(each) - 1)) for each in (of_x, of_y)]
    return float(sum(within) - 2 * kernel(x, y).mean())


def cmmd(real: NDArray[Any], made: NDArray[Any]) -> float:
    """Return 1000 times the squared MMD of unit vectors with a Gaussian kernel, sigma 10 (Jayasumana et al. 2024); on CLIP embeddings."""
    x, y = (np.asarray(each, np.float64) for each in (real, made))

    def mean(a: NDArray[Any], b: NDArray[Any]) -> float:
        apart = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return float(np.exp(-np.maximum(apart, 0) / (2 * CMMD_SIGMA**2)).mean())

    return CMMD_SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def precision_recall(real: NDArray[Any], made: NDArray[Any], k: int = NEIGHBOURS) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which generated pictures lie within the real ones' manifold, (M,), and which real ones within the generated, (N,).

    A manifold is the balls around its pictures that reach to the k-th nearest other one (Kynkaanniemi et al. 2019). Their means are
    precision and recall, which tells diversity. Raises ValueError where a set has k pictures or fewer.
    """
    x, y = (np.asarray(each, np.float64) for each in (real, made))
    if min(len(x), len(y)) <= k:
        raise ValueError(f"{len(x)} and {len(y)} pictures: the {k}-th neighbour asks for more")

    def apart(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)))

    radius_x, radius_y = (np.partition(apart(each, each), k, axis=1)[:, k] for each in (x, y))  # place 0 is the picture itself
    between = apart(x, y)  # (N, M)
    return np.asarray((between <= radius_x[:, None]).any(0)), np.asarray((between <= radius_y).any(1))

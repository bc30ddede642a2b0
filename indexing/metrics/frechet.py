"""Distances between sets of real and generated pictures, on features of any network: Fréchet
distance, kernel distance, CMMD, precision and recall.

Pure functions on features; values depend on the number of pictures. Each distance is also available
as a function of the number of times that each picture counts, for the bootstrap. Legend: N real and
M generated pictures, D dimensions, u (N,) and v (M,) the number of times that each counts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3


Counted = Callable[[NDArray[Any], NDArray[Any]], float]
"""(u (N,), v (M,)) -> the distance of the sets in which each picture counts so many times."""


def frechet_of(real: NDArray[Any], generated: NDArray[Any]) -> Counted:
    """Return the Fréchet distance of real (N, D) and generated (M, D) features: |m_1 - m_2|^2 +
    tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of Gaussians fitted to both (Dowson & Landau 1982).

    It is FID only on Inception's features. With fewer pictures than dimensions it is far too large
    and comparable only at equal counts, and its bootstrap interval is up to half too wide.
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))

    def fitted(features: NDArray[Any], count: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        drawn = count > 0
        mean = count @ features / count.sum()
        scale = np.sqrt(count[drawn] / max(1, count.sum() - 1))
        root = (features[drawn] - mean) * scale[:, None]  # S = root^T root
        return mean, np.asarray(np.linalg.qr(root, "r")) if len(root) > root.shape[1] else root

    def distance(u: NDArray[Any], v: NDArray[Any]) -> float:
        (m_1, a), (m_2, b) = fitted(x, u), fitted(y, v)
        # tr (S_1 S_2)^(1/2) without the square root of a D x D matrix.
        cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        return float(((m_1 - m_2) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)

    return distance


def kernel_distance_of(real: NDArray[Any], generated: NDArray[Any]) -> Counted:
    """Return the unbiased squared MMD of real (N, D) and generated (M, D) features with the kernel
    (x . y / D + 1)^3 (Binkowski et al. 2018); it may be negative.

    Where a picture counts several times, pairs of it with itself are left out.
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))

    def kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    of_x, of_y, between = kernel(x, x), kernel(y, y), kernel(x, y)

    def within(of: NDArray[Any], count: NDArray[Any]) -> float:
        return float(
            (count @ of @ count - count**2 @ np.diag(of)) / (count.sum() ** 2 - (count**2).sum())
        )

    def distance(u: NDArray[Any], v: NDArray[Any]) -> float:
        across = float(u @ between @ v / (u.sum() * v.sum()))
        return within(of_x, u) + within(of_y, v) - 2 * across

    return distance


def cmmd_of(real: NDArray[Any], generated: NDArray[Any]) -> Counted:
    """Return CMMD: 1000 times the squared MMD of unit CLIP embeddings, real (N, D) and generated
    (M, D), with a Gaussian kernel of sigma 10 (Jayasumana et al. 2024).
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))

    def kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        apart = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.asarray(np.exp(-np.maximum(apart, 0) / (2 * CMMD_SIGMA**2)))

    of_x, of_y, between = kernel(x, x), kernel(y, y), kernel(x, y)

    def distance(u: NDArray[Any], v: NDArray[Any]) -> float:
        u, v = u / u.sum(), v / v.sum()
        return float(CMMD_SCALE * (u @ of_x @ u + v @ of_y @ v - 2 * u @ between @ v))

    return distance


def frechet(real: NDArray[Any], generated: NDArray[Any]) -> float:
    """Return the Fréchet distance of features (N, D) and (M, D)."""
    return frechet_of(real, generated)(np.ones(len(real)), np.ones(len(generated)))


def kernel_distance(real: NDArray[Any], generated: NDArray[Any]) -> float:
    """Return the kernel distance of features (N, D) and (M, D)."""
    return kernel_distance_of(real, generated)(np.ones(len(real)), np.ones(len(generated)))


def cmmd(real: NDArray[Any], generated: NDArray[Any]) -> float:
    """Return the CMMD of unit CLIP embeddings (N, D) and (M, D)."""
    return cmmd_of(real, generated)(np.ones(len(real)), np.ones(len(generated)))


def precision_recall(
    real: NDArray[Any], generated: NDArray[Any], k: int = NEIGHBOURS
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which generated pictures (M,) lie in the manifold of the real ones, and which real
    pictures (N,) lie in that of the generated ones.

    A set's manifold is the union of balls around its pictures that reach to the k-th nearest other
    picture (Kynkaanniemi et al. 2019). The means of the two masks are precision and recall; recall
    measures diversity. Raises ValueError where a set has k pictures or fewer.
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))
    if min(len(x), len(y)) <= k:
        raise ValueError(f"{len(x)} and {len(y)} pictures: each set must have more than k = {k}")

    def apart(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(
            np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
        )

    # Position 0 is the picture itself.
    radius_x, radius_y = (
        np.partition(apart(features, features), k, axis=1)[:, k] for features in (x, y)
    )
    between = apart(x, y)  # (N, M)
    is_precise = (between <= radius_x[:, None]).any(0)
    is_recalled = (between <= radius_y).any(1)
    return np.asarray(is_precise), np.asarray(is_recalled)

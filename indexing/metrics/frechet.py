"""Distances between a set of generated and a set of real pictures, on features of a network that is
named beside every figure.

Pure functions on features; sample counts decide what they mean. Each distance stands as a function
of how often every picture is drawn, which a bootstrap asks for. Legend: N real and M generated
pictures, D dimensions, u and v how often each of them counts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3


Counted = Callable[[NDArray[Any], NDArray[Any]], float]
"""(u (N,), v (M,)) -> the distance of the sets in which the pictures stand so often."""


def frechet_of(real: NDArray[Any], generated: NDArray[Any]) -> Counted:
    """Return |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of Gaussians fitted to both (Dowson
    & Landau 1982).

    It is FID on Inception's features alone; with fewer pictures than dimensions it is far too
    large, comparable at equal counts only, and its bootstrap's interval up to half too wide.
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))

    def fitted(features: NDArray[Any], count: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        drawn = count > 0
        mean = count @ features / count.sum()
        root = (features[drawn] - mean) * np.sqrt(count[drawn] / max(1, count.sum() - 1))[
            :, None
        ]  # S = root^T root
        return mean, np.asarray(np.linalg.qr(root, "r")) if len(root) > root.shape[1] else root

    def distance(u: NDArray[Any], v: NDArray[Any]) -> float:
        (m_1, a), (m_2, b) = fitted(x, u), fitted(y, v)
        cross = np.linalg.svd(
            a @ b.T, compute_uv=False
        ).sum()  # tr (S_1 S_2)^(1/2), without a D x D root
        return float(((m_1 - m_2) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)

    return distance


def kernel_distance_of(real: NDArray[Any], generated: NDArray[Any]) -> Counted:
    """Return the unbiased squared MMD with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018); it
    may fall below 0.

    A picture that is drawn again is no other picture: pairs of it with itself are left out.
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))

    def kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    of_x, of_y, between = kernel(x, x), kernel(y, y), kernel(x, y)

    def within(of: NDArray[Any], count: NDArray[Any]) -> float:
        return float(
            (count @ of @ count - count**2 @ np.diag(of)) / (count.sum() ** 2 - (count**2).sum())
        )

    return lambda u, v: (
        within(of_x, u) + within(of_y, v) - 2 * float(u @ between @ v / (u.sum() * v.sum()))
    )


def cmmd_of(real: NDArray[Any], generated: NDArray[Any]) -> Counted:
    """Return 1000 times the squared MMD of unit vectors with a Gaussian kernel, sigma 10
    (Jayasumana et al. 2024); on CLIP embeddings.
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
    """Return the Fréchet distance of two sets, every picture counted once."""
    return frechet_of(real, generated)(np.ones(len(real)), np.ones(len(generated)))


def kernel_distance(real: NDArray[Any], generated: NDArray[Any]) -> float:
    """Return the kernel distance of two sets, every picture counted once."""
    return kernel_distance_of(real, generated)(np.ones(len(real)), np.ones(len(generated)))


def cmmd(real: NDArray[Any], generated: NDArray[Any]) -> float:
    """Return the CMMD of two sets, every picture counted once."""
    return cmmd_of(real, generated)(np.ones(len(real)), np.ones(len(generated)))


def precision_recall(
    real: NDArray[Any], generated: NDArray[Any], k: int = NEIGHBOURS
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which generated pictures lie within the real ones' manifold, (M,), and which real ones
    within the generated, (N,).

    A manifold is the balls around its pictures that reach to the k-th nearest other one
    (Kynkaanniemi et al. 2019). Their means are precision and recall, which tells diversity. Raises
    ValueError where a set has k pictures or fewer.
    """
    x, y = (np.asarray(features, np.float64) for features in (real, generated))
    if min(len(x), len(y)) <= k:
        raise ValueError(f"{len(x)} and {len(y)} pictures: the {k}-th neighbour asks for more")

    def apart(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(
            np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
        )

    radius_x, radius_y = (
        np.partition(apart(features, features), k, axis=1)[:, k] for features in (x, y)
    )  # place 0 is the picture itself
    between = apart(x, y)  # (N, M)
    return np.asarray((between <= radius_x[:, None]).any(0)), np.asarray(
        (between <= radius_y).any(1)
    )

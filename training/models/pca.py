"""Principal components of CLIP embeddings, for unCLIP's autoregressive prior and its figure 7.

Legend: B vectors, E embedding dimensions, K components.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Pca:
    """Mean and principal components of a set of vectors, the largest eigenvalue first."""

    mean: Tensor  # (E,)
    components: Tensor  # (K, E), orthonormal rows
    eigenvalues: Tensor  # (K,), variance along each, falling

    @classmethod
    def fit(cls, vectors: Tensor) -> Self:
        """Fit all E components to vectors (B, E), in float64 and in bounded memory."""
        mean = vectors.mean(0, dtype=torch.float64)
        covariance = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
        for part in vectors.split(ROWS_AT_ONCE):
            centred = part.double() - mean
            covariance += centred.T @ centred
        eigenvalues, columns = torch.linalg.eigh(covariance / len(vectors))  # rising
        # the signs that eigh returns are arbitrary
        signs = columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()
        return cls(
            mean.float(),
            (columns * signs).T.flip(0).float().contiguous(),
            eigenvalues.flip(0).clamp(min=0).float(),
        )

    def project(self, vectors: Tensor, count: int) -> Tensor:
        """Return the coordinates (B, count) of vectors (B, E) along the first components."""
        return (vectors - self.mean) @ self.components[:count].T

    def restore(self, coordinates: Tensor) -> Tensor:
        """Return vectors (B, E) from coordinates (B, count) along the first components.

        The other components are those of the mean.
        """
        return coordinates @ self.components[: coordinates.shape[1]] + self.mean

    def truncate(self, vectors: Tensor, count: int) -> Tensor:
        """Return vectors (B, E) with all but the first `count` components replaced by the mean's.

        Raises ValueError for a count outside 1..K.
        """
        if not 1 <= count <= len(self.components):
            raise ValueError(
                f"{count} principal components: choose from 1 to {len(self.components)}"
            )
        return self.restore(self.project(vectors, count))

    def to(self, device: torch.device | str) -> "Pca":
        """Return a copy on a device."""
        return Pca(self.mean.to(device), self.components.to(device), self.eigenvalues.to(device))

"""Gaussian noise that is the same on every device and however a batch is split.

One generator a sample, drawn on the CPU in float32, then moved: sample i's noise depends on its own seed alone.
A single `torch.Generator` draws the whole batch at once, on its own device; then the batch's size matters.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Noise = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for the batch, one a sample, or torch's global one."""


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator a sample, from its own seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(shape: Sequence[int], generator: Noise = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw eps ~ N(0, I) of shape (B, ...); with one generator a sample there must be B of them, each advanced by its sample's size."""
    if generator is None or isinstance(generator, torch.Generator):
        where = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=where).to(device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one a sample")
    eps = torch.empty(*shape)
    for sample, own in zip(eps, generator, strict=True):
        sample.normal_(generator=own)
    return eps.to(device, dtype)


def noise_like(x: Tensor, generator: Noise = None) -> Tensor:
    """Draw noise of x's shape, device and dtype."""
    return noise(x.shape, generator, x.device, x.dtype)

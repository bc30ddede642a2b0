"""Gaussian noise that is the same on every device and for every way to split a batch.

With one generator for each sample, noise is drawn on the CPU in float32 and then moved, so the
noise of a sample depends on its own seed alone. A single `torch.Generator` draws the whole batch at
once on its own device; the noise then depends on the batch size.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

Noise = torch.Generator | Sequence[torch.Generator] | None
"""Source of noise: one generator for the batch, one for each sample, or None for torch's global
one."""


SEED_BITS = 29


class Stream(IntEnum):
    """Purpose of noise. An image has one seed, and each purpose derives its own generator from it,
    so no two purposes use the same noise.
    """

    UPSAMPLER = 0  # x_T of the first up-sampler; also for callers with one purpose only
    PRIOR = 1  # all noise of a candidate z_i
    DECODER = 2  # x_T, and what an ancestral sampler adds to it
    STEPS = 3  # noise of the steps that start at a known x_T or x_t
    DATA = 4  # noise added to real images
    LIKELIHOOD = 5  # noise added to held-out images to measure their likelihood
    UPSAMPLER_2 = 6  # x_T of the second up-sampler


def generators(seeds: Iterable[int], stream: int = 0) -> list[torch.Generator]:
    """Return one CPU generator for each seed, of a stream from 0 to 7.

    torch's CPU generator uses only 32 bits of a seed. The stream takes the upper three of them, so
    streams never overlap; within a stream, seeds are distinct modulo 2^29.
    """
    return [
        torch.Generator().manual_seed(seed % 2**SEED_BITS + (stream << SEED_BITS)) for seed in seeds
    ]


def noise(
    shape: Sequence[int],
    generator: Noise = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw eps ~ N(0, I) of shape (B, ...).

    A list of generators must hold B of them; each is advanced by the size of its sample.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=where).to(device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for a batch of {shape[0]}: pass one for each sample"
        )
    eps = torch.empty(*shape)
    for sample, sample_generator in zip(eps, generator, strict=True):
        sample.normal_(generator=sample_generator)
    return eps.to(device, dtype)


def noise_like(x: Tensor, generator: Noise = None) -> Tensor:
    """Draw noise with the shape, device and dtype of x."""
    return noise(x.shape, generator, x.device, x.dtype)

"""Gaussian noise that is the same on every device and however a batch is split.

One generator a sample, drawn on the CPU in float32, then moved: sample i's noise depends on its own
seed alone. A single `torch.Generator` draws the whole batch at once, on its own device; then the
batch's size matters.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

Noise = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for the batch, one a sample, or torch's global one."""


SEED_BITS = 29


class Stream(IntEnum):
    """What noise is for. A picture's seed is the same all along its way; its generators are not: no
    purpose repeats another's noise.
    """

    UPSAMPLER = 0  # where the first up-sampler starts; and whatever has one purpose only
    PRIOR = 1  # z_i, each candidate from its start to its end
    DECODER = 2  # x_T, and what an ancestral sampler adds to it
    STEPS = 3  # what is added on the way from an x_T or x_t that was there before
    DATA = 4  # put on real pictures
    LIKELIHOOD = 5  # put on held-out pictures whose likelihood is told
    UPSAMPLER_2 = 6


def generators(seeds: Iterable[int], stream: int = 0) -> list[torch.Generator]:
    """One CPU generator a sample, from its own seed and the stream, 0 to 7.

    torch's CPU generator looks at 32 bits of a seed alone, so the stream takes the upper three:
    streams never meet, and within one 2^29 seeds are told apart.
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
    """Draw eps ~ N(0, I) of shape (B, ...); with one generator a sample there must be B of them,
    each advanced by its sample's size.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=where).to(device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for a batch of {shape[0]}: give one a sample"
        )
    eps = torch.empty(*shape)
    for sample, sample_generator in zip(eps, generator, strict=True):
        sample.normal_(generator=sample_generator)
    return eps.to(device, dtype)


def noise_like(x: Tensor, generator: Noise = None) -> Tensor:
    """Draw noise of x's shape, device and dtype."""
    return noise(x.shape, generator, x.device, x.dtype)

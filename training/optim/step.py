"""The order of samples, the learning rate, and a worker's share of one training step."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from training.sections.loop_section import LoopConfig


@dataclass(frozen=True)
class Step:
    """One optimiser step as one worker sees it."""

    number: int
    first: int
    """Samples seen before this step, by all workers."""
    batch_size: int
    seed: int
    rank: int
    workers: int

    @property
    def b(self) -> int:
        """Number of this worker's samples."""
        return self.batch_size // self.workers

    def samples(self, count: int) -> Tensor:
        """Return this worker's sample indices, int64 (b,), out of `count`.

        Every epoch is a permutation that depends on the seed and the epoch.
        """
        first = self.first + self.rank * self.b
        return order(count, self.seed, first, self.b)

    def next(self) -> "Step":
        """Return the next step."""
        return replace(self, number=self.number + 1, first=self.first + self.batch_size)

    def generator(self, stream: int) -> torch.Generator:
        """Return the generator of one stream of randomness in this step, equal on every worker."""
        return mixed(self.seed, stream, self.number)

    def normal(self, stream: int, *shape: int) -> Tensor:
        """Draw N(0, 1), float32 (b, *shape).

        It is drawn for the global batch, so that a sample's noise does not depend on the workers.
        """
        return self._mine(torch.randn(self.batch_size, *shape, generator=self.generator(stream)))

    def uniform(self, stream: int, *shape: int) -> Tensor:
        """Draw uniformly from [0, 1), float32 (b, *shape), for the global batch as in `normal`."""
        return self._mine(torch.rand(self.batch_size, *shape, generator=self.generator(stream)))

    def _mine(self, x: Tensor) -> Tensor:
        return x[self.rank * self.b : (self.rank + 1) * self.b]


def mixed(*numbers: int) -> torch.Generator:
    """Return a generator that is seeded by a sequence of integers >= 0.

    torch's CPU generator uses only 32 bits of a seed, so a sum of the numbers would collide: step n
    of one stream with another step of another stream.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=mixed(seed, epoch))


def order(count: int, seed: int, first: int, number: int) -> Tensor:
    """Return samples first..first + number of the endless sequence of shuffled epochs, int64
    (number,).
    """
    parts = []
    while number > 0:
        epoch, position = divmod(first, count)
        part = _permutation(count, seed, epoch)[position : position + number]
        parts.append(part)
        first, number = first + len(part), number - len(part)
    return torch.cat(parts)


def learning_rate(config: LoopConfig, images_seen: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine to 0 (Loshchilov & Hutter 2017)."""
    done = images_seen / config.images
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    progress = min(1.0, (done - config.warmup) / (1 - config.warmup))
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

"""The settings that all models' training shares, the order of samples, and a worker's share of one
training step.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from infra.settings import Section

OnBroken = Literal["stop", "skip"]
"""What a stage does about broken shards (training.data.shard_check). Defined here because a trained
model must load without pyarrow."""


class LoopConfig(Section):
    """How a model is trained; every model's section has these fields."""

    images: int = Field(default=100_000, ge=1)
    """Length of the training, in images (or pairs) seen."""
    batch_size: int = Field(default=256, ge=1)
    """Global batch size, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak of the cosine schedule."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training in which the rate rises linearly to its peak."""
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    """Decoupled weight decay on matrices only, not on gains, biases or scales of embeddings."""
    beta_2: float = Field(default=0.98, gt=0, lt=1)
    """Adam's second decay rate; the first is 0.9."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the steps of linear layers and convolutions and uses AdamW for the
    rest; much better in short trainings."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Maximum norm of the gradient."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Final decay of the averaged weights; it rises to this value from 0.1 in the first steps."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Arithmetic of the network; losses, norms and the optimiser stay in float32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights, the order of samples and all noise."""
    state_every_s: float = Field(default=20, gt=0)
    """Seconds between writes of the state from which a killed run resumes."""
    shard: bool = False
    """Shard weights, gradients and optimiser state over the workers (FSDP), for a model that one
    device cannot hold: 16 bytes for each parameter are divided among the workers, at the cost of
    gathering the weights three times in each step. The losses are the same; a single worker
    ignores it."""
    retrain: Literal["when_data_changes", "never"] = "when_data_changes"
    """`never`: reuse the newest model with the same settings although its data has changed, as long
    as the models that it depends on (CLIP) are the same. A nightly run then embeds and indexes
    new images without training."""

    readers: int = Field(default=4, ge=1, le=256)
    """Threads of each worker that read and decode images."""
    ahead_steps: int = Field(default=2, ge=0, le=64)
    """Number of steps for which images are decoded in advance; a worker holds its share of that
    many batches. `waiting` in metrics.jsonl, the share of the time in which the first worker
    waited for images, shows whether it is enough."""
    cache_bytes: int = Field(default=4 << 30, ge=0)
    """If all decoded images fit into this many bytes, each worker holds them in memory from the
    start."""

    outside_key: ClassVar[frozenset[str]] = frozenset(
        {"state_every_s", "shard", "retrain", "readers", "ahead_steps", "cache_bytes"}
    )


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

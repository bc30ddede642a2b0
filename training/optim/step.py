"""Settings that every model's training shares, the order of samples, and a step's share of them."""

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
"""What a stage does about shards that lie (training.data.shard_check); here, because a trained
model must load without pyarrow."""


class LoopConfig(Section):
    """How a model is trained; every model's section has these fields."""

    images: int = Field(default=100_000, ge=1)
    """Length of the training in images (or pairs) seen."""
    batch_size: int = Field(default=256, ge=1)
    """Global batch, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak of the cosine schedule."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training in which the rate rises linearly to its peak."""
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    """Decoupled weight decay, on matrices only: gains, biases and embeddings' scales have none."""
    beta_2: float = Field(default=0.98, gt=0, lt=1)
    """Adam's second decay rate; the first is 0.9."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` makes the steps of linear layers and convolutions orthogonal and leaves the rest to
    AdamW: far better in short trainings."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights at the end; it grows towards this from 0.1 in the first
    steps."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Arithmetic of the network; losses, norms and the optimiser stay in float32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights, the order of samples and all noise."""
    state_every_s: float = Field(default=20, gt=0)
    """How often the state is written from which a killed run resumes, in seconds."""
    shard: bool = False
    """Give each worker a part of weights, gradients and optimiser state instead of all (FSDP), for
    a model that one device cannot hold: 16 bytes a parameter are divided among the workers, for
    three gatherings of the weights a step. Same losses; one worker ignores it."""
    retrain: Literal["when_data_changes", "never"] = "when_data_changes"
    """`never`: the newest model of these very settings stays although its data has changed, as long
    as what it builds on (CLIP) is the same; a nightly run then embeds and indexes what is new and
    trains nothing."""

    readers: int = Field(default=4, ge=1, le=256)
    """Threads of each worker that read and decode pictures."""
    ahead_steps: int = Field(default=2, ge=0, le=64)
    """For how many steps pictures are decoded before they are asked for; a worker holds its share
    of so many batches. Whether that is enough says `waiting` in metrics.jsonl: the share of the
    time in which the first worker waited for pictures."""
    cache_bytes: int = Field(default=4 << 30, ge=0)
    """Where all decoded pictures fit into so many bytes, they are held from the start instead;
    every worker holds its own."""

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
        """This worker's samples."""
        return self.batch_size // self.workers

    def samples(self, count: int) -> Tensor:
        """Return this worker's sample indices, int64 (b,), out of `count`: every epoch is a
        permutation drawn from seed and epoch.
        """
        first = self.first + self.rank * self.b
        return order(count, self.seed, first, self.b)

    def next(self) -> "Step":
        """Return the step after this one."""
        return replace(self, number=self.number + 1, first=self.first + self.batch_size)

    def generator(self, stream: int) -> torch.Generator:
        """Return the generator of one kind of randomness in this step, equal on every worker."""
        return mixed(self.seed, stream, self.number)

    def normal(self, stream: int, *shape: int) -> Tensor:
        """Draw N(0, 1), float32 (b, *shape): drawn for the global batch, so that a sample's noise
        does not depend on the workers.
        """
        return self._mine(torch.randn(self.batch_size, *shape, generator=self.generator(stream)))

    def uniform(self, stream: int, *shape: int) -> Tensor:
        """Draw from [0, 1), float32 (b, *shape), likewise."""
        return self._mine(torch.rand(self.batch_size, *shape, generator=self.generator(stream)))

    def _mine(self, x: Tensor) -> Tensor:
        return x[self.rank * self.b : (self.rank + 1) * self.b]


def mixed(*numbers: int) -> torch.Generator:
    """Return a generator of its own for some numbers >= 0, in their order.

    torch's CPU generator looks at 32 bits of a seed alone: numbers that are added up into one would
    meet, step n of a stream another's.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=mixed(seed, epoch))


def order(count: int, seed: int, first: int, number: int) -> Tensor:
    """Return the samples at places first..first + number of the endless stream of shuffled epochs,
    int64 (number,).
    """
    parts = []
    while number > 0:
        epoch, position = divmod(first, count)
        part = _permutation(count, seed, epoch)[position : position + number]
        parts.append(part)
        first, number = first + len(part), number - len(part)
    return torch.cat(parts)


def learning_rate(config: LoopConfig, images_seen: int) -> float:
    """Linear warm-up, then a cosine down to nothing (Loshchilov & Hutter 2017)."""
    done = images_seen / config.images
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    return (
        config.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * min(1.0, (done - config.warmup) / (1 - config.warmup))))
    )

"""The settings that all models' training shares."""

from typing import ClassVar, Literal

from pydantic import Field

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


def check_steps(sampling_steps: int, T: int) -> None:
    """Raise ValueError if a section asks for more sampling steps than its diffusion has."""
    if sampling_steps > T:
        raise ValueError(f"sampling_steps = {sampling_steps} but T = {T}: use at most T steps")

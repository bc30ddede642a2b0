"""The section [prior]: the prior, its training and its sampling."""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.sections.loop_section import LoopConfig, check_steps


class PriorConfig(LoopConfig):
    """The prior and its training (unCLIP, table 3: width 2048, depth 24, 1B parameters)."""

    kind: Literal["diffusion", "autoregressive"] = "diffusion"
    """How z_i is sampled: by diffusion, or coordinate by coordinate (unCLIP, section 2.2, has both
    and prefers the first)."""
    width: int = Field(default=256, ge=32, le=8192)
    """Width of the transformer."""
    depth: int = Field(default=4, ge=1, le=64)
    """Blocks of the transformer."""
    T: int = Field(default=1000, ge=2, le=100_000)
    """Diffusion steps of the cosine schedule."""
    text_drop: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that are trained without caption and z_t."""
    sampling_steps: int = Field(default=24, ge=1, le=1000)
    """Steps at sampling; unCLIP: 64."""
    sampler: Literal["ddim", "analytic"] = "ddim"
    """Sampler of the diffusion prior: DDIM with eta = 1, whose variance is the posterior's, or
    ancestral steps with the analytic variance (Bao et al. 2022), from errors that are measured
    on training pairs after training. unCLIP: analytic."""
    best_of: int = Field(default=2, ge=1, le=64)
    """Candidates that are sampled for each z_i; the one with the largest dot product with z_t is
    used. unCLIP: 2."""
    variance: float | None = Field(default=None, gt=0, le=100)
    """Variance about their mean to which embeddings are scaled, by a factor from the data; unCLIP:
    that of an image, about 0.29 (a factor of 17.2 for 1,024 dimensions). Unset: unit vectors
    times the square root of their dimension. Diffusion only."""
    pca_dims: int = Field(default=32, ge=1, le=4096)
    """Principal components of z_i that are sampled, the largest first; unCLIP: 319 of 1,024.
    Autoregressive only, like all fields below."""
    buckets: int = Field(default=256, ge=2, le=65_536)
    """Number of values that a coordinate is rounded to; unCLIP: 1,024."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Divisor of the logits at sampling; below 1 favours likely values."""

    @model_validator(mode="after")
    def _steps_fit_into_the_schedule(self) -> Self:
        check_steps(self.sampling_steps, self.T)
        return self

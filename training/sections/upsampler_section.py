"""The sections [upsampler] and [upsampler_2]: an up-sampler and its training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.sections.decoder_section import GROUPS
from training.sections.loop_section import LoopConfig, OnBroken, check_steps

Degradation = Literal["none", "blur", "bsr"]


class UpsamplerConfig(LoopConfig):
    """An up-sampler and its training.

    unCLIP, table 3: 700M parameters from 64 to 256 px, 300M from 256 to 1024 px.
    """

    image_size_px: int = Field(default=256, ge=16, le=8192)
    """Side of the images that it is trained on crops of; unCLIP: 256 and 1024."""
    factor: int = Field(default=4, ge=2, le=16)
    """The side of the result divided by the side of the small image; unCLIP: 4."""
    crop_fraction: float = Field(default=0.25, gt=0, le=1)
    """Side of a training crop, and of a tile at sampling, divided by the image's; unCLIP: 0.25."""
    patch_px: int = Field(default=4, ge=1, le=16)
    """Pixels folded into channels at the input and unfolded at the output: 4 makes every step
    sixteen times cheaper. unCLIP: 1."""
    width: int = Field(default=64, ge=GROUPS, le=4096)
    """Channels at the first resolution; unCLIP: 320 and 192."""
    multiples: tuple[int, ...] = Field(default=(1, 2), min_length=1, max_length=8)
    """Channels at each resolution, as multiples of `width`; each resolution has half the side of
    the one before. unCLIP: 1, 2, 3, 4 and 1, 1, 2, 2, 4, 4."""
    depth: int = Field(default=2, ge=1, le=8)
    """Residual blocks at each resolution; unCLIP: 3 and 2."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in the residual blocks; unCLIP: 0.1 and none."""
    T: int = Field(default=1000, ge=2, le=100_000)
    """Diffusion steps."""
    noise_schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule; unCLIP: cosine to 256 px, linear to 1024 px."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    """Upper bound of the signal-to-noise weight (Hang et al. 2023)."""
    degradation: Degradation = "blur"
    """Degradation of the small image in training, so that a decoder's faults are not enlarged;
    unCLIP: blur to 256 px, bsr to 1024 px."""
    degraded_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the samples that are degraded; the others stay clean, so that clean images are not
    sharpened twice."""
    sampling_steps: int = Field(default=8, ge=1, le=1000)
    """DDIM steps at sampling; unCLIP: 27 and 15."""
    broken_pictures: OnBroken = "stop"
    """What to do about images whose shard is missing, truncated or altered: `stop` with an error,
    or `skip` them and count them in the manifest."""

    @model_validator(mode="after")
    def _steps_fit_into_the_schedule(self) -> Self:
        check_steps(self.sampling_steps, self.T)
        return self

    @property
    def crop_px(self) -> int:
        """Side of a training crop and of a tile at sampling."""
        return round(self.image_size_px * self.crop_fraction)

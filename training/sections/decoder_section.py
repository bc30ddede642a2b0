"""The section [decoder]: the decoder, its training and its sampling."""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.sections.loop_section import LoopConfig, OnBroken, check_steps

GROUPS = 8
"""Groups of the group norms: the least number of channels."""
Sampler = Literal["dpm_solver", "ddim", "ancestral"]
Parametrisation = Literal["x_0", "eps", "v"]


class DecoderConfig(LoopConfig):
    """The decoder and its training (unCLIP, table 3: 3.5B parameters at 64 px)."""

    image_size_px: int = Field(default=32, ge=8, le=1024)
    """Side of the images that it draws; unCLIP: 64."""
    patch_px: int = Field(default=2, ge=1, le=8)
    """Pixels folded into channels at the input and unfolded at the output: 2 makes every step four
    times cheaper. unCLIP: 1."""
    width: int = Field(default=64, ge=GROUPS, le=4096)
    """Channels at the first resolution; unCLIP: 512."""
    multiples: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1, max_length=6)
    """Channels at each resolution, as multiples of `width`; each resolution has half the side of
    the one before. unCLIP: 1, 2, 3, 4."""
    depth: int = Field(default=1, ge=1, le=8)
    """Residual blocks at each resolution; unCLIP: 3."""
    attention_px: tuple[int, ...] = (8, 4)
    """Sides (after folding) at which positions attend to each other and to the context; unCLIP: 32,
    16, 8."""
    text_width: int = Field(default=128, ge=16, le=8192)
    """Width of the caption encoder; unCLIP: 2048."""
    text_depth: int = Field(default=1, ge=0, le=64)
    """Blocks of the caption encoder; unCLIP: 24."""
    z_tokens: int = Field(default=4, ge=0, le=64)
    """Context tokens made from z_i."""
    layout: bool = True
    """Whether the conditions also predict a map at the lowest resolution, one value for each
    channel and position. A short training then need not learn to build a layout from vectors
    that are equal at all positions. It costs `4 * width` times the map's size in parameters.
    unCLIP: no."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in the residual blocks; unCLIP: 0.1."""
    T: int = Field(default=1000, ge=2, le=100_000)
    """Diffusion steps of the cosine schedule."""
    snr_shift: float = Field(default=1.0, gt=0, le=16)
    """Factor of sqrt(SNR) at every time: 64 / image_size_px gives larger images the noise that they
    need (Hoogeboom et al. 2023, eq. 5). unCLIP: 1."""
    time_power: float = Field(default=2.0, gt=0, le=10)
    """Training times are T u^(1 / time_power) with u uniform in [0, 1). 1 is uniform (Ho et al.
    2020); larger values favour noisy steps, where z_i must decide the layout."""
    parametrisation: Parametrisation = "x_0"
    """What the network predicts. A small one that folds pixels gives cleaner images with `x_0`,
    since it need not carry the noise through its middle."""
    snr_floor: float = Field(default=1.0, ge=0)
    """Lower bound of the signal-to-noise weight of the error in x_0 (Salimans & Ho 2022): the
    noisiest steps decide the layout."""
    snr_ceiling: float = Field(default=5.0, gt=0)
    """Upper bound of that weight: gamma of min-SNR (Hang et al. 2023)."""
    learned_variance: bool = False
    """Also predict the variance of every reverse step, trained with L_simple + 0.001 L_vlb (Nichol
    & Dhariwal 2021); unCLIP: yes."""
    z_drop: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that are trained without z_i."""
    text_drop: float = Field(default=0.5, ge=0, le=1)
    """Share of samples that are trained without a caption."""
    z_noise: float = Field(default=0.0, ge=0, le=2)
    """Maximum noise that training adds to z_i, as a share of its length. The level of each sample
    is drawn between 0 and this maximum, and z_i is rescaled to its length, so that the decoder
    tolerates the errors of a prior's z_i (conditioning augmentation, Ho et al. 2022, arXiv
    2106.15282, section 4; on CLIP embeddings as in Stable unCLIP, but the network does not see
    the level). unCLIP: none."""
    sampler: Sampler = "dpm_solver"
    """DPM-Solver++(2M) and DDIM give the same image for any number of steps; ancestral sampling
    adds noise and needs many. unCLIP: ancestral."""
    sampling_steps: int = Field(default=20, ge=1, le=1000)
    """Steps at sampling; unCLIP: 250, ancestral."""
    guidance: float = Field(default=2.0, ge=0, le=50)
    """Weight of classifier-free guidance at sampling; 1 means none."""
    dynamic_threshold: float | None = Field(default=None, gt=0, le=1)
    """With guidance: the quantile of |x_0| at which each image is clamped and rescaled at every
    step (Saharia et al. 2022, section 2.3, use 0.995); unset: clamped at 1, as in unCLIP."""
    broken_pictures: OnBroken = "stop"
    """What to do about images whose shard is missing, truncated or altered: `stop` with an error,
    or `skip` them and count them in the manifest."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_steps(self.sampling_steps, self.T)
        if self.snr_floor > self.snr_ceiling:
            raise ValueError(
                f"snr_floor = {self.snr_floor:g} but snr_ceiling = {self.snr_ceiling:g}: the "
                "floor must not be above the ceiling"
            )
        return self

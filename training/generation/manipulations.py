"""unCLIP's operations on a person's images: variations, interpolation, text diffs, and
reconstruction from principal components of z_i.

An image is encoded as (z_i, x_T): its CLIP image embedding, and the noise from which the decoder,
given z_i, draws it again (DDIM inversion; Ramesh et al. 2022, section 3). Functions over a loaded
`Unclip`; they read and write no files, except that `read` reads image files. Input images are uint8
(B, H, W, 3) squares of any side; output images are uint8 (…, S, S, 3).
Legend: B images, C columns, E embedding dimensions, S the decoder's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.image_reader import read_file
from training.diffusion import samplers
from training.diffusion.calibration import Calibration, calibrate
from training.diffusion.noise import Stream, generators, noise
from training.diffusion.trajectories import slerp
from training.generation.unclip import BATCH, SEED_STRIDE, Unclip
from training.models import clip as clip_model
from training.models.pca import Pca
from training.models.pixels import to_images, to_pixels

STEPS = 25
REFINEMENTS = 1
"""Refinements of each inverted step; each costs one network call."""
POINTS = 24
"""Number of times at which the decoder is calibrated on the images to invert, one network call
each. Without calibration a decoder that predicts x_0 blurs them near the data (quickstart, 25
steps: 30 dB without, 48 dB with it; 27 dB with it but without the refinement)."""


@dataclass(frozen=True)
class Latents:
    """The encoding of images as (z_i, x_T), and how well they are rebuilt from it."""

    z_i: Tensor  # (B, E)
    x_T: Tensor  # (B, 3, S, S)  # noqa: N815
    calibration: Calibration  # of the decoder; x_T gives the images back only with it
    rebuilt: np.ndarray  # uint8 (B, S, S, 3)
    psnr_db: list[float]
    """Peak signal-to-noise ratio of each `rebuilt` image to its original."""


def read(model: Unclip, files: Sequence[Path]) -> np.ndarray:
    """Read image files, uint8 (B, H, W, 3), at the larger of the sides of CLIP and the decoder.

    Raises CallerError for a file that is not an image.
    """
    side_px = max(model.decoder.config.image_size_px, model.clip.config.image_size_px)
    return np.stack([read_file(file, side_px) for file in files])


def as_drawn(model: Unclip, pictures: np.ndarray) -> np.ndarray:
    """Return images, uint8 (B, H, W, 3), at the decoder's side: the best that it could draw."""
    return to_images(to_pixels(torch.from_numpy(pictures), model.decoder.config.image_size_px))


def invert(
    model: Unclip, pictures: np.ndarray, steps: int = STEPS, guidance: float | None = None
) -> Latents:
    """Find z_i and x_T of images, and rebuild the images from them.

    Later drawings must use the same steps and guidance.
    """
    x_0 = to_pixels(torch.from_numpy(pictures), model.decoder.config.image_size_px).to(model.device)
    z_i = embed(model, pictures)
    denoise = _denoise(model, z_i, guidance)
    calibration = calibrate(
        denoise, x_0, model.decoder.schedule, POINTS, generators(range(len(x_0)), Stream.DATA)
    )
    x_T = samplers.ddim_invert(
        calibration(denoise), x_0, model.decoder.schedule, steps, REFINEMENTS
    )
    rebuilt = draw(model, z_i, x_T, steps, guidance, calibration=calibration)
    psnr = [psnr_db(a, b) for a, b in zip(to_images(x_0), rebuilt, strict=True)]
    return Latents(z_i, x_T, calibration, rebuilt, psnr)


@dataclass(frozen=True)
class StepNoise:
    """Noise that each DDIM step adds."""

    eta: float
    seeds: list[int]
    """One for each image."""


def draw(
    model: Unclip,
    z_i: Tensor,
    x_T: Tensor,
    steps: int = STEPS,
    guidance: float | None = None,
    step_noise: StepNoise | None = None,
    calibration: Calibration | None = None,
) -> np.ndarray:
    """Decode pairs (z_i, x_T), (B, E) and (B, 3, S, S), by DDIM without a caption.

    guidance: None for the decoder's config. calibration: that of the inversion which found x_T. It
    fades with eta, since the noise that steps add is not part of the image.
    """
    eta = step_noise.eta if step_noise is not None else 0.0
    images = []
    for start in range(0, len(z_i), BATCH):
        part = slice(start, start + BATCH)
        options = samplers.DEFAULTS
        if step_noise is not None:
            step_generators = generators(step_noise.seeds[part], Stream.STEPS)
            options = samplers.SamplerOptions(generator=step_generators)
        denoise = _denoise(model, z_i[part], guidance)
        if calibration is not None:
            denoise = calibration.faded(eta)(denoise)
        x_0 = samplers.ddim(denoise, x_T[part], model.decoder.schedule, steps, eta, options)
        images.append(to_images(x_0))
    return np.concatenate(images)


def variations(
    model: Unclip,
    pictures: np.ndarray,
    count: int,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Draw images of each input image's z_i, (B, count, S, S, 3), each from its own noise."""
    S = model.decoder.config.image_size_px
    z_i = embed(model, pictures).repeat_interleave(count, 0)
    seeds = [seed * SEED_STRIDE + number for number in range(count)] * len(pictures)
    x_T = noise((len(z_i), 3, S, S), generators(seeds, Stream.DECODER), model.device)
    drawn = draw(model, z_i, x_T, steps, guidance)
    return drawn.reshape(len(pictures), count, S, S, 3)


def vary(
    model: Unclip,
    latents: Latents,
    eta: float,
    count: int,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Draw variations of the first image, (count, S, S, 3) (Ramesh et al. 2022, section 3.1).

    DDIM from its (z_i, x_T) with eta; eta = 0 gives the image itself.
    """
    seeds = [seed * SEED_STRIDE + number for number in range(count)]
    return draw(
        model,
        latents.z_i[:1].expand(count, -1),
        latents.x_T[:1].expand(count, -1, -1, -1),
        steps,
        guidance,
        StepNoise(eta, seeds),
        latents.calibration,
    )


def interpolate(
    model: Unclip,
    z_i: Tensor,
    columns: int,
    seed: int = 0,
    latents: Latents | None = None,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Interpolate from the first z_i to the second, (2, E), in one row (columns, S, S, 3).

    By slerp (Ramesh et al. 2022, section 3.2). The decoder's noise is the seed's, the same along
    the row; or, given the latents of both images, the slerp of their x_T.
    """
    weights = torch.linspace(0, 1, columns).tolist()
    z = torch.cat([slerp(z_i[:1], z_i[1:2], weight) for weight in weights])
    if latents is None:
        S = model.decoder.config.image_size_px
        seed_generators = generators([seed * SEED_STRIDE], Stream.DECODER)
        x_T = noise((1, 3, S, S), seed_generators, model.device).expand(columns, -1, -1, -1)
    else:
        x_T = torch.cat([slerp(latents.x_T[:1], latents.x_T[1:2], weight) for weight in weights])
    calibration = latents.calibration if latents else None
    return draw(model, z, x_T, steps, guidance, calibration=calibration)


def text_diff(
    model: Unclip,
    latents: Latents,
    captions: tuple[str, str],
    theta: float = 0.5,
    columns: int = 8,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Move the first image from one caption towards another, (columns, S, S, 3).

    slerp(z_i, z_d, 0..theta) with x_T fixed, where z_d = norm(z_t(to) - z_t(from)) for `captions`
    (from, to) (Ramesh et al. 2022, section 3.3). theta is a share of the angle between z_i and z_d;
    unCLIP stops at 0.25 to 0.5. Raises ValueError if CLIP embeds the captions equally.
    """
    z_d = difference(model, *captions).to(latents.z_i)
    weights = torch.linspace(0, theta, columns).tolist()
    z = torch.cat([slerp(latents.z_i[:1], z_d, weight) for weight in weights])
    return draw(
        model,
        z,
        latents.x_T[:1].expand(columns, -1, -1, -1),
        steps,
        guidance,
        calibration=latents.calibration,
    )


def difference(model: Unclip, before: str, after: str) -> Tensor:
    """Return the unit vector (1, E) from one caption's text embedding to another's.

    Raises ValueError if the two are equal.
    """
    z_t = torch.from_numpy(model.encode_texts([before, after]))
    z_d = z_t[1:] - z_t[:1]
    if float(z_d.norm()) < 1e-6:
        raise ValueError(
            f"CLIP embeds {before!r} and {after!r} equally: choose two different captions"
        )
    return F.normalize(z_d, dim=-1)


def reconstruct(
    model: Unclip,
    z_i: Tensor,
    pca: Pca,
    dims: list[int],
    seed: int = 0,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Draw images from the first principal components of z_i (B, E) (Ramesh et al. 2022, figure 7).

    One image for each number of components in `dims`, and one from all: (B, len(dims) + 1, S, S,
    3). The decoder's noise is the seed's for all images.
    """
    truncated = [pca.truncate(z_i, count) for count in dims]
    z = F.normalize(torch.stack([*truncated, z_i], 1), dim=-1)  # (B, C, E)
    B, C, _ = z.shape
    S = model.decoder.config.image_size_px
    seed_generators = generators([seed * SEED_STRIDE], Stream.DECODER)
    x_T = noise((1, 3, S, S), seed_generators, model.device).expand(B * C, -1, -1, -1)
    return draw(model, z.flatten(0, 1), x_T, steps, guidance).reshape(B, C, S, S, 3)


def embed(model: Unclip, pictures: np.ndarray) -> Tensor:
    """Return z_i of images, unit vectors (B, E) on the model's device."""
    return clip_model.embed_images(model.clip, torch.from_numpy(pictures)).to(model.device)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB, at most 99 (equal)."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * float(np.log10(255**2 / error)))


def _denoise(model: Unclip, z_i: Tensor, guidance: float | None) -> samplers.Denoise:
    no_caption = model.tokenizer([""]).expand(len(z_i), -1).to(model.device)
    w = model.decoder.config.guidance if guidance is None else guidance
    return model.decoder.guided_denoise(z_i, no_caption, w)

"""What unCLIP does to pictures one has: variations, interpolation, text diffs, and what each
principal component of z_i holds.

A picture is split into (z_i, x_T): its CLIP image embedding, and the noise from which the decoder,
given z_i, draws it back (DDIM inversion; Ramesh et al. 2022, section 3). Functions over a loaded
`Unclip`; they read and write no files. Pictures in are uint8 (B, H, W, 3) squares of any side;
pictures out are uint8 (…, S, S, 3).
Legend: B pictures, C columns, E embedding dimensions, S the decoder's side.
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
"""Of each inverted step, a network call each."""
POINTS = 24
"""Times at which the decoder is calibrated on the pictures that are inverted, a network call each;
without it a decoder that predicts x_0 blurs them near the data (quickstart, 25 steps: 30 dB
without, 48 with it; without the refinement 27)."""


@dataclass(frozen=True)
class Latents:
    """What a picture is to the decoder, and how well it comes back from that."""

    z_i: Tensor  # (B, E)
    x_T: Tensor  # (B, 3, S, S)  # noqa: N815
    calibration: Calibration  # with which the decoder was read; x_T means the pictures to no other
    rebuilt: np.ndarray  # uint8 (B, S, S, 3)
    psnr_db: list[float]
    """Peak signal-to-noise ratio of `rebuilt` to the picture."""


def read(model: Unclip, files: Sequence[Path]) -> np.ndarray:
    """Read picture files at the larger of the sides that CLIP and the decoder want, uint8 (B, H, W,
    3). Raises CallerError.
    """
    side_px = max(model.decoder.config.image_size_px, model.clip.config.image_size_px)
    return np.stack([read_file(file, side_px) for file in files])


def as_drawn(model: Unclip, pictures: np.ndarray) -> np.ndarray:
    """Return pictures, uint8 (B, H, W, 3), at the decoder's side: what it would draw at best."""
    return to_images(to_pixels(torch.from_numpy(pictures), model.decoder.config.image_size_px))


def invert(
    model: Unclip, pictures: np.ndarray, steps: int = STEPS, guidance: float | None = None
) -> Latents:
    """Find z_i and x_T of pictures, and draw them back from there: steps and guidance must be those
    of later drawings.
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
    return Latents(
        z_i,
        x_T,
        calibration,
        rebuilt,
        [psnr_db(a, b) for a, b in zip(to_images(x_0), rebuilt, strict=True)],
    )


def draw(
    model: Unclip,
    z_i: Tensor,
    x_T: Tensor,
    steps: int = STEPS,
    guidance: float | None = None,
    eta: float = 0.0,
    seeds: list[int] | None = None,
    calibration: Calibration | None = None,
) -> np.ndarray:
    """Decode pairs (z_i, x_T), (B, E) and (B, 3, S, S), by DDIM without a caption; `seeds` (B) of
    the noise that eta > 0 adds.

    calibration: that of the inversion which found x_T; the noise that eta adds is none of the
    picture's detail, so eta fades it.
    """
    pictures = []
    for start in range(0, len(z_i), BATCH):
        part = slice(start, start + BATCH)
        step_generators = generators(seeds[part], Stream.STEPS) if seeds is not None else None
        denoise = _denoise(model, z_i[part], guidance)
        if calibration is not None:
            denoise = calibration.faded(eta)(denoise)
        pictures.append(
            to_images(
                samplers.ddim(
                    denoise,
                    x_T[part],
                    model.decoder.schedule,
                    steps,
                    eta,
                    options=samplers.SamplerOptions(generator=step_generators),
                )
            )
        )
    return np.concatenate(pictures)


def variations(
    model: Unclip,
    pictures: np.ndarray,
    count: int,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Draw what the decoder makes of each picture's z_i alone, from noise of its own, (B, count, S,
    S, 3).
    """
    S = model.decoder.config.image_size_px
    z_i = embed(model, pictures).repeat_interleave(count, 0)
    seeds = [seed * SEED_STRIDE + number for number in range(count)] * len(pictures)
    drawn = draw(
        model,
        z_i,
        noise((len(z_i), 3, S, S), generators(seeds, Stream.DECODER), model.device),
        steps,
        guidance,
    )
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
    """Draw variations of the first picture, (count, S, S, 3): DDIM from its (z_i, x_T) with eta, 0
    the picture itself (section 3.1).
    """
    seeds = [seed * SEED_STRIDE + number for number in range(count)]
    return draw(
        model,
        latents.z_i[:1].expand(count, -1),
        latents.x_T[:1].expand(count, -1, -1, -1),
        steps,
        guidance,
        eta,
        seeds,
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
    """Walk the great circle from the first z_i to the second, (2, E), in one row (columns, S, S, 3)
    (section 3.2).

    The decoder's noise is the seed's, the same along the row; or, given the latents of both
    pictures, the slerp of their x_T.
    """
    weights = torch.linspace(0, 1, columns).tolist()
    z = torch.cat([slerp(z_i[:1], z_i[1:2], weight) for weight in weights])
    if latents is None:
        S = model.decoder.config.image_size_px
        noises = noise(
            (1, 3, S, S), generators([seed * SEED_STRIDE], Stream.DECODER), model.device
        ).expand(columns, -1, -1, -1)
    else:
        noises = torch.cat([slerp(latents.x_T[:1], latents.x_T[1:2], weight) for weight in weights])
    return draw(
        model, z, noises, steps, guidance, calibration=latents.calibration if latents else None
    )


def text_diff(
    model: Unclip,
    latents: Latents,
    before: str,
    after: str,
    theta: float = 0.5,
    columns: int = 8,
    steps: int = STEPS,
    guidance: float | None = None,
) -> np.ndarray:
    """Turn the first picture from one caption towards another, (columns, S, S, 3): slerp(z_i, z_d,
    0..theta), x_T fixed (section 3.3).

    z_d = norm(z_t(after) - z_t(before)). theta is a share of the angle between z_i and z_d; unCLIP
    stops at 0.25 to 0.5.
    """
    z_d = difference(model, before, after).to(latents.z_i)
    z = torch.cat(
        [
            slerp(latents.z_i[:1], z_d, weight)
            for weight in torch.linspace(0, theta, columns).tolist()
        ]
    )
    return draw(
        model,
        z,
        latents.x_T[:1].expand(columns, -1, -1, -1),
        steps,
        guidance,
        calibration=latents.calibration,
    )


def difference(model: Unclip, before: str, after: str) -> Tensor:
    """Return the unit vector (1, E) from one caption's text embedding towards another's. Raises
    ValueError where they are the same.
    """
    z_t = torch.from_numpy(model.encode_texts([before, after]))
    z_d = z_t[1:] - z_t[:1]
    if float(z_d.norm()) < 1e-6:
        raise ValueError(
            f"{before!r} and {after!r} are the same to CLIP: name two different captions"
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
    """Draw pictures from z_i (B, E) kept in so many principal components, and whole: (B, len(dims)
    + 1, S, S, 3) (figure 7).

    The decoder's noise is the seed's throughout.
    """
    truncated = [pca.truncate(z_i, count) for count in dims]
    z = F.normalize(torch.stack([*truncated, z_i], 1), dim=-1)  # (B, C, E)
    B, C, _ = z.shape
    S = model.decoder.config.image_size_px
    x_T = noise(
        (1, 3, S, S), generators([seed * SEED_STRIDE], Stream.DECODER), model.device
    ).expand(B * C, -1, -1, -1)
    return draw(model, z.flatten(0, 1), x_T, steps, guidance).reshape(B, C, S, S, 3)


def embed(model: Unclip, pictures: np.ndarray) -> Tensor:
    """Return z_i of pictures, unit vectors (B, E) on the model's device."""
    return clip_model.embed_images(model.clip, torch.from_numpy(pictures)).to(model.device)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB, at most 99 (they are
    equal).
    """
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * float(np.log10(255**2 / error)))


def _denoise(model: Unclip, z_i: Tensor, guidance: float | None) -> samplers.Denoise:
    no_caption = model.tokenizer([""]).expand(len(z_i), -1).to(model.device)
    return model.decoder.guided_denoise(
        z_i, no_caption, model.decoder.config.guidance if guidance is None else guidance
    )

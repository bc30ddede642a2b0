"""Images of the decoder's latents x_t: over time, shared by samples, interpolated (Ho et al. 2020,
figures 6 to 8).

Functions over a loaded `Unclip` or its decoder that return uint8 arrays; they read and write no
files. Without z_i the decoder gets no condition (null z_i, no caption), so that samples share only
what x_t determines.
Legend: P prompts, B images, K times, C columns, E embedding dimensions, S the decoder's side; x_0
(B, 3, S, S) in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.diffusion import trajectories
from training.diffusion.noise import Stream, generators, noise
from training.diffusion.process import Denoise, Schedule
from training.diffusion.trajectories import slerp
from training.generation.unclip import BATCH, SEED_STRIDE, Unclip
from training.models import clip as clip_model
from training.models.decoder import Decoder
from training.models.diffusion_prior import NULL_TEXT
from training.models.pixels import to_images


@dataclass(frozen=True)
class AcrossTime:
    """Samples of prompts at several times from noise to image."""

    x_t: np.ndarray  # uint8 (P, C, S, S, 3), clamped
    x_0: np.ndarray  # uint8 (P, C, S, S, 3), as predicted from that x_t
    times: list[int]  # t of each column, from T to 0


@dataclass(frozen=True)
class Shared:
    """Images, their x_t, and samples that start from each x_t."""

    x_t: np.ndarray  # uint8 (B, K, S, S, 3)
    samples: np.ndarray  # uint8 (B, K, samples, S, S, 3)
    between_samples_rms: list[float]
    """Root mean square difference of two samples from one x_t, on the scale 0 to 255, for each of
    the K times."""
    to_image_rms: list[float]
    """Root mean square difference of a sample to the image of its x_t, on the same scale."""


@torch.no_grad()
def across_time(
    model: Unclip,
    prompts: Sequence[str],
    columns: int,
    steps: int,
    seed: int,
    guidance: float | None = None,
) -> AcrossTime:
    """Follow the first image that `generate` would draw of each prompt (Ho et al. 2020, figure 6).

    By DDIM, from the same z_i and noise. guidance: None for the config's value.
    """
    decoder, device = model.decoder, model.device
    seeds = [seed * SEED_STRIDE] * len(prompts)
    z_t = clip_model.embed_texts(model.clip, model.tokenizer, list(prompts)).to(device)
    ids = model.tokenizer(list(prompts)).to(device)
    z_i = model.prior.sample(z_t, ids, seeds)
    w = decoder.config.guidance if guidance is None else guidance
    denoise = decoder.guided_denoise(z_i, ids, w)
    side_px = decoder.config.image_size_px
    x_T = noise((len(prompts), 3, side_px, side_px), generators(seeds, Stream.DECODER), device)
    x_t, x_0, times = trajectories.across_time(denoise, x_T, decoder.schedule, columns, steps)
    return AcrossTime(_to_pixels(x_t), _to_pixels(x_0), times)


@torch.no_grad()
def sharing(
    decoder: Decoder,
    x_0: Tensor,
    times: Sequence[int],
    samples: int,
    steps: int,
    seed: int,
    z_i: Tensor | None = None,
) -> Shared:
    """Sample several images from one x_t of each image (Ho et al. 2020, figure 7).

    steps: of a whole run from T; a run from t takes its share of them. z_i: the condition, (B, E).
    """
    x_t_parts, sampled_parts = [], []
    for start, part in _parts(len(x_0), samples):
        condition = z_i[part].repeat_interleave(samples, 0) if z_i is not None else None
        denoise = _denoise(decoder, condition, len(x_0[part]) * samples)
        part_x_0 = x_0[part].to(decoder.device)
        x_t, sampled = trajectories.sharing_x_t(
            denoise, part_x_0, decoder.schedule, times, samples, steps, seed + start
        )
        x_t_parts.append(x_t.cpu())
        sampled_parts.append(sampled.cpu())
    x_t = torch.cat(x_t_parts)  # (B, K, 3, S, S)
    sampled = torch.cat(sampled_parts)  # (B, K, samples, 3, S, S)
    differences = sampled - x_0[:, None, None].cpu()
    count = len(times)
    between_samples_rms = [
        _rms((2 * sampled[:, k].var(1)).mean()) if samples > 1 else 0.0 for k in range(count)
    ]
    to_image_rms = [_rms(differences[:, k].square().mean()) for k in range(count)]
    return Shared(_to_pixels(x_t), _to_pixels(sampled), between_samples_rms, to_image_rms)


@torch.no_grad()
def interpolation(
    decoder: Decoder,
    ends: tuple[Tensor, Tensor],
    times: Sequence[int],
    columns: int,
    steps: int,
    seed: int,
    z_i: tuple[Tensor, Tensor] | None = None,
) -> np.ndarray:
    """Interpolate pairs of images in x_t space and sample the results (Ho et al. 2020, figure 8).

    ends: the left and the right images, (B, 3, S, S) each. z_i: their embeddings (B, E); along a
    row the condition then follows the slerp between them. Returns uint8 (B, K, C, S, S, 3).
    """
    rows = []
    for start, part in _parts(len(ends[0]), columns):
        condition = None
        if z_i is not None:
            left_z, right_z = (side[part] for side in z_i)
            weights = torch.linspace(0, 1, columns).tolist()
            condition = torch.stack([slerp(left_z, right_z, weight) for weight in weights], 1)
            condition = condition.flatten(0, 1)
        left, right = (side[part].to(decoder.device) for side in ends)
        denoise = _denoise(decoder, condition, len(left) * columns)
        row = trajectories.interpolate_in_x_t(
            denoise, (left, right), decoder.schedule, times, columns, steps, seed + start
        )
        rows.append(row.cpu())
    return _to_pixels(torch.cat(rows))


def times_at(schedule: Schedule, shares: Sequence[float]) -> list[int]:
    """Return the times at these shares of T, at least 1, sorted and without duplicates."""
    return sorted({max(1, min(schedule.T, round(share * schedule.T))) for share in shares})


def _parts(count: int, per_part: int) -> list[tuple[int, slice]]:
    """Split `count` images into slices so that a network call gets about BATCH images.

    Each image becomes `per_part` images. Returns the start of each slice and the slice.
    """
    size = max(1, BATCH // per_part)
    return [(start, slice(start, start + size)) for start in range(0, count, size)]


def _denoise(decoder: Decoder, z_i: Tensor | None, count: int) -> Denoise:
    """Return the decoder's `denoise` with z_i (count, E) and no caption, or with no condition."""
    device = decoder.device
    null_z = decoder.null_z.expand(count, -1)
    return decoder.guided_denoise(
        null_z if z_i is None else z_i.to(device),
        NULL_TEXT.to(device).expand(count, -1),
        float(z_i is not None),
    )


def _to_pixels(x: Tensor) -> np.ndarray:
    return to_images(x.flatten(0, -4)).reshape(*x.shape[:-3], *x.shape[-2:], 3)


def _rms(square: Tensor) -> float:
    return float(square.sqrt()) * 127.5

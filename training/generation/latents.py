"""What the trained decoder's latents x_t hold, as pictures: across time, shared by samples, blended
(Ho et al. 2020, figures 6 to 8).

Functions over a loaded `Unclip` or its decoder that return uint8 arrays; they read and write no
files. Unless z_i is given the decoder is told nothing (null z_i, no caption), so that whatever
samples have in common comes from x_t alone.
Legend: P prompts, B pictures, K times, C columns, E embedding dimensions, S the decoder's side; x_0
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
    """Prompts on their way from noise to picture."""

    x_t: np.ndarray  # uint8 (P, C, S, S, 3), clamped for the eye
    x_0: np.ndarray  # uint8 (P, C, S, S, 3), as predicted from that x_t
    times: list[int]  # t of each column, from T to 0


@dataclass(frozen=True)
class Shared:
    """Pictures, their x_t, and samples of what may lie behind it."""

    x_t: np.ndarray  # uint8 (B, K, S, S, 3)
    samples: np.ndarray  # uint8 (B, K, samples, S, S, 3)
    apart: list[float]
    """Root mean square difference of two samples from one x_t on the scale 0 to 255, for each of
    the K times."""
    from_picture: list[float]
    """Likewise of a sample to the picture that x_t was made of."""


@torch.no_grad()
def across_time(
    model: Unclip,
    prompts: Sequence[str],
    columns: int,
    steps: int,
    seed: int,
    guidance: float | None = None,
) -> AcrossTime:
    """Follow the first picture that `generate` would draw of each prompt, by DDIM from the same z_i
    and noise (DDPM, figure 6).
    """
    decoder, device = model.decoder, model.device
    seeds = [seed * SEED_STRIDE] * len(prompts)
    z_t, ids = (
        clip_model.embed_texts(model.clip, model.tokenizer, list(prompts)).to(device),
        model.tokenizer(list(prompts)).to(device),
    )
    z_i = model.prior.sample(z_t, ids, seeds)
    denoise = decoder.guided_denoise(
        z_i, ids, decoder.config.guidance if guidance is None else guidance
    )
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
    """Sample several pictures from one x_t of each picture (DDPM, figure 7). steps: of a whole run;
    one from t takes its share.
    """
    x_t_parts, sampled_parts = [], []
    for start, part in _parts(len(x_0), samples):
        denoise = _denoise(
            decoder,
            z_i[part].repeat_interleave(samples, 0) if z_i is not None else None,
            len(x_0[part]) * samples,
        )
        x_t, sampled = trajectories.sharing_x_t(
            denoise,
            x_0[part].to(decoder.device),
            decoder.schedule,
            times,
            samples,
            steps,
            seed + start,
        )
        x_t_parts.append(x_t.cpu())
        sampled_parts.append(sampled.cpu())
    x_t, sampled = (
        torch.cat(x_t_parts),
        torch.cat(sampled_parts),
    )  # (B, K, 3, S, S), (B, K, samples, 3, S, S)
    differences = sampled - x_0[:, None, None].cpu()
    return Shared(
        _to_pixels(x_t),
        _to_pixels(sampled),
        [
            _rms((2 * sampled[:, k].var(1)).mean()) if samples > 1 else 0.0
            for k in range(len(times))
        ],
        [_rms(differences[:, k].square().mean()) for k in range(len(times))],
    )


@torch.no_grad()
def interpolation(
    decoder: Decoder,
    first: Tensor,
    second: Tensor,
    times: Sequence[int],
    columns: int,
    steps: int,
    seed: int,
    z_i: tuple[Tensor, Tensor] | None = None,
) -> np.ndarray:
    """Blend the x_t of pictures two by two and draw what lies behind it, uint8 (B, K, C, S, S, 3)
    (DDPM, figure 8).

    z_i: both sides' embeddings (B, E); along a row the decoder is then told the point between them
    on their great circle.
    """
    rows = []
    for start, part in _parts(len(first), columns):
        condition = None
        if z_i is not None:
            left, right = z_i[0][part], z_i[1][part]
            condition = torch.stack(
                [slerp(left, right, weight) for weight in torch.linspace(0, 1, columns).tolist()], 1
            ).flatten(0, 1)
        denoise = _denoise(decoder, condition, len(first[part]) * columns)
        a, b = first[part].to(decoder.device), second[part].to(decoder.device)
        rows.append(
            trajectories.interpolate_in_x_t(
                denoise, (a, b), decoder.schedule, times, columns, steps, seed + start
            ).cpu()
        )
    return _to_pixels(torch.cat(rows))


def times_at(schedule: Schedule, shares: Sequence[float]) -> list[int]:
    """Return the times at these shares of T, at least 1, each once, rising."""
    return sorted({max(1, min(schedule.T, round(share * schedule.T))) for share in shares})


def _parts(count: int, per_part: int) -> list[tuple[int, slice]]:
    """Cut `count` pictures, each of which becomes several, so that a network call gets BATCH or
    little more.
    """
    size = max(1, BATCH // per_part)
    return [(start, slice(start, start + size)) for start in range(0, count, size)]


def _denoise(decoder: Decoder, z_i: Tensor | None, count: int) -> Denoise:
    """Read the decoder told z_i (count, E) and no caption, or nothing."""
    device = decoder.device
    free = decoder.null_z.expand(count, -1)
    return decoder.guided_denoise(
        free if z_i is None else z_i.to(device),
        NULL_TEXT.to(device).expand(count, -1),
        float(z_i is not None),
    )


def _to_pixels(x: Tensor) -> np.ndarray:
    return to_images(x.flatten(0, -4)).reshape(*x.shape[:-3], *x.shape[-2:], 3)


def _rms(square: Tensor) -> float:
    return float(square.sqrt()) * 127.5

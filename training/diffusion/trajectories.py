"""Views of a diffusion model's latents: generation over time, samples that share an x_t, and
interpolation in x_t space (Ho et al. 2020, figures 6 to 9).

Functions over `denoise` and images; they return tensors for image grids, know no network and write
nothing.
Legend: B images, K columns or times, C channels, H x W pixels; images are float in the model's
range.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.diffusion.noise import Noise, Stream, generators, noise_like
from training.diffusion.process import Denoise, Schedule
from training.diffusion.samplers import SamplerOptions, ancestral, ddim


def across_time(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    columns: int = 9,
    steps: int = 50,
    eta: float = 0.0,
    generator: Noise = None,
) -> tuple[Tensor, Tensor, list[int]]:
    """Follow samples from noise to data (Ho et al. 2020, figure 6).

    Returns x_t and the x_0 predicted from it, both (B, columns, C, H, W), and the t of each column,
    from T down to 0. At t = 0 both are the sample. The columns are spread evenly over the sampler's
    steps.
    """
    if not 2 <= columns <= steps + 1:
        raise ValueError(f"columns = {columns} of {steps} steps: choose 2 to {steps + 1}")
    wanted = {round(i * steps / (columns - 1)) for i in range(columns - 1)}
    x_t_seen: list[Tensor] = []
    x_0_seen: list[Tensor] = []
    times: list[int] = []

    def callback(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        if step in wanted:
            x_t_seen.append(x_t.clone())
            x_0_seen.append(x_0.to(x_t.dtype, copy=True))
            times.append(t)

    end = ddim(
        denoise, x_T, schedule, steps, eta, SamplerOptions(generator=generator, callback=callback)
    )
    return torch.stack([*x_t_seen, end], dim=1), torch.stack([*x_0_seen, end], dim=1), [*times, 0]


def sharing_x_t(
    denoise: Denoise,
    x_0: Tensor,
    schedule: Schedule,
    times: Sequence[int],
    samples: int = 3,
    steps: int = 100,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noise each image to x_t once and sample p(x_0 | x_t) several times (Ho et al. 2020, figure
    7).

    The smaller t is, the more the samples share. steps: of a whole run from T; a run from t takes
    its share of them. `denoise` gets B * samples images, the samples of an image next to each
    other. Returns x_t (B, K, C, H, W) and the samples (B, K, samples, C, H, W) for the K times.
    """
    eps = noise_like(x_0, generators((seed + i for i in range(len(x_0))), Stream.DATA))
    x_t_seen, sampled = [], []
    for t in times:
        x_t = schedule.q_sample(x_0, torch.full((len(x_0),), t, device=x_0.device), eps)
        step_generators = generators(
            ((seed + i) * samples + k for i in range(len(x_0)) for k in range(samples)),
            Stream.STEPS,
        )
        sample = ancestral(
            denoise,
            x_t.repeat_interleave(samples, 0),
            schedule,
            share(steps, t, schedule),
            options=SamplerOptions(start=t, generator=step_generators),
        )
        x_t_seen.append(x_t)
        sampled.append(sample.unflatten(0, (len(x_0), samples)))
    return torch.stack(x_t_seen, dim=1), torch.stack(sampled, dim=1)


def interpolate_in_x_t(
    denoise: Denoise,
    ends: tuple[Tensor, Tensor],
    schedule: Schedule,
    times: Sequence[int],
    columns: int = 9,
    steps: int = 100,
    seed: int = 0,
) -> Tensor:
    """Interpolate pairs of images in x_t space and sample the results (Ho et al. 2020, figure 8).

    Section 4.3 and figures 8 and 9 of the paper, where t = 500. Both images of a pair, (B, C, H, W)
    each in `ends`, are noised with the same eps, so the blend (1 - w) x_t + w x_t' keeps the noise
    level of t. The samples of a row share all later noise: only w changes along it, from 0 to 1,
    where the ends are the reconstructions of the two images. `denoise` gets B * columns images,
    the columns of a row next to each other. Returns (B, K, columns, C, H, W) for the K times.
    """
    first, second = ends
    if first.shape != second.shape:
        raise ValueError(
            f"images {tuple(first.shape)} and {tuple(second.shape)}: the shapes must be equal"
        )
    seeds = range(seed, seed + len(first))
    eps = noise_like(first, generators(seeds, Stream.DATA))
    w = torch.linspace(0, 1, columns, device=first.device).view(1, columns, *[1] * (first.ndim - 1))
    rows = []
    for t in times:
        t_batch = torch.full((len(first),), t, device=first.device)
        left, right = (schedule.q_sample(x_0, t_batch, eps).unsqueeze(1) for x_0 in ends)
        x_t = torch.lerp(left, right, w.to(left.dtype)).flatten(0, 1)  # (B * columns, C, H, W)
        row_seeds = (image_seed for image_seed in seeds for _ in range(columns))
        options = SamplerOptions(start=t, generator=generators(row_seeds, Stream.STEPS))
        row = ancestral(denoise, x_t, schedule, share(steps, t, schedule), options=options)
        rows.append(row.unflatten(0, (len(first), columns)))
    return torch.stack(rows, dim=1)


def share(steps: int, t: int, schedule: Schedule) -> int:
    """Return how many of the steps of a whole run a run from t takes, at least 1.

    The density of steps in t stays the same.
    """
    return max(1, min(t, round(steps * t / schedule.T)))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate from a to b on the great circle; the angle is between whole samples (B, ...).

    Parallel samples are interpolated linearly. Unlike a linear blend it keeps the length, so it
    suits noise found by `ddim_invert` and embeddings (Ramesh et al. 2022, section 3.2).
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.view(-1, *[1] * (a.ndim - 1)).acos()
    of_a = ((1 - weight) * angle).sin() / angle.sin()
    of_b = (weight * angle).sin() / angle.sin()
    is_parallel = angle.sin() < 1e-4
    return torch.where(is_parallel, torch.lerp(a, b, weight), of_a * a + of_b * b)

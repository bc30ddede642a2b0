"""Variance of a reverse step p(x_s | x_t), s < t: fixed small or large, learned, or analytic.

Samplers use it for any pair of times, the likelihood for s = t - 1. The formulas take alpha_bar_t
and alpha_bar_s in float64, one value or a table, and know no network. `measure_x_0_error` calls a
network to fill the table of the analytic variance.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from training.diffusion.noise import Noise, noise_like
from training.diffusion.process import Denoise, Number, Schedule, posterior_coefficients, split

Variance = Literal["small", "large", "learned", "analytic"]
VARIANCES: tuple[Variance, ...] = ("small", "large", "learned", "analytic")


def small_variance(alpha_bar_t: Number, alpha_bar_s: Number) -> Number:
    """Return the variance of the posterior, exact if the data is one point (Ho et al. 2020, section
    3.2).
    """
    return posterior_coefficients(alpha_bar_t, alpha_bar_s)[2]


def large_variance(alpha_bar_t: Number, alpha_bar_s: Number) -> Number:
    """Return beta = 1 - alpha_bar_t / alpha_bar_s, exact for N(0, I) data (Ho et al. 2020, section
    3.2).
    """
    return 1 - alpha_bar_t / alpha_bar_s


def analytic_variance(alpha_bar_t: Number, alpha_bar_s: Number, x_0_error_t: Number) -> Number:
    """Return the best isotropic variance for a network with the squared error `x_0_error_t`.

    It is the variance of the posterior plus a term for the uncertainty about x_0: Bao et al. 2022
    (arXiv 2201.06503), theorem 1, with the mean squared error of x_0 in place of the second moment
    of the score.
    """
    of_x_0, _, variance = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    return variance + of_x_0**2 * x_0_error_t


def learned_deviation(alpha_bar_t: float, alpha_bar_s: float, fraction: Tensor) -> Tensor:
    """Return the standard deviation that a learned `fraction` stands for; s must be at least 1.

    Its logarithm is interpolated from the small variance (0) to the large one (1) (Nichol &
    Dhariwal 2021, eq. 15).
    """
    lower = math.log(small_variance(alpha_bar_t, alpha_bar_s)) / 2
    upper = math.log(large_variance(alpha_bar_t, alpha_bar_s)) / 2
    return torch.mul(fraction.float(), upper - lower).add_(lower).exp_()


def check_variance(variance: str, x_0_error: Tensor | None, schedule: Schedule) -> None:
    """Raise ValueError for an unknown kind, or for "analytic" without a table of T + 1 errors."""
    if variance not in VARIANCES:
        raise ValueError(f"variance = {variance!r}: choose one of {', '.join(VARIANCES)}")
    if variance == "analytic" and (x_0_error is None or x_0_error.shape != (schedule.T + 1,)):
        raise ValueError(
            f"variance = 'analytic' needs x_0_error of shape ({schedule.T + 1},): take it from "
            "measure_x_0_error"
        )


def log_variance_bounds(
    schedule: Schedule, variance: Variance, x_0_error: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log variances of p(x_{t-1} | x_t) for t = 1..T as (lower, upper), float64 (T,) each.

    The two differ only for the learned variance. The variance of the posterior is 0 at t = 1; its
    value at t = 2 replaces it there (Nichol & Dhariwal 2021).
    """
    check_variance(variance, x_0_error, schedule)
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    if variance == "analytic":
        assert x_0_error is not None
        best = analytic_variance(alpha_bar_t, alpha_bar_s, x_0_error[1:].double()).log()
        return best, best
    large = large_variance(alpha_bar_t, alpha_bar_s).log()
    small = small_variance(alpha_bar_t, alpha_bar_s).log()
    small[0] = small[1] if schedule.T > 1 else large[0]
    return large if variance == "large" else small, small if variance == "small" else large


@torch.no_grad()
def measure_x_0_error(
    denoise: Denoise, x_0: Tensor, schedule: Schedule, points: int = 32, generator: Noise = None
) -> Tensor:
    """Measure the mean squared error per dimension of `denoise` on data x_0 (B, ...).

    It is measured at `probe_times`; between them error / (1 - alpha_bar) is interpolated linearly.
    Returns float64 (T + 1,), 0 at t = 0. A few hundred samples are enough, since each value is an
    average over all dimensions.
    """
    times = probe_times(schedule.T, points)
    ratios = torch.empty(len(times), dtype=torch.float64)
    for i, t in enumerate(times):
        t_batch = t.expand(len(x_0)).to(x_0.device)
        x_t = schedule.q_sample(x_0, t_batch, noise_like(x_0, generator))
        error = (split(denoise(x_t, t_batch))[0] - x_0).double().square().mean()
        ratios[i] = error.cpu() / (1 - schedule.alpha_bar[t])
    ratio = np.interp(np.arange(schedule.T + 1), times.numpy(), ratios.numpy())
    return torch.from_numpy(ratio) * (1 - schedule.alpha_bar)


def probe_times(T: int, points: int) -> Tensor:
    """Return about `points` times in 1..T, rising int64, with both ends: half even in t, half in
    log t.

    The error of a denoiser changes slowly for most t, but within a few steps near the data.
    """
    half = max(2, min(points // 2, T))
    even, geometric = torch.linspace(1, T, half), torch.logspace(0, np.log10(T), half)
    return torch.cat([even, geometric]).round().long().clamp(1, T).unique()

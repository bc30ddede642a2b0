"""Samplers as plain functions over `denoise(x_t, t) -> x_0`: ancestral, DDIM and its inversion,
DPM-Solver++(2M). Guidance wraps `denoise`.

They know a schedule, but no network. A step is `x_s = a x_t + b x_0 + sigma z`, done in place on
the sampler's own copy with float64 coefficients; besides the network's output it allocates at most
the noise. `steps` counts network calls.
Legend: B batch; x_t and x_0 (B, ...), t (B,) int64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from infra.errors import DataError
from training.diffusion.noise import Noise, noise_like
from training.diffusion.process import (
    Denoise,
    Prediction,
    Schedule,
    clipped,
    posterior_coefficients,
    split,
)
from training.diffusion.variance import (
    Variance,
    analytic_variance,
    check_variance,
    large_variance,
    learned_deviation,
    small_variance,
)

Spacing = Literal["uniform", "log_snr"]
Callback = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True)
class SamplerOptions:
    """Options that all samplers share."""

    spacing: Spacing | None = None
    """Distances between times; None: "log_snr" for DPM-Solver++, "uniform" for the others."""
    start: int | None = None
    """The t of the given x, and for `ddim_invert` the t to reach; None: T."""
    generator: Noise = None
    """Source of the noise that steps add; deterministic samplers do not use it."""
    callback: Callback | None = None
    """Called with (step, t, x_t, x_0) before x_t is overwritten: clone the tensors to keep them."""


DEFAULTS = SamplerOptions()


def timesteps(
    schedule: Schedule, steps: int, spacing: Spacing = "uniform", start: int | None = None
) -> list[int]:
    """Return the times that a sampler visits: `start` (default: T), `steps` - 1 falling times, and
    0.

    The times have equal distances in t ("uniform"), or in log SNR from the noisy end to t = 1
    ("log_snr"). If rounding repeats a time, the next free one is used. The noisy end is log SNR =
    -5 for up to 25 steps: the cosine schedule reaches -20, and on mixtures with a known denoiser
    the steps spent there more than doubled the error of DPM-Solver++. Beyond 25 steps the noisy end
    falls with the solver's own error, which is proportional to 1 / steps^2.
    """
    start = schedule.T if start is None else start
    if not 1 <= start <= schedule.T:
        raise ValueError(f"start = {start}: it must lie in 1..{schedule.T}")
    if not 1 <= steps <= start:
        raise ValueError(f"steps = {steps} from t = {start}: choose 1 to {start} steps")
    if spacing == "uniform":
        times = [round(start * (steps - i) / steps) for i in range(steps)]
    elif spacing == "log_snr":
        noisy = max(-5 - 2 * math.log(max(1, steps / 25)), float(schedule.log_snr[start]))
        wanted = torch.linspace(noisy, float(schedule.log_snr[1]), steps, dtype=torch.float64)
        times = (wanted[:, None] - schedule.log_snr[1 : start + 1]).abs().argmin(1).add(1).tolist()
        times[0] = start
    else:
        raise ValueError(f"spacing = {spacing!r}: choose 'uniform' or 'log_snr'")
    for i in range(1, steps):
        times[i] = max(min(times[i], times[i - 1] - 1), steps - i)
    return [*times, 0]


@torch.no_grad()
def ancestral(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    steps: int | None = None,
    variance: Variance = "small",
    x_0_error: Tensor | None = None,
    options: SamplerOptions = DEFAULTS,
) -> Tensor:
    """Sample by Algorithm 2 of Ho et al. 2020, in all T steps by default.

    The last step adds no noise. variance: "small", "large", "learned" (`denoise` returns
    (x_0, fraction)) or "analytic" (needs `x_0_error` from measure_x_0_error).
    """
    check_variance(variance, x_0_error, schedule)
    start, generator = options.start, options.generator
    count = (start or schedule.T) if steps is None else steps
    times = timesteps(schedule, count, options.spacing or "uniform", start)
    x_t, network = _begin(x_T), _CheckedDenoise(denoise, schedule)
    for step, (t, s) in enumerate(pairwise(times)):
        x_0, fraction = network(step, t, x_t, options.callback)
        alpha_bar_t, alpha_bar_s = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s])
        of_x_0, of_x_t, _ = posterior_coefficients(alpha_bar_t, alpha_bar_s)
        x_t.mul_(of_x_t).add_(x_0, alpha=of_x_0)
        del x_0  # frees memory for the noise
        if s == 0:
            break
        if variance == "learned":
            if fraction is None:
                raise ValueError(
                    "variance = 'learned', but the network returned no fraction at step "
                    f"{step} (t = {t}): return (x_0, fraction)"
                )
            deviation = learned_deviation(alpha_bar_t, alpha_bar_s, fraction)
            x_t.addcmul_(deviation, noise_like(x_t, generator))
            continue
        if variance == "analytic":
            assert x_0_error is not None
            sigma_squared = analytic_variance(alpha_bar_t, alpha_bar_s, float(x_0_error[t]))
        else:
            fixed_variance = small_variance if variance == "small" else large_variance
            sigma_squared = fixed_variance(alpha_bar_t, alpha_bar_s)
        x_t.add_(noise_like(x_t, generator), alpha=math.sqrt(sigma_squared))
    network.finish()
    return x_t


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    options: SamplerOptions = DEFAULTS,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

    eta = 0 is deterministic, eta = 1 has the small ancestral variance. The last step ends at
    alpha_bar = 1, which is x_0 itself.
    """
    x_t, network = _begin(x_T), _CheckedDenoise(denoise, schedule)
    times = timesteps(schedule, steps, options.spacing or "uniform", options.start)
    for step, (t, s) in enumerate(pairwise(times)):
        of_x_0, of_x_t, sigma = ddim_coefficients(
            float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s]), eta
        )
        x_0, _ = network(step, t, x_t, options.callback)
        x_t.mul_(of_x_t).add_(x_0, alpha=of_x_0)
        del x_0
        if sigma > 0:
            x_t.add_(noise_like(x_t, options.generator), alpha=sigma)
    network.finish()
    return x_t


def ddim_coefficients(
    alpha_bar_t: float, alpha_bar_s: float, eta: float
) -> tuple[float, float, float]:
    """Return the factors of x_0, x_t and the noise in a DDIM step from t to s.

    arXiv 2010.02502, eq. 12 with eps written out; sigma by eq. 16.
    """
    sigma = eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
    if eta < 0 or sigma**2 > 1 - alpha_bar_s:
        raise ValueError(
            f"eta = {eta:g}: a step would add more noise than its end has; use eta from 0 to 1"
        )
    of_x_t = math.sqrt((1 - alpha_bar_s - sigma**2) / (1 - alpha_bar_t))
    return math.sqrt(alpha_bar_s) - of_x_t * math.sqrt(alpha_bar_t), of_x_t, sigma


@torch.no_grad()
def ddim_invert(
    denoise: Denoise,
    x_0: Tensor,
    schedule: Schedule,
    steps: int,
    refinements: int = 0,
    options: SamplerOptions = DEFAULTS,
) -> Tensor:
    """Find the x_T (or x at `start`) from which `ddim` with eta = 0 and these steps returns x_0.

    arXiv 2010.02502, section 4.3. A step up from s to t needs eps at the x_t that it looks for, so
    it uses eps at x_s. Each refinement costs one more network call: it moves x_t by the difference
    between x_s and the step down from x_t (Pan et al. 2023, arXiv 2309.04907, iterate like this),
    divided by the slope of this step for N(0, I) data. Without the slope the iteration is slow
    where alpha_bar is near 0.
    """
    x_s, network = _begin(x_0), _CheckedDenoise(denoise, schedule)
    times = timesteps(schedule, steps, options.spacing or "uniform", options.start)
    for step, (s, t) in enumerate(pairwise(reversed(times))):
        alpha_bar_t, alpha_bar_s = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s])
        growth = math.sqrt(alpha_bar_t / alpha_bar_s)
        of_eps = (math.sqrt(1 - alpha_bar_t) - growth * math.sqrt(1 - alpha_bar_s)) / math.sqrt(
            1 - alpha_bar_t
        )
        predicted, _ = network(step, t, x_s, options.callback)
        x_t = torch.sub(x_s, predicted, alpha=math.sqrt(alpha_bar_t))
        x_t.mul_(of_eps).add_(x_s, alpha=growth)
        of_x_0, of_x_t, _ = ddim_coefficients(alpha_bar_t, alpha_bar_s, eta=0.0)
        slope = of_x_t + of_x_0 * math.sqrt(alpha_bar_t)
        for _ in range(refinements):
            del predicted
            predicted, _ = network(step, t, x_t, None)
            x_t.mul_(1 - of_x_t / slope)
            x_t.sub_(predicted, alpha=of_x_0 / slope).add_(x_s, alpha=1 / slope)
        x_s = x_t
    network.finish()
    return x_s


@torch.no_grad()
def dpm_solver(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    options: SamplerOptions = DEFAULTS,
) -> Tensor:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first and the last step are of first order.
    """
    x_t, network = _begin(x_T), _CheckedDenoise(denoise, schedule)
    half_log_snr = (schedule.log_snr / 2).tolist()  # lambda in the paper
    times = timesteps(schedule, steps, options.spacing or "log_snr", options.start)
    previous_x_0: Tensor | None = None
    previous_h = math.inf
    for step, (t, s) in enumerate(pairwise(times)):
        x_0, _ = network(step, t, x_t, options.callback)
        h = half_log_snr[s] - half_log_snr[t]  # infinite in the last step, which returns x_0
        shrink = math.sqrt((1 - schedule.alpha_bar[s]) / (1 - schedule.alpha_bar[t]))
        gain = -math.sqrt(schedule.alpha_bar[s]) * math.expm1(-h)
        extrapolation = h / (2 * previous_h) if s > 0 else 0.0  # 1 / (2 r), 0 in the first step
        x_t.mul_(shrink).add_(x_0, alpha=gain * (1 + extrapolation))
        if extrapolation > 0 and previous_x_0 is not None:
            x_t.add_(previous_x_0, alpha=-gain * extrapolation)
        previous_x_0, previous_h = x_0, h
    network.finish()
    return x_t


def guided(
    denoise: Denoise, w: float, dynamic_threshold: float | None = None, clip: float | None = None
) -> Denoise:
    """Add classifier-free guidance in one network call: x_0 = x_0_u + w (x_0_c - x_0_u).

    Ho & Salimans 2022; the formula is the same for eps and x_0. `denoise` gets x_t and t twice, (2
    B, ...): it must read the first half with the condition and the second half without. Each sample
    is then thresholded at its `dynamic_threshold` quantile of |x_0| (Saharia et al. 2022, section
    2.3), or clamped to [-clip, clip]. A learned variance is that of the conditioned half.
    """
    if dynamic_threshold is not None and not 0 < dynamic_threshold <= 1:
        raise ValueError(
            f"dynamic_threshold = {dynamic_threshold:g}: it must be a quantile of |x_0| in "
            "(0, 1], such as 0.995"
        )

    def denoise_guided(x_t: Tensor, t: Tensor) -> Prediction:
        # The doubled x_t has no name, so that its memory is free before the threshold.
        x_0, fraction = split(
            denoise(x_t.repeat(2, *[1] * (x_t.ndim - 1)), t.repeat(2))
        )  # (2 B, ...)
        if len(x_0) != 2 * len(x_t):
            raise ValueError(
                f"the network returned {len(x_0)} samples for {2 * len(x_t)}: with guidance it "
                "gets a conditioned and an unconditioned half"
            )
        conditioned, unconditioned = x_0.chunk(2)
        x_0 = torch.lerp(unconditioned, conditioned, w)
        del conditioned, unconditioned  # frees memory for the threshold
        if dynamic_threshold is not None:
            x_0 = threshold(x_0, dynamic_threshold)
        elif clip is not None:
            x_0 = clipped(x_0, clip)
        return x_0 if fraction is None else (x_0, fraction.chunk(2)[0])

    return denoise_guided


def threshold(x_0: Tensor, quantile: float) -> Tensor:
    """Clamp each sample to the quantile of its |x_0|, at least 1, and divide by it, in place.

    Saharia et al. 2022, section 2.3.
    """
    size = x_0[0].numel()
    # topk of a few values: kthvalue and quantile would sort all, in three times the memory
    count = size - max(1, math.ceil(quantile * size)) + 1
    limit = x_0.abs().flatten(1).topk(count, dim=1).values[:, -1].clamp(min=1)
    limit = limit.view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp_(-limit, limit).div_(limit)


def _begin(x: Tensor) -> Tensor:
    """Return a copy that the sampler may change, in float32 at least."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: pass a floating-point batch (B, ...)")
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


class _CheckedDenoise:
    """Calls `denoise` and checks its output for NaN and infinity.

    The check is immediate on the CPU. On an accelerator it comes at the end, so that no step waits.
    """

    def __init__(self, denoise: Denoise, schedule: Schedule) -> None:
        self.denoise, self.T = denoise, schedule.T
        self.sums: list[tuple[int, int, Tensor]] = []

    def __call__(
        self, step: int, t: int, x_t: Tensor, callback: Callback | None
    ) -> tuple[Tensor, Tensor | None]:
        x_0, fraction = split(self.denoise(x_t, torch.full((len(x_t),), t, device=x_t.device)))
        if x_0.shape != x_t.shape:
            raise ValueError(
                f"the network returned {tuple(x_0.shape)} for {tuple(x_t.shape)} at step {step} "
                f"(t = {t}): the shapes must be equal"
            )
        if x_0.data_ptr() == x_t.data_ptr():
            x_0 = x_0.clone()  # the network returned its input, and x_t changes in place
        total = x_0.sum(dtype=torch.promote_types(x_0.dtype, torch.float32))
        self.sums.append(
            (step, t, total if fraction is None else total + fraction.sum(dtype=total.dtype))
        )
        if x_t.device.type == "cpu":
            self.finish()
        if callback is not None:
            callback(step, t, x_t, x_0)
        return x_0, fraction

    def finish(self) -> None:
        """Raise DataError with the first step whose x_0 or variance fraction was not finite."""
        if not self.sums:
            return
        finite = torch.stack([total for _, _, total in self.sums]).isfinite().tolist()
        for (step, t, _), is_finite in zip(self.sums, finite, strict=True):
            if not is_finite:
                raise DataError(
                    f"the network returned NaN or infinity at step {step} (t = {t} of {self.T}): "
                    "check the weights and the condition"
                )
        self.sums.clear()

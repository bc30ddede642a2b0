"""The variational bound on log-likelihood in bits per dimension, and the hybrid loss that trains a
learned variance with it.

Knows a schedule and a denoiser, no network. Images are 8-bit values scaled to [-1, 1] (`levels` =
256); with `levels` = None the data are a density and the last term is its Gaussian's. Legend: B
batch; x_0 and x_t (B, ...), t (B,).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.special import log_ndtr

from infra.errors import DataError
from training.diffusion.noise import Noise, Stream, generators, noise_like
from training.diffusion.process import (
    Denoise,
    Parametrisation,
    Schedule,
    at,
    posterior,
    simple_loss,
    split,
    to_x_0,
    training_target,
)
from training.diffusion.variance import Variance, log_variance_bounds

LAMBDA_VLB = 0.001  # Nichol & Dhariwal 2021, eq. 16


def gaussian_kl(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """KL(q || p) of two Gaussians in nats, elementwise."""
    shift = (mean_q - mean_p) ** 2 * torch.exp(-log_variance_p)
    return 0.5 * (
        log_variance_p - log_variance_q + torch.exp(log_variance_q - log_variance_p) + shift - 1
    )


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, variance) in nats, elementwise."""
    return -0.5 * (
        math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance)
    )


def discretised_log_likelihood(
    x_0: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256
) -> Tensor:
    """Log of the Gaussian's mass on x_0's own level, the outermost levels reaching to infinity (Ho
    et al. 2020, eq. 13), elementwise.
    """
    half = 1 / (levels - 1)
    precision = torch.exp(-0.5 * log_variance)
    above, below = (x_0 - mean + half) * precision, (x_0 - mean - half) * precision
    above = torch.where(x_0 > 1 - half, math.inf, above)
    below = torch.where(x_0 < half - 1, -math.inf, below)
    is_right = below + above > 0  # mirror to the left tail, where log Phi keeps its digits
    upper, lower = (
        log_ndtr(torch.where(is_right, -below, above)),
        log_ndtr(torch.where(is_right, -above, below)),
    )
    return upper + torch.log(-torch.expm1(lower - upper))


def prior_term(schedule: Schedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim, (B,): what is left of the data at t = T."""
    mean, log_variance = (
        schedule.sqrt_alpha_bar[-1].to(x_0) * x_0,
        (1 - schedule.alpha_bar[-1]).log().to(x_0),
    )
    zero = torch.zeros((), dtype=x_0.dtype, device=x_0.device)
    return _bits_per_dim(gaussian_kl(mean, log_variance, zero, zero))


def vlb_term(
    schedule: Schedule,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    predicted_x_0: Tensor,
    log_variance: Tensor,
    levels: int | None = 256,
) -> Tensor:
    """L_{t-1} in bits/dim, (B,): KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 |
    x_1) where t = 1 (Ho et al. 2020, eq. 5).

    log_variance: of p, broadcastable to x_0. Sum it over t = 1..T and add `prior_term` for the
    bound.
    """
    mean_q, variance_q = posterior(schedule, x_0, x_t, t)
    mean_p, _ = posterior(schedule, predicted_x_0, x_t, t)
    is_last = t == 1
    safe = torch.where(
        is_last.view(variance_q.shape), 1.0, variance_q
    )  # q has no variance there; the decoder's term replaces it
    terms = _bits_per_dim(gaussian_kl(mean_q, safe.log(), mean_p, log_variance))
    if is_last.any():
        mean, log_variance = mean_p[is_last], log_variance.expand_as(x_0)[is_last]
        if levels is None:
            log_likelihood = gaussian_log_density(x_0[is_last], mean, log_variance)
        else:
            log_likelihood = discretised_log_likelihood(x_0[is_last], mean, log_variance, levels)
        terms = terms.masked_scatter(is_last, -_bits_per_dim(log_likelihood))
    return terms


def hybrid_loss(
    schedule: Schedule,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    prediction: Tensor,
    fraction: Tensor,
    parametrisation: Parametrisation,
    weight: Tensor | None = None,
    levels: int | None = 256,
) -> Tensor:
    """L_simple + 0.001 L_vlb for a network that gives `fraction` as well (Nichol & Dhariwal 2021,
    eq. 16).

    L_vlb, estimated as T times the drawn term, teaches the variance alone: no gradient flows from
    it to `prediction`.
    """
    prediction, fraction = prediction.float(), fraction.float()
    simple = simple_loss(
        prediction, training_target(schedule, x_0, eps, t, parametrisation), weight
    )
    x_t = schedule.q_sample(x_0, t, eps)
    with torch.no_grad():
        predicted_x_0 = to_x_0(schedule, x_t, t, prediction, parametrisation)
    log_variance = _log_variance(schedule, "learned", None, t, x_t, fraction)
    return (
        simple
        + LAMBDA_VLB
        * schedule.T
        * vlb_term(schedule, x_0, x_t, t, predicted_x_0, log_variance, levels).mean()
    )


@torch.no_grad()
def bits_per_dim(
    batches: Iterable[tuple[Tensor, Denoise]],
    schedule: Schedule,
    variance: Variance = "small",
    x_0_error: Tensor | None = None,
    draws: int | None = None,
    levels: int | None = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate -log2 p(x_0) per dimension from above, over a held-out set.

    batches: x_0 with the `denoise` that knows its condition. draws: network calls a sample for the
    terms of t = 2..T, one from each of as many stretches that are equal in log t, for most of the
    bits are near the data (all T - 1 where None); t = 1 takes one more. Noise and times depend on
    `seed` and the sample's place in the set alone. Returns bits_per_dim, its standard_error, its
    parts (prior, diffusion, decoder) and the number of samples.
    """
    start, length = _stretches(schedule.T, schedule.T - 1 if draws is None else draws)
    parts: list[Tensor] = []
    seen = 0
    for x_0, denoise in batches:
        if levels is not None and (x_0.abs() > 1 + 1e-6).any():
            raise ValueError(
                f"x_0 spans {x_0.min():.3g}..{x_0.max():.3g}: 8-bit images are scaled to [-1, 1]; "
                "densities take levels = None"
            )
        sample_noise = generators((seed + seen + i for i in range(len(x_0))), Stream.LIKELIHOOD)

        def term(
            t: Tensor,
            x_0: Tensor = x_0,
            denoise: Denoise = denoise,
            sample_noise: Noise = sample_noise,
            seen: int = seen,
        ) -> Tensor:
            t = t.to(x_0.device)
            x_t = schedule.q_sample(x_0, t, noise_like(x_0, sample_noise))
            predicted_x_0, fraction = split(denoise(x_t, t))
            log_variance = _log_variance(schedule, variance, x_0_error, t, x_t, fraction)
            bits = (
                vlb_term(schedule, x_0, x_t, t, predicted_x_0, log_variance, levels).double().cpu()
            )
            if not bits.isfinite().all():
                bad = int((~bits.isfinite()).nonzero()[0])
                raise DataError(
                    f"the bound is not finite for held-out sample {seen + bad} at t = "
                    f"{int(t[bad])}: the network gave NaN or infinity"
                )
            return bits

        times = torch.stack(
            [
                start + (torch.rand(len(start), generator=generator_of_row) * length).long()
                for generator_of_row in sample_noise
            ]
        )  # (B, draws)
        diffusion = torch.zeros(len(x_0), dtype=torch.float64)
        for t, terms in zip(times.unbind(1), length.tolist(), strict=True):
            diffusion += term(t) * terms
        decoder = term(torch.ones(len(x_0), dtype=torch.int64))
        parts.append(torch.stack([prior_term(schedule, x_0).double().cpu(), diffusion, decoder]))
        seen += len(x_0)
    if not parts:
        raise DataError("no held-out sample: bits/dim needs at least one")
    table = torch.cat(parts, 1)  # (3, N)
    prior, diffusion_mean, decoder_mean = table.mean(1).tolist()
    error = float(table.sum(0).std() / math.sqrt(seen)) if seen > 1 else math.nan
    total = prior + diffusion_mean + decoder_mean
    return {
        "bits_per_dim": total,
        "standard_error": error,
        "prior": prior,
        "diffusion": diffusion_mean,
        "decoder": decoder_mean,
        "samples": seen,
    }


def _stretches(T: int, count: int) -> tuple[Tensor, Tensor]:
    """Cut 2..T into at most `count` stretches equal in log t, at least one time in each: their
    starts and lengths, int64 (count,).
    """
    count = min(count, T - 1)
    edges = (
        torch.logspace(math.log10(2), math.log10(T + 1), count + 1, dtype=torch.float64)
        .round()
        .long()
    )
    edges = torch.maximum(edges, 2 + torch.arange(count + 1))
    return edges[:-1], edges.diff()


def _log_variance(
    schedule: Schedule,
    variance: Variance,
    x_0_error: Tensor | None,
    t: Tensor,
    x_t: Tensor,
    fraction: Tensor | None,
) -> Tensor:
    lower, upper = (
        at(bound, t - 1, x_t) for bound in log_variance_bounds(schedule, variance, x_0_error)
    )
    if variance != "learned":
        return lower
    if fraction is None:
        raise ValueError(
            "variance = 'learned', but the network gave no fraction: return (x_0, fraction)"
        )
    return lower + (upper - lower) * fraction


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)

"""The variational bound on the log-likelihood in bits per dimension, and the hybrid loss that
trains a learned variance with it.

Knows a schedule and a denoiser, but no network. Images are 8-bit values scaled to [-1, 1] (`levels`
= 256). With `levels` = None the data has a density, and the last term is the Gaussian's.
Legend: B batch; x_0 and x_t (B, ...), t (B,).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.special import log_ndtr

from infra.errors import DataError
from training.diffusion.noise import Stream, generators, noise_like
from training.diffusion.process import (
    Denoise,
    Schedule,
    at,
    posterior,
    simple_loss,
    split,
    to_x_0,
    training_target,
)
from training.diffusion.variance import Variance, log_variance_bounds
from training.sections.decoder_section import Parametrisation

LAMBDA_VLB = 0.001  # Nichol & Dhariwal 2021, eq. 16


def gaussian_kl(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """Return KL(q || p) of two Gaussians in nats, elementwise."""
    shift = (mean_q - mean_p) ** 2 * torch.exp(-log_variance_p)
    return 0.5 * (
        log_variance_p - log_variance_q + torch.exp(log_variance_q - log_variance_p) + shift - 1
    )


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log N(x; mean, variance) in nats, elementwise."""
    return -0.5 * (
        math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance)
    )


def discretised_log_likelihood(
    x_0: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256
) -> Tensor:
    """Return the log of the Gaussian's mass on the level of x_0 (Ho et al. 2020, eq. 13),
    elementwise.

    The lowest and the highest level reach to infinity.
    """
    half = 1 / (levels - 1)
    precision = torch.exp(-0.5 * log_variance)
    above, below = (x_0 - mean + half) * precision, (x_0 - mean - half) * precision
    above = torch.where(x_0 > 1 - half, math.inf, above)
    below = torch.where(x_0 < half - 1, -math.inf, below)
    is_right = below + above > 0  # mirrored to the left tail, where log Phi is accurate
    upper = log_ndtr(torch.where(is_right, -below, above))
    lower = log_ndtr(torch.where(is_right, -above, below))
    return upper + torch.log(-torch.expm1(lower - upper))


def prior_term(schedule: Schedule, x_0: Tensor) -> Tensor:
    """Return L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim, (B,): what x_T still says of x_0."""
    mean = schedule.sqrt_alpha_bar[-1].to(x_0) * x_0
    log_variance = (1 - schedule.alpha_bar[-1]).log().to(x_0)
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
    """Return L_{t-1} in bits/dim, (B,) (Ho et al. 2020, eq. 5).

    It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or -log p(x_0 | x_1) where t = 1. The sum
    over t = 1..T plus `prior_term` is the bound. log_variance: of p, broadcastable to x_0.
    """
    mean_q, variance_q = posterior(schedule, x_0, x_t, t)
    mean_p, _ = posterior(schedule, predicted_x_0, x_t, t)
    is_last = t == 1
    # q has no variance at t = 1; the decoder's term replaces that value below
    safe_variance_q = torch.where(is_last.view(variance_q.shape), 1.0, variance_q)
    terms = _bits_per_dim(gaussian_kl(mean_q, safe_variance_q.log(), mean_p, log_variance))
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
    prediction: tuple[Tensor, Tensor],
    parametrisation: Parametrisation,
    weight: Tensor | None = None,
) -> Tensor:
    """Return L_simple + 0.001 L_vlb for 8-bit images (Nichol & Dhariwal 2021, eq. 16).

    prediction: the network's prediction and its variance fraction. L_vlb, estimated as T times the
    term of the drawn t, trains only the fraction: no gradient flows from it to the prediction.
    """
    predicted, fraction = (part.float() for part in prediction)
    simple = simple_loss(predicted, training_target(schedule, x_0, eps, t, parametrisation), weight)
    x_t = schedule.q_sample(x_0, t, eps)
    with torch.no_grad():
        predicted_x_0 = to_x_0(schedule, x_t, t, predicted, parametrisation)
    log_variance = _log_variance(schedule, "learned", None, t, x_t, fraction)
    vlb = vlb_term(schedule, x_0, x_t, t, predicted_x_0, log_variance).mean()
    return simple + LAMBDA_VLB * schedule.T * vlb


@dataclass(frozen=True)
class _Batch:
    """A batch of the held-out set: x_0 (B, ...), its denoiser, and a generator for each sample."""

    x_0: Tensor
    denoise: Denoise
    generators: list[torch.Generator]
    first: int
    """Number of the batch's first sample in the set."""


@dataclass(frozen=True)
class _Bound:
    """The bound's terms for one batch, under a variance of p."""

    schedule: Schedule
    variance: Variance
    x_0_error: Tensor | None
    levels: int | None

    def parts(self, batch: _Batch, start: Tensor, length: Tensor) -> Tensor:
        """Return the prior, diffusion and decoder terms in bits/dim, float64 (3, B).

        start, length: the ranges of t, (draws,) each; one t is drawn from each for each sample.
        """
        x_0 = batch.x_0
        times = torch.stack(
            [
                start + (torch.rand(len(start), generator=generator) * length).long()
                for generator in batch.generators
            ]
        )  # (B, draws)
        diffusion = torch.zeros(len(x_0), dtype=torch.float64)
        for t, weight in zip(times.unbind(1), length.tolist(), strict=True):
            diffusion += self.term(batch, t) * weight
        decoder = self.term(batch, torch.ones(len(x_0), dtype=torch.int64))
        return torch.stack([prior_term(self.schedule, x_0).double().cpu(), diffusion, decoder])

    def term(self, batch: _Batch, t: Tensor) -> Tensor:
        """Return L_{t-1} in bits/dim at times t (B,), float64 (B,), with new noise.

        Raises DataError if it is not finite.
        """
        x_0, t = batch.x_0, t.to(batch.x_0.device)
        x_t = self.schedule.q_sample(x_0, t, noise_like(x_0, batch.generators))
        predicted_x_0, fraction = split(batch.denoise(x_t, t))
        log_variance = _log_variance(self.schedule, self.variance, self.x_0_error, t, x_t, fraction)
        bits = vlb_term(self.schedule, x_0, x_t, t, predicted_x_0, log_variance, self.levels)
        bits = bits.double().cpu()
        if not bits.isfinite().all():
            bad = int((~bits.isfinite()).nonzero()[0])
            raise DataError(
                f"the bound is not finite for held-out sample {batch.first + bad} at t = "
                f"{int(t[bad])}: the network returned NaN or infinity"
            )
        return bits


class BitsPerDim(TypedDict):
    """A bound in bits per dimension, the mean of some samples, and its parts."""

    bits_per_dim: float
    standard_error: float | None
    """NaN or None for a single sample."""
    prior: float
    diffusion: float
    decoder: float
    samples: int


@torch.no_grad()
def bits_per_dim(
    batches: Iterable[tuple[Tensor, Denoise]],
    schedule: Schedule,
    variance: Variance = "small",
    x_0_error: Tensor | None = None,
    draws: int | None = None,
    levels: int | None = 256,
    seed: int = 0,
) -> BitsPerDim:
    """Estimate an upper bound on -log2 p(x_0) per dimension over a held-out set.

    batches: pairs of x_0 and a `denoise` that knows its condition. draws: network calls for each
    sample for the terms of t = 2..T (None: all T - 1), one from each of as many ranges of t that
    are equal in log t, since most of the bits are near the data; t = 1 takes one more call. Noise
    and times depend only on `seed` and the sample's number in the set. Raises ValueError for x_0
    outside [-1, 1] unless `levels` is None, and DataError for an empty set or a bound that is not
    finite.
    """
    start, length = _stretches(schedule.T, schedule.T - 1 if draws is None else draws)
    bound = _Bound(schedule, variance, x_0_error, levels)
    parts: list[Tensor] = []
    count = 0
    for x_0, denoise in batches:
        if levels is not None and (x_0.abs() > 1 + 1e-6).any():
            raise ValueError(
                f"x_0 spans {x_0.min():.3g}..{x_0.max():.3g}: scale 8-bit images to [-1, 1], or "
                "pass levels = None for densities"
            )
        seeds = (seed + count + i for i in range(len(x_0)))
        batch = _Batch(x_0, denoise, generators(seeds, Stream.LIKELIHOOD), count)
        parts.append(bound.parts(batch, start, length))
        count += len(x_0)
    if not parts:
        raise DataError("there is no held-out sample: bits/dim needs at least one")
    table = torch.cat(parts, 1)  # (3, N)
    prior, diffusion, decoder = table.mean(1).tolist()
    return {
        "bits_per_dim": prior + diffusion + decoder,
        "standard_error": float(table.sum(0).std() / math.sqrt(count)) if count > 1 else math.nan,
        "prior": prior,
        "diffusion": diffusion,
        "decoder": decoder,
        "samples": count,
    }


def _stretches(T: int, count: int) -> tuple[Tensor, Tensor]:
    """Cut 2..T into at most `count` ranges that are equal in log t, with at least one time each.

    Returns their starts and lengths, int64 (count,) each.
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
    """Return the log variance of p(x_{t-1} | x_t), broadcastable to x_t."""
    lower, upper = (
        at(bound, t - 1, x_t) for bound in log_variance_bounds(schedule, variance, x_0_error)
    )
    if variance != "learned":
        return lower
    if fraction is None:
        raise ValueError(
            "variance = 'learned', but the network returned no fraction: return (x_0, fraction)"
        )
    return lower + (upper - lower) * fraction


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)

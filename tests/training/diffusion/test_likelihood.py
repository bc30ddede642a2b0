"""The likelihood bound against exact entropies, and the hybrid loss's gradients."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from infra.errors import DataError
from training.diffusion import likelihood
from training.diffusion.likelihood import (
    bits_per_dim,
    discretised_log_likelihood,
    hybrid_loss,
    prior_term,
    vlb_term,
)
from training.diffusion.process import Denoise, Schedule, at, simple_loss, to_x_0, training_target
from training.diffusion.variance import log_variance_bounds

MEAN, DEVIATION = 0.1, 0.2
SCHEDULE = Schedule.linear(100)


def exact_denoise(schedule: Schedule, variance: float = DEVIATION**2) -> tuple[Denoise, Tensor]:
    """The denoiser of N(MEAN, variance I), and its squared error at every t."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = at(schedule.alpha_bar, t, x_t)
        return MEAN + alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar) * (
            x_t - alpha_bar.sqrt() * MEAN
        )

    return denoise, variance * (1 - schedule.alpha_bar) / (
        schedule.alpha_bar * variance + 1 - schedule.alpha_bar
    )


def gaussian_data(count: int, dims: int = 32) -> Tensor:
    return MEAN + DEVIATION * torch.randn(
        count, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def test_bits_per_dim_of_a_gaussian_is_its_entropy() -> None:
    denoise, x_0_error = exact_denoise(SCHEDULE)
    result = bits_per_dim(
        [(gaussian_data(1000), denoise)], SCHEDULE, "analytic", x_0_error, levels=None
    )
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DEVIATION**2)
    assert result["standard_error"] < 0.02
    assert abs(result["bits_per_dim"] - entropy) < 4 * result["standard_error"]


def test_bits_per_dim_of_8_bit_data_is_their_entropy() -> None:
    """The data are a Gaussian's mass on 256 levels, wide against a level and narrow against [-1,
    1].
    """
    levels = np.linspace(-1, 1, 256)
    mass = norm.cdf(levels + 1 / 255, MEAN, DEVIATION) - norm.cdf(levels - 1 / 255, MEAN, DEVIATION)
    mass /= mass.sum()
    entropy = -(mass * np.log2(mass)).sum()
    x_0 = torch.from_numpy(np.random.default_rng(0).choice(levels, (1000, 32), p=mass))
    denoise, x_0_error = exact_denoise(
        SCHEDULE, DEVIATION**2 + (2 / 255) ** 2 / 12
    )  # a level's own width adds to the variance
    result = bits_per_dim([(x_0, denoise)], SCHEDULE, "analytic", x_0_error)
    assert result["standard_error"] < 0.02
    assert abs(result["bits_per_dim"] - entropy) < 4 * result["standard_error"]


def test_drawn_times_estimate_the_sum_over_all_times() -> None:
    denoise, x_0_error = exact_denoise(SCHEDULE)
    x_0 = gaussian_data(3000)
    whole, drawn = (
        bits_per_dim([(x_0, denoise)], SCHEDULE, "analytic", x_0_error, draws=draws, levels=None)
        for draws in (None, 8)
    )
    assert abs(whole["bits_per_dim"] - drawn["bits_per_dim"]) < 4 * drawn["standard_error"]
    assert drawn["standard_error"] < 0.1


def test_a_worse_denoiser_and_a_worse_variance_cost_bits() -> None:
    denoise, x_0_error = exact_denoise(SCHEDULE)
    wrong, _ = exact_denoise(SCHEDULE, 4 * DEVIATION**2)
    x_0 = gaussian_data(300)
    best = bits_per_dim([(x_0, denoise)], SCHEDULE, "analytic", x_0_error, levels=None)[
        "bits_per_dim"
    ]
    for variance in ("small", "large"):
        assert (
            bits_per_dim([(x_0, denoise)], SCHEDULE, variance, levels=None)["bits_per_dim"]
            > best + 0.05
        )
    assert (
        bits_per_dim([(x_0, wrong)], SCHEDULE, "analytic", x_0_error, levels=None)["bits_per_dim"]
        > best + 0.05
    )


def test_a_learned_variance_at_its_bounds_is_the_fixed_one() -> None:
    denoise, _ = exact_denoise(SCHEDULE)
    x_0 = gaussian_data(20)
    for variance, fraction in (("small", 0.0), ("large", 1.0)):
        learned = bits_per_dim(
            [(x_0, lambda x, t, f=fraction: (denoise(x, t), torch.full_like(x, f)))],
            SCHEDULE,
            "learned",
            levels=None,
        )
        fixed = bits_per_dim([(x_0, denoise)], SCHEDULE, variance, levels=None)
        assert learned["bits_per_dim"] == pytest.approx(fixed["bits_per_dim"], rel=1e-9)


def test_the_bound_does_not_depend_on_how_the_set_is_batched() -> None:
    denoise, x_0_error = exact_denoise(SCHEDULE)
    x_0 = gaussian_data(7)
    one, split = (
        bits_per_dim(
            [(part, denoise) for part in x_0.split(size)],
            SCHEDULE,
            "analytic",
            x_0_error,
            draws=5,
            levels=None,
        )
        for size in (7, 3)
    )
    assert one == pytest.approx(split, rel=1e-9)


@pytest.mark.parametrize("mean", [-1.3, -0.4, 0.02, 0.999])
@pytest.mark.parametrize("deviation", [0.002, 0.05, 2.0])
def test_discretised_likelihood_is_the_gaussian_mass_of_a_level(
    mean: float, deviation: float
) -> None:
    levels = np.linspace(-1, 1, 256)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    ours = discretised_log_likelihood(
        torch.from_numpy(levels),
        *torch.tensor([mean, 2 * math.log(deviation)], dtype=torch.float64),
    ).numpy()
    assert np.isfinite(ours).all()
    assert np.exp(ours).sum() == pytest.approx(1, abs=1e-9)
    mass = np.diff(norm.cdf(edges, mean, deviation))
    readable = (
        mass > 1e-9
    )  # below that the difference of two cdfs has lost its digits, ours has not
    np.testing.assert_allclose(ours[readable], np.log(mass[readable]), rtol=0, atol=1e-5)


def test_prior_term_is_the_kl_divergence_by_quadrature() -> None:
    x_0 = 0.8
    alpha_bar = float(Schedule.linear(1000).alpha_bar[300])
    schedule = Schedule(torch.tensor([1, 0.9, alpha_bar], dtype=torch.float64))
    x = np.linspace(-9, 9, 200_001)
    q, p = norm.pdf(x, math.sqrt(alpha_bar) * x_0, math.sqrt(1 - alpha_bar)), norm.pdf(x)
    kl = np.trapezoid(q * np.log2(np.maximum(q, 1e-300) / p), x)
    assert float(prior_term(schedule, torch.tensor([[x_0]], dtype=torch.float64))) == pytest.approx(
        kl, rel=1e-6
    )


def test_hybrid_loss_teaches_the_prediction_by_l_simple_alone_and_the_variance_by_l_vlb() -> None:
    schedule, x_0, generator = (
        Schedule.cosine(20),
        gaussian_data(20, 4),
        torch.Generator().manual_seed(1),
    )
    t, eps = torch.arange(1, 21), torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    x_0 = levels[(x_0[..., None] - levels).abs().argmin(-1)]
    x_0[:, 0] = -1  # the edge of the discretised likelihood
    prediction = (eps + 0.1).requires_grad_()
    fraction = torch.full_like(eps, 0.4).requires_grad_()
    loss = hybrid_loss(schedule, x_0, eps, t, (prediction, fraction), "eps")
    by_prediction, by_fraction = torch.autograd.grad(loss, (prediction, fraction))
    (simple,) = torch.autograd.grad(
        simple_loss(prediction, training_target(schedule, x_0, eps, t, "eps")), prediction
    )
    torch.testing.assert_close(by_prediction, simple)

    def vlb(fraction: Tensor) -> Tensor:
        x_t = schedule.q_sample(x_0, t, eps)
        lower, upper = (bound[t - 1, None] for bound in log_variance_bounds(schedule, "learned"))
        predicted_x_0 = to_x_0(schedule, x_t, t, prediction.detach(), "eps")
        return (
            0.001
            * 20
            * vlb_term(
                schedule, x_0, x_t, t, predicted_x_0, lower + fraction * (upper - lower)
            ).mean()
        )

    step = torch.zeros_like(eps)
    for i, j in ((0, 0), (0, 1), (5, 2), (19, 3)):  # (0, ...) is t = 1, the decoder's term
        step.zero_()[i, j] = 1e-4
        difference = (vlb(fraction.detach() + step) - vlb(fraction.detach() - step)) / 2e-4
        assert float(by_fraction[i, j]) == pytest.approx(float(difference), rel=1e-3, abs=1e-9)


def test_nan_and_unscaled_images_are_named() -> None:
    with pytest.raises(DataError, match="held-out sample 2 at t = 2"):
        bits_per_dim(
            [(torch.zeros(3, 4), lambda x, t: x * torch.tensor([[1.0], [1.0], [math.nan]]))],
            SCHEDULE,
        )
    with pytest.raises(ValueError, match=r"scale 8-bit images to \[-1, 1\]"):
        bits_per_dim([(torch.full((3, 4), 255.0), lambda x, t: x)], SCHEDULE)
    with pytest.raises(ValueError, match="returned no fraction"):
        bits_per_dim([(torch.zeros(3, 4), lambda x, t: x)], SCHEDULE, "learned")
    with pytest.raises(DataError, match="no held-out sample"):
        bits_per_dim([], SCHEDULE)


@pytest.mark.parametrize(
    ("T", "count"),
    [(2, 1), (2, 9), (10, 3), (10, 9), (1000, 8), (1000, 700), (1000, 999), (4000, 1)],
)
def test_stretches_hold_every_time_once(T: int, count: int) -> None:
    start, length = likelihood._stretches(T, count)
    times = [
        t
        for first, many in zip(start.tolist(), length.tolist(), strict=True)
        for t in range(first, first + many)
    ]
    assert times == list(range(2, T + 1)) and len(start) == min(count, T - 1)

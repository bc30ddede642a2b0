"""Reverse variances: their bounds, and the analytic one against the true variance of x_{t-1} given
x_t.
"""

import pytest
import torch

from training.diffusion.noise import generators
from training.diffusion.process import Schedule, at
from training.diffusion.variance import (
    analytic_variance,
    large_variance,
    learned_deviation,
    log_variance_bounds,
    measure_x_0_error,
    small_variance,
)

MEAN, DEVIATION = 0.2, 0.6


def gaussian(schedule: Schedule):  # type: ignore[no-untyped-def]
    """The exact denoiser of N(MEAN, DEVIATION^2 I), and its squared error at every t."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = at(schedule.alpha_bar, t, x_t)
        return MEAN + alpha_bar.sqrt() * DEVIATION**2 / (
            alpha_bar * DEVIATION**2 + 1 - alpha_bar
        ) * (x_t - alpha_bar.sqrt() * MEAN)

    alpha_bar = schedule.alpha_bar
    return denoise, DEVIATION**2 * (1 - alpha_bar) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)


@pytest.mark.parametrize(("t", "s"), [(1000, 990), (600, 300), (3, 2)])
def test_analytic_variance_is_the_true_one_for_gaussian_data(t: int, s: int) -> None:
    """x_s and x_t are jointly Gaussian there, so Var(x_s | x_t) = Var x_s - Cov^2 / Var x_t."""
    schedule = Schedule.linear()
    alpha_bar_t, alpha_bar_s = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s])
    var_t, var_s = (a * DEVIATION**2 + 1 - a for a in (alpha_bar_t, alpha_bar_s))
    covariance = (alpha_bar_t / alpha_bar_s) ** 0.5 * var_s
    x_0_error = float(gaussian(schedule)[1][t])
    assert analytic_variance(alpha_bar_t, alpha_bar_s, x_0_error) == pytest.approx(
        var_s - covariance**2 / var_t, rel=1e-9
    )


def test_small_and_large_are_the_limits_of_the_analytic_variance() -> None:
    """Data at one point leave no error in x_0; data from N(0, I) leave 1 - alpha_bar."""
    alpha_bar = Schedule.cosine().alpha_bar
    t, s = alpha_bar[2:], alpha_bar[1:-1]
    torch.testing.assert_close(analytic_variance(t, s, torch.zeros_like(t)), small_variance(t, s))
    torch.testing.assert_close(analytic_variance(t, s, 1 - t), large_variance(t, s))


def test_learned_deviation_spans_small_to_large() -> None:
    alpha_bar_t, alpha_bar_s = 0.5, 0.8
    deviation = learned_deviation(
        alpha_bar_t, alpha_bar_s, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    )
    small, large = (
        small_variance(alpha_bar_t, alpha_bar_s),
        large_variance(alpha_bar_t, alpha_bar_s),
    )
    assert deviation.square().tolist() == pytest.approx(
        [small, (small * large) ** 0.5, large], rel=1e-5
    )


def test_log_variance_bounds_are_finite_and_ordered() -> None:
    lower, upper = log_variance_bounds(Schedule.cosine(), "learned")
    assert lower.isfinite().all()
    assert (lower[1:] < upper[1:]).all()
    assert lower[0] == lower[1]
    assert torch.equal(*log_variance_bounds(Schedule.cosine(1), "small"))


def test_measured_x_0_error_is_the_true_one() -> None:
    schedule = Schedule.cosine(100)
    denoise, true_error = gaussian(schedule)
    x_0 = MEAN + DEVIATION * torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    table = measure_x_0_error(denoise, x_0, schedule, points=50, generator=generators(range(4000)))
    assert table[0] == 0
    torch.testing.assert_close(table[1:], true_error[1:], rtol=0.03, atol=1e-4)


def test_measuring_at_one_point_fills_the_table() -> None:
    schedule = Schedule.cosine(1)
    table = measure_x_0_error(gaussian(schedule)[0], torch.randn(16, 4), schedule)
    assert table.shape == (2,)
    assert table[1] > 0


def test_unknown_or_unfed_variance_is_named() -> None:
    with pytest.raises(ValueError, match="choose one of small, large, learned, analytic"):
        log_variance_bounds(Schedule.cosine(), "tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs x_0_error of shape \(1001,\)"):
        log_variance_bounds(Schedule.cosine(), "analytic")

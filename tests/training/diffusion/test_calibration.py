"""The blend of a denoiser with x_t: what it is for denoisers whose best blend is known, and what it
saves in bits.
"""

import torch
from torch import Tensor

from training.diffusion.calibration import Calibration, calibrate
from training.diffusion.likelihood import bits_per_dim
from training.diffusion.noise import generators
from training.diffusion.process import Denoise, Schedule, at, split
from training.diffusion.variance import measure_x_0_error, probe_times

SCHEDULE = Schedule.cosine(200)
MEAN, DEVIATION = 0.3, 0.5
X_0 = MEAN + DEVIATION * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
ALPHA, SIGMA = SCHEDULE.sqrt_alpha_bar, SCHEDULE.sqrt_one_minus_alpha_bar


def exact(x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] of the Gaussian that X_0 is drawn from."""
    alpha, sigma = at(ALPHA, t, x_t), at(SIGMA, t, x_t)
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x_t - alpha * MEAN)


def blurred(x_t: Tensor, t: Tensor) -> Tensor:
    """As exact, but never better than a deviation of 0.1: what a network does that saw no nearly
    clean data.
    """
    own = torch.Generator().manual_seed(777 + int(t[0]))
    return exact(x_t, t) + 0.1 * torch.randn(x_t.shape, generator=own)


def error(denoise: Denoise, t: int) -> float:
    times = torch.full((len(X_0),), t)
    x_t = SCHEDULE.q_sample(
        X_0, times, torch.randn(X_0.shape, generator=torch.Generator().manual_seed(9 + t))
    )
    return float((split(denoise(x_t, times))[0] - X_0).square().mean())


def fitted(denoise: Denoise) -> Calibration:
    return calibrate(denoise, X_0, SCHEDULE, points=40, generator=torch.Generator().manual_seed(1))


def test_an_exact_denoiser_is_left_as_it_is() -> None:
    found = fitted(exact)
    times = probe_times(SCHEDULE.T, 40)
    # near the data x_t is the same as x_0 to both, and any split of the weight between them is
    # right
    later = times[times > 60]
    torch.testing.assert_close(
        found.of_x_0[later], torch.ones(len(later), dtype=torch.float64), atol=0.05, rtol=0
    )
    for t in (1, 5, 50, 150):
        assert error(found(exact), t) < 1.01 * error(exact, t)


def test_a_scale_that_is_wrong_is_put_right() -> None:
    found = fitted(lambda x_t, t: 2 * exact(x_t, t))
    torch.testing.assert_close(
        found.of_x_0[60:], torch.full_like(found.of_x_0[60:], 0.5), atol=0.05, rtol=0
    )


def test_a_blurred_denoiser_is_trusted_where_x_t_is_noisy_and_x_t_where_it_is_clean() -> None:
    found = fitted(blurred)
    assert found.of_x_0[2] < 0.1 and found.of_x_t[2] > 0.9
    assert found.of_x_0[150] > 0.8 and found.of_x_t[150] < 0.1
    for t in (1, 3, 10, 30, 100, 180):  # between the fitted times as well
        alone = float((SIGMA[t] / ALPHA[t]) ** 2)
        assert error(found(blurred), t) < 1.02 * min(error(blurred, t), alone)


def test_at_t_0_the_data_stand() -> None:
    found = fitted(blurred)
    x = torch.randn(3, 8)
    zero = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(split(found(lambda x_t, t: torch.full_like(x_t, 7.0))(x, zero))[0], x)


def test_fading_leads_back_to_the_denoiser_alone() -> None:
    found, x, t = fitted(blurred), torch.randn(3, 8), torch.tensor([5, 5, 5])
    own, blended = blurred(x, t), split(found(blurred)(x, t))[0]
    for share in (0.0, 0.25, 1.0):
        torch.testing.assert_close(
            split(found.faded(share)(blurred)(x, t))[0], torch.lerp(blended, own, share)
        )


def test_a_learned_variance_passes_through() -> None:
    fraction = torch.rand(3, 8)
    _, passed = split(
        fitted(exact)(lambda x_t, t: (x_t.clone(), fraction))(
            torch.randn(3, 8), torch.full((3,), 5)
        )
    )
    assert passed is fraction


def test_the_bound_falls_to_near_that_of_the_exact_denoiser() -> None:
    def bits(denoise: Denoise) -> float:
        own = generators(range(len(X_0)))
        table = measure_x_0_error(denoise, X_0, SCHEDULE, 40, own)
        return bits_per_dim(
            [(X_0[:100], denoise)], SCHEDULE, "analytic", table, draws=12, levels=None
        )["bits_per_dim"]

    best, without = bits(exact), bits(blurred)
    assert without > best + 2
    assert bits(fitted(blurred)(blurred)) < best + 0.3 * (without - best)

"""Pictures of the latents, on data whose denoiser is known."""

import math

import pytest
import torch
from torch import Tensor

from training.diffusion.process import Denoise, Schedule, at
from training.diffusion.samplers import ddim
from training.diffusion.trajectories import (
    across_time,
    interpolate_in_x_t,
    share,
    sharing_x_t,
    slerp,
)

SCHEDULE = Schedule.cosine()
DEVIATION = 0.5


def gaussian(x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] for data N(0, DEVIATION^2 I)."""
    alpha_bar = at(SCHEDULE.alpha_bar, t, x_t)
    return alpha_bar.sqrt() * DEVIATION**2 / (alpha_bar * DEVIATION**2 + 1 - alpha_bar) * x_t


def two_images(first: Tensor, second: Tensor) -> Denoise:
    """E[x_0 | x_t] for data that are one of two images."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = at(SCHEDULE.alpha_bar, t, x_t)
        both = torch.stack([first, second])
        away = (
            (x_t[:, None] - alpha_bar.sqrt()[:, None] * both).flatten(2).square().sum(-1)
        )  # (B, 2)
        weight = (-away / (2 * (1 - alpha_bar).view(-1, 1))).softmax(-1)
        return torch.einsum("bk,kchw->bchw", weight, both)

    return denoise


def images(count: int, seed: int = 0) -> Tensor:
    return DEVIATION * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_across_time_goes_from_the_noise_to_the_sample() -> None:
    x_T = images(2) / DEVIATION
    x_t, x_0, times = across_time(gaussian, x_T, SCHEDULE, columns=5, steps=20)
    assert x_t.shape == x_0.shape == (2, 5, 3, 8, 8)
    assert times == [1000, 750, 500, 250, 0]
    assert torch.equal(x_t[:, 0], x_T)
    assert torch.equal(x_t[:, -1], ddim(gaussian, x_T, SCHEDULE, 20))
    assert torch.equal(x_t[:, -1], x_0[:, -1])
    for column in (1, 2, 3):
        torch.testing.assert_close(
            x_0[:, column], gaussian(x_t[:, column], torch.full((2,), times[column]))
        )


def test_every_number_of_columns_is_met() -> None:
    for steps in (1, 2, 7, 50):
        for columns in range(2, min(steps + 1, 12) + 1):
            assert across_time(gaussian, images(1), SCHEDULE, columns, steps)[0].shape[1] == columns


def test_samples_share_more_the_smaller_t_is() -> None:
    """Their variance about each other is that of p(x_0 | x_t), known in closed form for Gaussian
    data.
    """
    times = [1000, 600, 300, 100]
    x_t, samples = sharing_x_t(gaussian, images(6), SCHEDULE, times, samples=8, steps=1000)
    assert x_t.shape == (6, 4, 3, 8, 8)
    assert samples.shape == (6, 4, 8, 3, 8, 8)
    for k, t in enumerate(times):
        alpha_bar = float(SCHEDULE.alpha_bar[t])
        posterior_variance = (
            DEVIATION**2 * (1 - alpha_bar) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        )
        assert float(samples[:, k].var(dim=1).mean()) == pytest.approx(posterior_variance, rel=0.08)
        expected = gaussian(x_t[:, k], torch.full((6,), t))
        off = (samples[:, k].mean(1) - expected) / math.sqrt(
            posterior_variance / 8
        )  # in standard errors of a mean of 8
        assert (
            float(off.square().mean()) == pytest.approx(1, rel=0.15)
            and abs(float(off.mean())) < 0.1
        )


def test_shared_x_t_is_the_noised_image_and_does_not_depend_on_the_batch() -> None:
    whole = sharing_x_t(gaussian, images(3), SCHEDULE, [200, 1], samples=2, steps=50)
    torch.testing.assert_close(whole[0][:, 1], images(3), rtol=0, atol=0.05)
    part = sharing_x_t(gaussian, images(3)[:2], SCHEDULE, [200, 1], samples=2, steps=50)
    torch.testing.assert_close(part[1], whole[1][:2], rtol=1e-5, atol=1e-5)


def test_interpolation_in_x_t_begins_and_ends_at_the_images() -> None:
    first, second = images(2, seed=1)
    out = interpolate_in_x_t(
        two_images(first, second),
        (first[None], second[None]),
        SCHEDULE,
        [100, 300],
        columns=5,
        steps=100,
    )
    assert out.shape == (1, 2, 5, 3, 8, 8)
    for row in out[0]:
        torch.testing.assert_close(row[0], first, rtol=0, atol=1e-3)
        torch.testing.assert_close(row[-1], second, rtol=0, atol=1e-3)
        assert torch.allclose(
            row[1], first, atol=1e-3
        )  # nearer to the first image, which this denoiser then draws


def test_interpolation_changes_the_weight_alone_along_a_row() -> None:
    """With an affine denoiser and shared noise a sample is affine in w."""
    first, second = images(2, seed=1).unsqueeze(1)
    out = interpolate_in_x_t(gaussian, (first, second), SCHEDULE, [500], columns=3, steps=100)[0, 0]
    torch.testing.assert_close(out[1], (out[0] + out[2]) / 2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out[0], out[2], atol=0.1)
    assert torch.equal(
        out,
        interpolate_in_x_t(gaussian, (first, second), SCHEDULE, [500], columns=3, steps=100)[0, 0],
    )


def test_a_run_from_t_takes_its_share_of_the_steps() -> None:
    assert [share(100, t, SCHEDULE) for t in (1000, 500, 7, 1)] == [100, 50, 1, 1]
    assert share(1000, 3, SCHEDULE) == 3


def test_slerp_keeps_the_length_and_halves_the_angle() -> None:
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 32, dtype=torch.float64), dim=-1)
    middle = slerp(a, b, 0.5)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(5, dtype=torch.float64))
    whole, half = ((a * other).sum(1).acos() for other in (b, middle))
    torch.testing.assert_close(half, whole / 2)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_slerp_takes_one_angle_for_a_whole_image() -> None:
    a, b = images(2).unsqueeze(1)
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(slerp(a, b, 0.3), expected)


def test_slerp_of_equal_vectors_is_that_vector() -> None:
    a = torch.randn(2, 8)
    torch.testing.assert_close(slerp(a, a.clone(), 0.3), a)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="columns = 60 of 50 steps"):
        across_time(gaussian, images(1), SCHEDULE, columns=60)
    with pytest.raises(ValueError, match="the shapes must be equal"):
        interpolate_in_x_t(gaussian, (images(1), images(2)), SCHEDULE, [500])
    with pytest.raises(ValueError, match=r"t spans 2000..2000: it must lie in 0..1000"):
        sharing_x_t(gaussian, images(1), SCHEDULE, [2000])

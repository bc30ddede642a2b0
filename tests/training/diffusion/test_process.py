"""The diffusion process against definitions written out, brute-force Bayes, and diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from training.diffusion.process import (
    PARAMETRISATIONS,
    Schedule,
    as_denoise,
    at,
    posterior,
    simple_loss,
    snr_weight,
    to_eps,
    to_x_0,
    training_target,
)
from training.sections.decoder_section import Parametrisation

SCHEDULES = {
    "linear": Schedule.linear(),
    "cosine": Schedule.cosine(),
    "short": Schedule.cosine(7),
    "constant": Schedule.constant(0.05),
}


def batch(schedule: Schedule, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sample at every t: x_0, t, eps, x_t in float64."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(1, schedule.T + 1)
    x_0, eps = torch.randn(2, schedule.T, 3, 2, generator=generator, dtype=torch.float64)
    return x_0, t, eps, schedule.q_sample(x_0, t, eps)


def test_linear_schedule_is_the_product_of_its_betas() -> None:
    alpha_bar, product = Schedule.linear().alpha_bar, 1.0
    for t in range(1, 1001):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
        assert math.isclose(alpha_bar[t], product, rel_tol=1e-12)


def test_cosine_schedule_is_its_formula_until_the_clip() -> None:
    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = Schedule.cosine().alpha_bar
    for t in range(1, 999):
        assert math.isclose(alpha_bar[t], f(t) / f(0), rel_tol=1e-9)
    assert math.isclose(alpha_bar[1000] / alpha_bar[999], 1 - 0.999, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedules_are_those_of_diffusers(name: str, theirs: str) -> None:
    scheduler = DDPMScheduler(1000, beta_schedule=theirs)
    torch.testing.assert_close(
        SCHEDULES[name].alpha_bar[1:], scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7
    )  # theirs is float32


@pytest.mark.parametrize("name", SCHEDULES)
def test_data_stand_at_t_0_and_alpha_bar_falls(name: str) -> None:
    alpha_bar = SCHEDULES[name].alpha_bar
    assert alpha_bar[0] == 1.0
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1] > 0


def test_linear_schedule_keeps_its_path_for_another_number_of_steps() -> None:
    torch.testing.assert_close(
        Schedule.linear(4000).alpha_bar[::4], Schedule.linear(1000).alpha_bar, rtol=0, atol=1e-3
    )


def test_shifted_schedule_multiplies_the_signal_to_noise_ratio() -> None:
    schedule = Schedule.cosine()
    snr, shifted = (
        s.alpha_bar[1:] / (1 - s.alpha_bar[1:]) for s in (schedule, schedule.shifted(64 / 256))
    )
    torch.testing.assert_close(shifted, snr / 16, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("rate", "T"), [(0.9999, 1), (0.9, 4), (0.5, 14), (0.1, 88), (0.01, 917)])
def test_a_high_diffusion_rate_is_one_step_and_a_low_one_many(rate: float, T: int) -> None:
    schedule = Schedule.constant(rate, end=1e-4)
    assert schedule.T == T
    assert schedule.alpha_bar[-1] <= 1e-4 * (1 + 1e-9)
    torch.testing.assert_close(
        1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1],
        torch.full((T,), rate, dtype=torch.float64),
    )


def test_q_sample_is_a_chain_of_single_steps() -> None:
    """Mean factor and variance of x_t, composed from q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1},
    beta), against the closed form.
    """
    schedule = Schedule.cosine(50)
    mean, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(1, 51):
        alpha = float(schedule.alpha_bar[t] / schedule.alpha_bar[t - 1])
        mean, variance = math.sqrt(alpha) * mean, alpha * variance + 1 - alpha
        now = torch.tensor([t])
        assert float(schedule.q_sample(one, now, zero)) == pytest.approx(mean, rel=1e-12)
        assert float(schedule.q_sample(zero, now, one)) ** 2 == pytest.approx(variance, rel=1e-12)


def test_q_sample_at_t_0_is_the_data() -> None:
    x_0 = torch.randn(4, 3)
    assert torch.equal(
        Schedule.cosine().q_sample(x_0, torch.zeros(4, dtype=torch.int64), torch.randn(4, 3)), x_0
    )


@pytest.mark.parametrize("t", [1, 2, 13, 40])
def test_posterior_is_bayes_rule_on_a_grid(t: int) -> None:
    schedule, x_0, x_t = Schedule.linear(40), 0.7, -0.2
    alpha_bar_t, alpha_bar_s = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t - 1])
    alpha = alpha_bar_t / alpha_bar_s
    x_s = np.linspace(-6, 6, 2_000_001)
    log_p = -((x_t - math.sqrt(alpha) * x_s) ** 2) / (2 * (1 - alpha))
    if t > 1:
        log_p -= (x_s - math.sqrt(alpha_bar_s) * x_0) ** 2 / (2 * (1 - alpha_bar_s))
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = float((p * x_s).sum())
        variance = float((p * (x_s - mean) ** 2).sum())
    else:
        mean, variance = x_0, 0.0  # x_{t-1} is the data themselves
    ours = posterior(
        schedule,
        *(torch.tensor([[value]], dtype=torch.float64) for value in (x_0, x_t)),
        torch.tensor([t]),
    )
    assert float(ours[0]) == pytest.approx(mean, rel=1e-6)
    assert float(ours[1]) == pytest.approx(variance, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_every_parametrisation_gives_x_0_and_eps_back(name: str, parametrisation: str) -> None:
    schedule = SCHEDULES[name]
    x_0, t, eps, x_t = batch(schedule)
    target = training_target(schedule, x_0, eps, t, parametrisation)
    read = to_x_0(schedule, x_t, t, target, parametrisation)
    torch.testing.assert_close(read, x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_eps(schedule, x_t, t, read), eps, rtol=1e-9, atol=1e-9)


def test_v_is_that_of_diffusers() -> None:
    schedule = SCHEDULES["linear"]
    scheduler = DDPMScheduler(1000)
    scheduler.alphas_cumprod = schedule.alpha_bar[1:]
    x_0, t, eps, x_t = batch(schedule)
    theirs = scheduler.get_velocity(x_0, eps, t - 1)
    torch.testing.assert_close(
        training_target(schedule, x_0, eps, t, "v"), theirs, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, t - 1), rtol=1e-10, atol=1e-10)


def test_eps_of_the_exact_denoiser_is_the_score() -> None:
    """For Gaussian data -eps / sqrt(1 - alpha_bar) must be the gradient of log q(x_t), here by
    autograd.
    """
    schedule, mean, variance = Schedule.cosine(), 0.4, 0.3
    t = torch.tensor([1, 10, 300, 900])
    x_t = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    alpha_bar = at(schedule.alpha_bar, t, x_t)
    centre, spread = alpha_bar.sqrt() * mean, alpha_bar * variance + 1 - alpha_bar
    (score,) = torch.autograd.grad((-((x_t - centre) ** 2) / (2 * spread)).sum(), x_t)
    x_0 = mean + alpha_bar.sqrt() * variance / spread * (x_t - centre)
    torch.testing.assert_close(
        -to_eps(schedule, x_t, t, x_0) / (1 - alpha_bar).sqrt(), score, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_snr_weight_makes_every_loss_the_clipped_loss_in_x_0(
    parametrisation: str, floor: float
) -> None:
    schedule = SCHEDULES["cosine"]
    x_0, t, eps, x_t = batch(schedule)
    target = training_target(schedule, x_0, eps, t, parametrisation)
    prediction = target + 1e-3 * torch.randn_like(target)
    error = (
        (to_x_0(schedule, x_t, t, prediction, parametrisation) - x_0).square().flatten(1).mean(1)
    )
    snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    weighted = snr_weight(schedule, t, 5.0, floor, parametrisation) * (
        prediction - target
    ).square().flatten(1).mean(1)
    torch.testing.assert_close(weighted, snr.clamp(floor, 5.0) * error, rtol=1e-5, atol=1e-12)


def test_simple_loss_weighs_samples_and_runs_in_float32() -> None:
    prediction, target = torch.zeros(2, 4, dtype=torch.bfloat16), torch.full((2, 4), 3.0)
    assert simple_loss(prediction, target) == 9
    assert simple_loss(prediction, target, torch.tensor([1.0, 0.0])) == 4.5
    loss = simple_loss(prediction, torch.full((2, 4), 1.01, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert (
        loss == float(torch.tensor(1.01, dtype=torch.bfloat16)) ** 2
    )  # bfloat16 has no room for the square


def test_a_bfloat16_batch_is_noised_in_float32() -> None:
    x_0, eps = torch.ones(1, 2, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)
    x_t = Schedule.linear().q_sample(x_0, torch.tensor([10]), eps)
    assert x_t.dtype == torch.float32
    assert float(x_t[0, 0]) == pytest.approx(
        float(Schedule.linear().alpha_bar[10].sqrt()), rel=1e-6
    )


def test_clipping_leaves_the_networks_own_tensor_alone() -> None:
    own = torch.full((2, 3), 4.0)
    for parametrisation in PARAMETRISATIONS:
        denoise = as_denoise(lambda x_t, t: own, Schedule.cosine(), parametrisation, clip=1.0)
        x_0 = denoise(torch.randn(2, 3), torch.tensor([5, 900]))
        assert isinstance(x_0, Tensor)
        assert x_0.abs().max() <= 1
        assert (own == 4).all()


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_clipping_does_not_hide_what_is_not_finite(
    parametrisation: Parametrisation, bad: float
) -> None:
    x_t, prediction = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    prediction[1, 1, 2] = bad
    x_0 = as_denoise(lambda x_t, t: prediction, Schedule.cosine(), parametrisation, clip=1.0)(
        x_t, torch.tensor([5, 500, 900])
    )
    assert isinstance(x_0, Tensor) and x_0[1].isnan().all() and x_0[[0, 2]].abs().max() <= 1


def test_a_variance_fraction_passes_through() -> None:
    x_t, t, fraction = torch.randn(2, 3), torch.tensor([5, 900]), torch.rand(2, 3)
    pair = as_denoise(lambda x_t, t: (x_t, fraction), Schedule.cosine(), "v")(x_t, t)
    assert pair[1] is fraction
    assert torch.equal(pair[0], as_denoise(lambda x_t, t: x_t, Schedule.cosine(), "v")(x_t, t))


def test_a_bfloat16_network_is_read_in_float32() -> None:
    denoise = as_denoise(lambda x_t, t: x_t.bfloat16(), Schedule.cosine(), "v")
    assert denoise(torch.randn(2, 3), torch.tensor([5, 900])).dtype == torch.float32


def test_a_schedule_that_does_not_fall_is_refused_by_place() -> None:
    rising = torch.tensor([1.0, 0.9, 0.95, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"alpha_bar\[2\] = 0.95 after alpha_bar\[1\] = 0.9"):
        Schedule(rising)
    with pytest.raises(ValueError, match=r"alpha_bar\[2\] = 0 after"):
        Schedule.from_betas(torch.tensor([0.5, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"alpha_bar\[1\] = nan"):
        Schedule(torch.tensor([1.0, math.nan], dtype=torch.float64))
    with pytest.raises(ValueError, match="it must be exactly 1"):
        Schedule(torch.tensor([0.99, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="float64 vector"):
        Schedule(torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s, x: s.q_sample(x, torch.tensor([0, 1001]), x),
            r"t spans 0\.\.1001: it must lie in 0\.\.1000",
        ),
        (lambda s, x: s.q_sample(x, torch.tensor([0.5, 1.0]), x), "time is an integer"),
        (lambda s, x: s.q_sample(x, torch.tensor([3]), x), r"t \(1,\)"),
        (
            lambda s, x: s.q_sample(x, torch.tensor([3, 4]), x[:, :2]),
            r"shapes \(2, 3\) and \(2, 2\)",
        ),
        (
            lambda s, x: to_eps(s, x, torch.tensor([0, 4]), x),
            r"t spans 0\.\.4: it must lie in 1\.\.1000",
        ),
        (
            lambda s, x: training_target(s, x, x, torch.tensor([1, 4]), "noise"),
            "choose one of x_0, eps, v",
        ),
        (
            lambda s, x: training_target(s, x, x, torch.tensor([1, 1001]), "v"),
            r"t spans 1\.\.1001: it must lie in 0\.\.1000",
        ),
        (
            lambda s, x: training_target(s, x, x, torch.tensor([1.0, 4.0]), "eps"),
            "t is torch.float32: time is an integer",
        ),
        (
            lambda s, x: to_x_0(s, x, torch.tensor([-1, 4]), x, "x_0"),
            r"t spans -1\.\.4: it must lie in 0\.\.1000",
        ),
        (
            lambda s, x: to_x_0(s, x, torch.tensor([True, False]), x, "v"),
            "t is torch.bool: time is an integer",
        ),
        (
            lambda s, x: as_denoise(lambda x_t, t: x_t, s, "x_0")(x, torch.tensor([0, 4])),
            r"t spans 0\.\.4: it must lie in 1\.\.1000",
        ),
        (
            lambda s, x: as_denoise(lambda x_t, t: x_t, s, "v")(x, torch.tensor([0.5, 4])),
            "t is torch.float32",
        ),
        (lambda s, x: simple_loss(x, x[:1]), "the shapes must be equal"),
        (lambda s, x: Schedule.cosine(0), "T = 0"),
        (lambda s, x: Schedule.constant(1.5), "diffusion rate = 1.5"),
        (lambda s, x: s.shifted(0), "shift = 0"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(Schedule.cosine(), torch.zeros(2, 3))

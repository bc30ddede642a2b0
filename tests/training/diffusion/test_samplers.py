"""Samplers against closed forms (Gaussian data have an exact denoiser) and, step by step, against
diffusers' schedulers.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from torch import Tensor

from infra.errors import DataError
from training.diffusion.noise import generators, noise
from training.diffusion.process import Denoise, Prediction, Schedule, as_denoise, to_eps
from training.diffusion.samplers import (
    SamplerOptions,
    Spacing,
    _CheckedDenoise,
    ancestral,
    ddim,
    ddim_invert,
    dpm_solver,
    guided,
    threshold,
    timesteps,
)
from training.diffusion.variance import Variance

LINEAR, COSINE = Schedule.linear(), Schedule.cosine()
MEAN = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.1]], dtype=torch.float64
)


def gaussian(schedule: Schedule, covariance: Tensor = COVARIANCE) -> Denoise:
    """E[x_0 | x_t] for data N(MEAN, covariance)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = float(schedule.alpha_bar[t[0]])
        gain = (
            math.sqrt(alpha_bar)
            * covariance
            @ torch.linalg.inv(alpha_bar * covariance + (1 - alpha_bar) * torch.eye(3))
        )
        return MEAN + (x_t - math.sqrt(alpha_bar) * MEAN) @ gain.T

    return denoise


def network(x_t: Tensor, t: Tensor) -> Tensor:
    """A smooth nonlinear stand-in for a trained network that predicts x_0 in [-1, 1]."""
    return torch.tanh(
        1.3 * x_t.roll(1, -1) - 0.4 * x_t + 0.2 + (t / 1000).view(-1, *[1] * (x_t.ndim - 1))
    )


def start(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def affine_map(sampler) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """A deterministic sampler of Gaussian data is x_0 = A x_T + b; read A and b from four runs, so
    that no Monte Carlo error is left.
    """
    out = sampler(
        torch.cat([torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)])
    )
    return (out[1:] - out[0]).T, out[0]


# Gaussian data


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [(ddim, 1000, 4e-3), (ddim, 100, 3e-2), (dpm_solver, 100, 1e-3), (dpm_solver, 20, 2e-2)],
)
def test_deterministic_samplers_recover_mean_and_covariance(
    schedule: Schedule, sampler, steps: int, tolerance: float
) -> None:  # type: ignore[no-untyped-def]
    a, b = affine_map(lambda x_T: sampler(gaussian(schedule), x_T, schedule, steps))
    assert (b - MEAN).abs().max() < tolerance + float(
        schedule.alpha_bar[-1].sqrt()
    )  # x_T's own mean is not quite 0
    assert (a @ a.T - COVARIANCE).abs().max() < tolerance


def test_deterministic_samplers_converge_with_their_order() -> None:
    def error(sampler, steps: int) -> float:  # type: ignore[no-untyped-def]
        fine = Schedule.cosine(20_000)
        a, _ = affine_map(
            lambda x_T: sampler(
                gaussian(fine), x_T, fine, steps, options=SamplerOptions(start=fine.T // 2)
            )
        )
        return float((a - exact).abs().max())

    fine = Schedule.cosine(20_000)
    values, vectors = torch.linalg.eigh(COVARIANCE)
    alpha_bar = fine.alpha_bar[fine.T // 2]
    exact = vectors @ torch.diag((values / (alpha_bar * values + 1 - alpha_bar)).sqrt()) @ vectors.T
    assert error(ddim, 50) / error(ddim, 100) == pytest.approx(2, abs=0.3)
    assert error(dpm_solver, 50) / error(dpm_solver, 100) == pytest.approx(4, abs=1)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_reverse_trajectory_of_ddim_is_the_probability_flow(schedule: Schedule) -> None:
    """Along it (x_t - sqrt(alpha_bar) mean) keeps its place in units of the marginal's standard
    deviation, in every eigendirection.
    """
    values, vectors = torch.linalg.eigh(COVARIANCE)
    places: list[Tensor] = []

    def callback(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        alpha_bar = schedule.alpha_bar[t]
        places.append(
            (x_t - alpha_bar.sqrt() * MEAN) @ vectors / (alpha_bar * values + 1 - alpha_bar).sqrt()
        )

    ddim(gaussian(schedule), start(4, 3), schedule, 1000, options=SamplerOptions(callback=callback))
    for place in places[::50]:
        torch.testing.assert_close(place, places[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("variance", "steps"),
    [("small", 100), ("large", 100), ("small", 1000), ("analytic", 10), ("learned", 50)],
)
def test_ancestral_sampling_has_its_analytic_moments(variance: str, steps: int) -> None:
    """Mean and variance of each step, from p(x_s | x_t) in one dimension written out, against the
    sampler's over many samples.
    """
    deviation, mean = 0.4, float(MEAN[0])
    alpha_bar = LINEAR.alpha_bar
    x_0_error = deviation**2 * (1 - alpha_bar) / (alpha_bar * deviation**2 + 1 - alpha_bar)
    shrink = (
        alpha_bar.sqrt() * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
    )  # E[x_0 | x_t] = mean + shrink (x_t - ...)
    expected_mean, expected_variance = 0.0, 1.0
    for t, s in pairwise(timesteps(LINEAR, steps)):
        # q(x_s | x_t, x_0): precision-weighted average of the two sides; x_t / root has variance
        # `beyond` about x_s
        a_t, a_s = float(alpha_bar[t]), float(alpha_bar[s])
        root, beyond = math.sqrt(a_t / a_s), a_s / a_t - 1
        weight = 1.0 if s == 0 else beyond / (beyond + 1 - a_s)  # of sqrt(a_s) x_0
        small = weight * (1 - a_s)
        gain, offset = float(shrink[t]), mean - float(shrink[t]) * math.sqrt(a_t) * mean
        slope = weight * math.sqrt(a_s) * gain + (1 - weight) / root
        large = 1 - a_t / a_s
        if s == 0:
            sigma_squared = 0.0
        elif variance == "analytic":
            sigma_squared = small + weight**2 * a_s * float(x_0_error[t])
        else:
            sigma_squared = {"small": small, "large": large, "learned": math.sqrt(small * large)}[
                variance
            ]
        expected_mean = slope * expected_mean + weight * math.sqrt(a_s) * offset
        expected_variance = slope**2 * expected_variance + sigma_squared

    def denoise(x_t: Tensor, t: Tensor):  # type: ignore[no-untyped-def]
        x_0 = mean + shrink[t].view(-1, 1) * (x_t - alpha_bar[t].sqrt().view(-1, 1) * mean)
        return (x_0, torch.full_like(x_0, 0.5)) if variance == "learned" else x_0

    sampled = ancestral(
        denoise,
        start(100, 100),
        LINEAR,
        steps,
        variance,
        x_0_error,
        options=SamplerOptions(generator=torch.Generator().manual_seed(1)),
    )
    count = sampled.numel()
    assert abs(float(sampled.mean()) - expected_mean) < 4 * math.sqrt(expected_variance / count)
    assert float(sampled.var()) == pytest.approx(expected_variance, rel=4 * math.sqrt(2 / count))
    if variance in ("small", "large") and steps == 1000:
        assert expected_variance == pytest.approx(
            deviation**2, rel=0.03
        )  # and these are the data's own
    if variance == "analytic":  # exact up to the last step, which adds no noise
        assert expected_variance + float(x_0_error[timesteps(LINEAR, steps)[-2]]) == pytest.approx(
            deviation**2, rel=2e-3
        )


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_ddim_recovers_mean_and_covariance(eta: float) -> None:
    sampled = ddim(
        gaussian(COSINE),
        start(10_000, 3),
        COSINE,
        250,
        eta=eta,
        options=SamplerOptions(generator=torch.Generator().manual_seed(1)),
    )
    torch.testing.assert_close(sampled.mean(0), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(sampled.T.cov(), COVARIANCE, rtol=0, atol=0.03)


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance() -> None:
    samples = (
        sampler(
            network,
            start(4, 5),
            COSINE,
            30,
            options=SamplerOptions(generator=generators(range(4))),
            **options,
        )
        for sampler, options in ((ddim, {"eta": 1.0}), (ancestral, {"variance": "small"}))
    )
    torch.testing.assert_close(*samples, rtol=1e-9, atol=1e-9)


def test_samplers_end_at_the_predicted_x_0() -> None:
    """alpha_bar at the end is 1: with a predictor that is always right the data come out
    exactly.
    """
    data = start(4, 5)
    for sampler in (ddim, dpm_solver, ancestral):
        out = sampler(lambda x_t, t: data.clone(), start(4, 5, seed=1), COSINE, 7)
        torch.testing.assert_close(out, data, rtol=0, atol=1e-12)


# diffusers, step by step on the same x_t


def follow(  # type: ignore[no-untyped-def]
    scheduler,
    sampler,
    steps: int,
    schedule: Schedule,
    compared: int | None = None,
    fraction: Tensor | None = None,
    told=None,
    spacing: Spacing | None = None,
    **options,
) -> float:
    """Run ours, give diffusers each of our x_t and x_0, and return the largest relative difference
    of a step's result.

    Only the first `compared` steps count where it is given. fraction: of a learned variance; theirs
    is from -1 to 1, beside x_0. told: what
    else their step is told.
    """
    scheduler.alphas_cumprod = schedule.alpha_bar[1:]  # theirs are float32
    scheduler.betas = 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    scheduler.alphas = 1 - scheduler.betas
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    visited: list[tuple[int, Tensor, Tensor]] = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return network(x_t, t) if fraction is None else (network(x_t, t), fraction)

    def visit(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        visited.append((t, x_t.clone(), x_0.clone()))

    end = sampler(
        denoise,
        start(4, 5),
        schedule,
        steps,
        options=SamplerOptions(spacing=spacing, callback=visit),
        **options,
    )
    worst = 0.0
    pairs = list(zip(visited, [*(x_t for _, x_t, _ in visited[1:]), end], strict=True))
    for (t, x_t, x_0), ours in pairs[:compared]:
        predicted = x_0 if fraction is None else torch.cat([x_0, 2 * fraction - 1], 1)
        theirs = scheduler.step(predicted, t - 1, x_t, **(told or {})).prev_sample
        worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
    return worst


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddim_steps_are_those_of_diffusers(schedule: Schedule, steps: int) -> None:
    scheduler = DDIMScheduler(
        1000,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    assert [int(t) + 1 for t in scheduler.timesteps] == timesteps(schedule, steps)[:-1]
    assert follow(scheduler, ddim, steps, schedule) < 1e-9


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_steps_that_add_noise_are_those_of_diffusers(
    schedule: Schedule, steps: int, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDIMScheduler(
        1000,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    eps = start(4, 5, seed=3)
    monkeypatch.setattr("training.diffusion.samplers.noise_like", lambda x, generator: eps.clone())
    assert (
        follow(scheduler, ddim, steps, schedule, told={"eta": eta, "variance_noise": eps}, eta=eta)
        < 1e-9
    )


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [20, 1000])
def test_ancestral_steps_of_a_learned_variance_are_those_of_diffusers(
    schedule: Schedule, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(
        1000,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
        variance_type="learned_range",
    )
    scheduler.set_timesteps(steps)
    eps, fraction = (
        start(4, 5, seed=3),
        torch.rand(4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    )
    monkeypatch.setattr("training.diffusion.samplers.noise_like", lambda x, generator: eps.clone())
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: eps.clone()
    )
    compared = (
        steps - 1 if steps < 1000 else None
    )  # in fewer than T steps theirs adds noise to the last one, the image itself
    assert (
        follow(scheduler, ancestral, steps, schedule, compared, fraction, variance="learned") < 1e-6
    )


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [20, 1000])
def test_ancestral_steps_are_those_of_diffusers(
    variance: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(
        1000,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
        variance_type=f"fixed_{variance}",
    )
    scheduler.set_timesteps(steps)
    eps = start(4, 5, seed=3)  # the same noise in every step of both
    monkeypatch.setattr("training.diffusion.samplers.noise_like", lambda x, generator: eps.clone())
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: eps.clone()
    )
    # in fewer than T steps theirs adds the large noise even to the last one, to the image itself;
    # Algorithm 2 adds none
    compared = steps - 1 if (variance, steps) == ("large", 20) else None
    assert follow(scheduler, ancestral, steps, LINEAR, compared, variance=variance) < 1e-9


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
def test_dpm_solver_steps_are_those_of_diffusers(
    schedule: Schedule, steps: int, spacing: str
) -> None:
    scheduler = DPMSolverMultistepScheduler(
        1000, prediction_type="sample", final_sigmas_type="zero", solver_order=2
    )
    times = timesteps(schedule, steps, spacing)
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    alpha_bar = schedule.alpha_bar[times]
    scheduler.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    # theirs rounds x_t to float32 in every step
    assert follow(scheduler, dpm_solver, steps, schedule, spacing=spacing) < 1e-5


@pytest.mark.parametrize("steps", [10, 200])
def test_ddim_inversion_steps_are_those_of_diffusers(steps: int) -> None:
    scheduler = DDIMInverseScheduler(
        1000,
        prediction_type="epsilon",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = LINEAR.alpha_bar[1:]
    x = start(4, 5)
    theirs = x
    for t in scheduler.timesteps.tolist():
        now = torch.full((4,), t + 1)
        theirs = scheduler.step(
            to_eps(LINEAR, theirs, now, network(theirs, now)), t, theirs
        ).prev_sample
    ours = ddim_invert(network, x, LINEAR, steps)
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-6


# Inversion


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, for data in [-1, 1]."""
    return 10 * math.log10(4 / float((a - b).square().mean()))


def test_ddim_inversion_recovers_the_noise() -> None:
    """For Gaussian data the noise behind x_0 is known: x_T = (x_0 - mean) whitened, up to what is
    left of the data at T.
    """
    x_T = start(16, 3)
    x_0 = ddim(gaussian(COSINE), x_T, COSINE, 500)
    torch.testing.assert_close(
        ddim_invert(gaussian(COSINE), x_0, COSINE, 500, refinements=9), x_T, rtol=0, atol=1e-6
    )


def test_inversion_then_sampling_reconstructs_better_with_steps_and_refinements() -> None:
    denoise = mixture_denoise(COSINE)
    x_0 = MIXTURE[torch.arange(64) % 4] + 0.1 * start(64, 2, seed=5)
    table = {}
    for steps in (10, 25, 50, 100, 250):
        for refinements in (0, 2):
            x_T = ddim_invert(denoise, x_0, COSINE, steps, refinements)
            table[steps, refinements] = psnr(ddim(denoise, x_T, COSINE, steps), x_0)
    print(
        "PSNR in dB by (steps, refinements):",
        {key: round(value, 1) for key, value in table.items()},
    )  # shown by pytest -s
    assert table[10, 0] < table[50, 0] < table[250, 0]
    assert table[250, 0] > 30
    for steps in (50, 100, 250):
        assert table[steps, 2] > table[steps, 0] + 5


MIXTURE = torch.tensor([[0.7, 0.7], [-0.7, 0.6], [-0.5, -0.8], [0.6, -0.6]], dtype=torch.float64)


def mixture_denoise(schedule: Schedule, deviation: float = 0.15) -> Denoise:
    """E[x_0 | x_t] for four Gaussians: a known denoiser that is not affine."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = float(schedule.alpha_bar[t[0]])
        spread = alpha_bar * deviation**2 + 1 - alpha_bar
        away = x_t[:, None] - math.sqrt(alpha_bar) * MIXTURE  # (B, 4, 2)
        weight = (-away.square().sum(-1) / (2 * spread)).softmax(-1)
        return (
            weight[..., None] * (MIXTURE + math.sqrt(alpha_bar) * deviation**2 / spread * away)
        ).sum(1)

    return denoise


# Guidance


def test_guidance_is_one_call_and_the_formula_in_eps() -> None:
    calls: list[int] = []
    conditioned, free = start(3, 4, seed=1), start(3, 4, seed=2)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x_t))
        assert torch.equal(x_t[:3], x_t[3:])
        assert torch.equal(t[:3], t[3:])
        return torch.cat([conditioned, free])

    x_t, t, w = start(3, 4), torch.tensor([700, 20, 300]), 3.0
    x_0 = guided(denoise, w)(x_t, t)
    assert calls == [6]
    assert isinstance(x_0, Tensor)
    eps_c, eps_u = to_eps(COSINE, x_t, t, conditioned), to_eps(COSINE, x_t, t, free)
    torch.testing.assert_close(
        to_eps(COSINE, x_t, t, x_0), eps_u + w * (eps_c - eps_u), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(guided(denoise, 1.0)(x_t, t), conditioned)
    torch.testing.assert_close(guided(denoise, 0.0)(x_t, t), free)


def test_guided_sampling_of_gaussians_moves_the_mean_as_it_should() -> None:
    """Both conditions N(m, I) make x_0_c - x_0_u a known shift: with w the sample is that of the
    mean m_u + w (m_c - m_u).
    """
    m_c, m_u, w = 0.5, -0.2, 2.5

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = COSINE.alpha_bar[t].view(-1, 1)
        mean = torch.cat([torch.full((len(x_t) // 2, 1), m_c), torch.full((len(x_t) // 2, 1), m_u)])
        return mean + alpha_bar.sqrt() * (x_t - alpha_bar.sqrt() * mean)

    out = ddim(guided(denoise, w), torch.zeros(2, 3, dtype=torch.float64), COSINE, 1000)
    torch.testing.assert_close(out, torch.full_like(out, m_u + w * (m_c - m_u)), rtol=0, atol=1e-3)


def test_dynamic_threshold_is_the_quantile_of_each_sample() -> None:
    x_0 = torch.stack([torch.linspace(-2, 2, 101), torch.linspace(-0.5, 0.5, 101)])
    limit = np.quantile(x_0[0].abs().numpy(), 0.9, method="higher")
    out = threshold(x_0.clone(), 0.9)
    torch.testing.assert_close(out[0], x_0[0].clamp(-limit, limit) / limit)
    torch.testing.assert_close(out[1], x_0[1])  # within [-1, 1] already


def test_learned_variance_survives_guidance() -> None:
    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return network(x_t, t), torch.cat([torch.zeros(4, 5), torch.ones(4, 5)])

    def sample(denoise: Denoise, variance: Variance) -> Tensor:
        options = SamplerOptions(generator=torch.Generator().manual_seed(0))
        return ancestral(denoise, start(4, 5), COSINE, 20, variance, options=options)

    learned, small = sample(guided(denoise, 1.0), "learned"), sample(network, "small")
    torch.testing.assert_close(learned, small, rtol=1e-6, atol=1e-6)


# Determinism, memory, times


@pytest.mark.parametrize("size", [1, 2, 5])
def test_samples_do_not_depend_on_how_the_batch_is_split(size: int) -> None:
    """Seeds 0..5, in one batch and in parts; the network here treats samples apart, as a U-Net does
    up to rounding.
    """

    def sample(sampler, seeds: list[int], **options) -> Tensor:  # type: ignore[no-untyped-def]
        own = generators(seeds)
        return sampler(
            guided(network, 1.5),
            noise((len(seeds), 3, 8), own),
            COSINE,
            12,
            options=SamplerOptions(generator=own),
            **options,
        )

    for sampler, options in (
        (ancestral, {}),
        (ancestral, {"variance": "large"}),
        (ddim, {"eta": 0.7}),
    ):
        whole = sample(sampler, list(range(6)), **options)
        parts = torch.cat(
            [sample(sampler, list(range(6))[i : i + size], **options) for i in range(0, 6, size)]
        )
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(sample(sampler, list(range(6)), **options), whole)


def test_the_callers_noise_stays_as_it_was() -> None:
    x_T = start(4, 5)
    for call in (
        lambda: ddim(network, x_T, COSINE, 5),
        lambda: ancestral(network, x_T, COSINE, 5),
        lambda: dpm_solver(network, x_T, COSINE, 5),
        lambda: ddim_invert(network, x_T, COSINE, 5, refinements=1),
    ):
        call()
        assert torch.equal(x_T, start(4, 5))


def test_a_network_that_hands_its_input_back_is_read_before_it_changes() -> None:
    for sampler in (ddim, dpm_solver):
        same, fresh = (
            sampler(denoise, start(2, 5), COSINE, 5)
            for denoise in (lambda x, t: x, lambda x, t: x.clone())
        )
        assert torch.equal(same, fresh)


EXTRA = {  # peak of what a run holds beside x_t and the network's newest output, in image batches
    "ddim": (lambda f, x: ddim(f, x, COSINE, 6), 0),
    "ddim eta": (lambda f, x: ddim(f, x, COSINE, 6, eta=1.0), 1),
    "dpm_solver": (lambda f, x: dpm_solver(f, x, COSINE, 6), 1),
    "ancestral": (lambda f, x: ancestral(f, x, COSINE, 6), 1),
    "ancestral learned": (
        lambda f, x: ancestral(lambda a, t: (f(a, t), a), x, COSINE, 6, "learned"),
        1,
    ),
    "ddim_invert": (lambda f, x: ddim_invert(f, x, COSINE, 6), 1),
    "ddim_invert refined": (lambda f, x: ddim_invert(f, x, COSINE, 6, refinements=2), 1),
    # the network's own batch is doubled here: two in, two out in place of one
    "guided": (lambda f, x: ddim(guided(f, 2.0), x, COSINE, 6), 3),
    "guided, dynamic threshold": (
        lambda f, x: ddim(guided(f, 2.0, dynamic_threshold=0.9), x, COSINE, 6),
        3,
    ),
    "v to x_0": (lambda f, x: ddim(as_denoise(f, COSINE, "v", clip=1.0), x, COSINE, 6), 1),
}


@pytest.mark.parametrize("name", EXTRA)
def test_no_step_allocates_more_than_one_extra_batch(name: str) -> None:
    """Follow every allocation and release of the CPU allocator through the profiler, with a network
    that allocates its output alone.
    """
    sampler, extra = EXTRA[name]
    x_T = torch.randn(4, 3, 64, 64)
    sampler(lambda x_t, t: torch.neg(x_t), x_T)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        sampler(lambda x_t, t: torch.neg(x_t), x_T)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak / (x_T.numel() * 4) <= 2 + extra + 0.01


@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
@pytest.mark.parametrize(
    "schedule", [LINEAR, COSINE, Schedule.cosine(7)], ids=["linear", "cosine", "short"]
)
def test_times_fall_strictly_from_start_to_0_for_every_number_of_steps(
    schedule: Schedule, spacing: str
) -> None:
    for first in {schedule.T, schedule.T // 2, 1}:
        for steps in {1, 2, first // 3, first - 1, first} & set(range(1, first + 1)):
            times = timesteps(schedule, steps, spacing, first)
            assert (times[0], times[-1], len(times)) == (first, 0, steps + 1)
            assert all(t > s for t, s in pairwise(times))


def test_the_callback_sees_every_step_with_its_x_t_and_x_0() -> None:
    seen: list[tuple[int, int]] = []

    def callback(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        seen.append((step, t))
        torch.testing.assert_close(x_0, network(x_t, torch.full((2,), t)))

    for sampler in (ddim, ancestral, dpm_solver):
        seen.clear()
        sampler(
            network,
            start(2, 5),
            COSINE,
            4,
            options=SamplerOptions(spacing="uniform", callback=callback),
        )
        assert seen == [(0, 1000), (1, 750), (2, 500), (3, 250)]


# Bad input


def test_nan_from_the_network_is_named_with_step_and_t() -> None:
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / 0 if t[0] == 600 else network(x_t, t)

    for sampler in (
        ddim,
        ancestral,
        lambda *a: dpm_solver(*a, options=SamplerOptions(spacing="uniform")),
    ):
        with pytest.raises(DataError, match=r"NaN or infinity at step 2 \(t = 600 of 1000\)"):
            sampler(denoise, start(2, 5), COSINE, 5)


def test_infinity_is_named_under_guidance_that_clips() -> None:
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = network(x_t, t)
        x_0[0, 0] = math.inf if t[0] == 600 else 0
        return x_0

    for limits in ({"clip": 1.0}, {"dynamic_threshold": 0.9}):
        with pytest.raises(DataError, match=r"NaN or infinity at step 2 \(t = 600 of 1000\)"):
            ddim(guided(denoise, 2.0, **limits), start(2, 5), COSINE, 5)
    with pytest.raises(DataError, match=r"NaN or infinity at step 2 \(t = 600 of 1000\)"):
        ddim(as_denoise(denoise, COSINE, "x_0", clip=1.0), start(2, 5), COSINE, 5)


def test_nan_in_the_learned_variance_is_named_where_it_came() -> None:
    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return network(x_t, t), torch.full_like(x_t, math.nan if t[0] == 600 else 0.5)

    with pytest.raises(DataError, match=r"NaN or infinity at step 2 \(t = 600 of 1000\)"):
        ancestral(denoise, start(2, 5), COSINE, 5, "learned")


def test_nan_is_named_at_the_end_where_no_step_may_wait() -> None:
    """On an accelerator the sums of all steps are read at once."""
    calls = _CheckedDenoise(network, COSINE)
    calls.sums = [
        (0, 1000, torch.tensor(1.0)),
        (1, 750, torch.tensor(math.inf)),
        (2, 500, torch.tensor(math.nan)),
    ]
    with pytest.raises(DataError, match=r"step 1 \(t = 750"):
        calls.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_samples_on_an_accelerator_are_those_of_the_cpu() -> None:
    for sampler, options in ((ancestral, {}), (ddim, {"eta": 0.7})):
        on_cpu, on_gpu = (
            sampler(
                network,
                noise((3, 8), own := generators(range(3)), device),
                COSINE,
                20,
                options=SamplerOptions(generator=own),
                **options,
            ).cpu()
            for device in ("cpu", "cuda")
        )
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match=r"step 2 \(t = 600"):
        ddim(
            lambda x_t, t: torch.where(t[:, None] <= 600, math.nan, network(x_t, t)),
            torch.zeros(2, 5, device="cuda"),
            COSINE,
            5,
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ddim(network, x, COSINE, 0), "choose 1 to 1000 steps"),
        (lambda x: ddim(network, x, COSINE, 1001), "choose 1 to 1000 steps"),
        (
            lambda x: ddim(network, x, COSINE, 10, options=SamplerOptions(start=1001)),
            r"start = 1001: it must lie in 1\.\.1000",
        ),
        (
            lambda x: ddim(network, x, COSINE, 10, options=SamplerOptions(spacing="karras")),
            "choose 'uniform' or 'log_snr'",
        ),
        (lambda x: ddim(network, x, COSINE, 10, eta=1.5), "eta = 1.5"),
        (lambda x: ddim(network, x, COSINE, 10, eta=-0.5), "eta = -0.5"),
        (
            lambda x: ddim(lambda x_t, t: x_t[:, :2], x, COSINE, 10),
            r"returned \(2, 2\) for \(2, 5\) at step 0 \(t = 1000\)",
        ),
        (lambda x: ddim(network, x[0], COSINE, 10), r"x is torch.float64 \(5,\)"),
        (lambda x: ddim(network, x.long(), COSINE, 10), "floating-point batch"),
        (lambda x: ancestral(network, x, COSINE, 0), "choose 1 to 1000 steps"),
        (
            lambda x: ancestral(network, x, COSINE, options=SamplerOptions(start=0)),
            r"start = 0: it must lie in 1\.\.1000",
        ),
        (
            lambda x: ancestral(network, x, COSINE, 10, "learned"),
            r"no fraction at step 0 \(t = 1000\)",
        ),
        (lambda x: ancestral(network, x, COSINE, 10, "analytic"), "take it from measure_x_0_error"),
        (
            lambda x: ancestral(
                network, x, COSINE, 10, options=SamplerOptions(generator=generators([1]))
            ),
            "1 generators for a batch of 2",
        ),
        (
            lambda x: ddim(guided(lambda x_t, t: x_t[:2], 2.0), x, COSINE, 10),
            "returned 2 samples for 4",
        ),
        (lambda x: guided(network, 2.0, dynamic_threshold=99.5), "dynamic_threshold = 99.5"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(start(2, 5))

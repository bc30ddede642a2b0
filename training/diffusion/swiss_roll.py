"""The two-dimensional Swiss roll (Sohl-Dickstein et al. 2015, figure 1): trains a small network,
samples it, measures the samples and draws the result.

Knows nothing of images or the pipeline. Writes `swiss_roll.png` into a folder.
Legend: B points; x (B, 2).
"""

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.console.progress import Progress
from infra.errors import CallerError
from training.diffusion.process import Denoise, Schedule, as_denoise, simple_loss, training_target
from training.diffusion.samplers import SamplerOptions, ancestral, ddim, dpm_solver
from training.diffusion.swiss_roll_plot import Measurements, RateRow, draw
from training.diffusion.variance import measure_x_0_error

RATES = (0.9999, 0.9, 0.5, 0.2, 0.1, 0.05, 0.02)
STEP_COUNTS = (2, 5, 10, 20, 50, 100)
BATCH, LEARNING_RATE, EMA_DECAY = 512, 4e-3, 0.999
Loss = Callable[["RollNetwork", Tensor, torch.Generator], Tensor]


def roll_points(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the roll, float32 (count, 2).

    r is the angle, from 1.5 pi to 4.5 pi, scaled to a radius of 2; the noise is 0.02.
    """
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 7
    return spiral + 0.02 * torch.randn(count, 2, generator=generator)


class RollNetwork(nn.Module):
    """A perceptron with four hidden layers over (x_t, log SNR).

    Conditioning on log SNR instead of t makes one network fit every schedule and diffusion rate.
    """

    def __init__(self, width: int = 96, waves: int = 16) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.linspace(0.05, 1.5, waves))
        self.enter = nn.Linear(2 + 2 * waves, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """Map x_t (B, 2) and log_snr (B,) to a prediction (B, 2)."""
        phase = log_snr[:, None] * self.frequencies  # (B, waves)
        h = F.silu(self.enter(torch.cat([x_t, phase.sin(), phase.cos()], dim=1)))
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.leave(h)


def velocity_loss(schedule: Schedule) -> Loss:
    """Return the simple loss on v, which weights fine and coarse noise equally (Salimans & Ho
    2022).
    """
    log_snr = schedule.log_snr.float()

    def loss(network: RollNetwork, x_0: Tensor, generator: torch.Generator) -> Tensor:
        t = schedule.draw_t(len(x_0), generator)
        eps = torch.randn(x_0.shape, generator=generator)
        prediction = network(schedule.q_sample(x_0, t, eps), log_snr[t])
        return simple_loss(prediction, training_target(schedule, x_0, eps, t, "v"))

    return loss


def train(
    loss: Loss, steps: int | None = None, seconds: float | None = None, seed: int = 0
) -> tuple[RollNetwork, int]:
    """Train until `steps` or `seconds` are used up, whichever comes first.

    Returns the averaged network and the number of steps. The learning rate follows a cosine over
    that budget, so with `steps` alone the result depends only on the seed.
    """
    if steps is None and seconds is None:
        raise ValueError("neither steps nor seconds is set: pass at least one of them")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RollNetwork()
    average = deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True
    )
    started_s, done = time.monotonic(), 0
    with Progress("swiss roll", steps, "steps") as progress:
        while True:
            elapsed_s = time.monotonic() - started_s
            spent = max(done / steps if steps else 0.0, elapsed_s / seconds if seconds else 0.0)
            if spent >= 1:
                return average, done
            optimizer.param_groups[0]["lr"] = (
                LEARNING_RATE * min(1.0, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent))
            )
            batch_loss = loss(network, roll_points(BATCH, generator), generator)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            done += 1
            decay = min(
                EMA_DECAY, (1 + done) / (10 + done)
            )  # small at first, to forget the first steps
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast.detach(), 1 - decay)
            progress.update(done)


def denoise_with(network: RollNetwork, schedule: Schedule) -> Denoise:
    """Return `denoise` for a network that predicts v, under any schedule."""
    log_snr = schedule.log_snr.float()
    return as_denoise(lambda x_t, t: network(x_t, log_snr[t]), schedule, "v")


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo
    2013).

    It is 0 for equal distributions; an estimate is below 0 only by chance.
    """
    within = (torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - sum(within))


class RollFigures(TypedDict):
    """The measurements of a trained Swiss roll."""

    energy_distance: float
    """Of DPM-Solver++ in 50 steps to fresh data."""
    data_to_data: float
    """Distance of data to data: root mean square of 8 draws."""
    seconds: float
    """Of training."""
    steps: int
    by_rate: list[RateRow]
    by_steps: dict[str, dict[int, float]]
    """Energy distances by sampler and step count."""
    picture: str
    """Path of the PNG file."""


def swiss_roll(
    out: Path, steps: int = 4000, seed: int = 0, count: int = 3000, rates: Sequence[float] = ()
) -> RollFigures:
    """Train on the roll, sample it with several rates and step counts, draw `out`/swiss_roll.png.

    count: number of points for every energy distance. rates: diffusion rates, the beta of every
    step (default: RATES).
    """
    if steps < 1 or count < 100:
        raise CallerError(f"steps = {steps}, count = {count}: use at least 1 step and 100 points")
    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule.cosine()
    started_s = time.monotonic()
    network, steps_done = train(velocity_loss(schedule), steps, seed=seed)
    trained_s = time.monotonic() - started_s

    generator = torch.Generator().manual_seed(seed + 1)
    data, calibration_data = roll_points(count, generator), roll_points(count, generator)
    data_to_data = _data_to_data(data, generator)
    x_T = torch.randn(count, 2, generator=generator)
    by_rate = _by_rate(network, x_T, data, sorted(set(rates or RATES), reverse=True), generator)
    by_steps = _by_steps(network, x_T, data, calibration_data, generator)

    figure = out / "swiss_roll.png"
    facts = {
        "seed": seed,
        "steps": steps_done,
        "points": count,
        "schedule": f"cosine, T = {schedule.T}",
    }
    measured = Measurements(by_rate, by_steps, data_to_data)
    draw(figure, denoise_with(network, schedule), schedule, data[:2000], measured, seed, facts)
    return {
        "energy_distance": by_steps["DPM-Solver++(2M)"][50],
        "data_to_data": data_to_data,
        "seconds": trained_s,
        "steps": steps_done,
        "by_rate": by_rate,
        "by_steps": by_steps,
        "picture": str(figure),
    }


def _data_to_data(data: Tensor, generator: torch.Generator) -> float:
    """Return the root mean square energy distance of 8 fresh samples of the roll to `data`."""
    distances = [energy_distance(roll_points(len(data), generator), data) for _ in range(8)]
    return math.sqrt(sum(distance**2 for distance in distances) / len(distances))


def _by_rate(
    network: RollNetwork,
    x_T: Tensor,
    data: Tensor,
    rates: Sequence[float],
    generator: torch.Generator,
) -> list[RateRow]:
    """Measure ancestral sampling under schedules of one constant diffusion rate."""
    rows: list[RateRow] = []
    for rate in rates:
        schedule = Schedule.constant(rate)
        denoise = denoise_with(network, schedule)
        samples = ancestral(denoise, x_T, schedule, options=SamplerOptions(generator=generator))
        distance = energy_distance(samples, data)
        rows.append({"rate": rate, "steps": schedule.T, "energy_distance": distance})
    return rows


def _by_steps(
    network: RollNetwork,
    x_T: Tensor,
    data: Tensor,
    calibration_data: Tensor,
    generator: torch.Generator,
) -> dict[str, dict[int, float]]:
    """Measure each sampler under the cosine schedule: energy distances by name and step count."""
    schedule = Schedule.cosine()
    denoise = denoise_with(network, schedule)
    x_0_error = measure_x_0_error(
        denoise, calibration_data, schedule, points=64, generator=generator
    )
    options = SamplerOptions(generator=generator)
    samplers: dict[str, Callable[[int], Tensor]] = {
        "ancestral, small variance": lambda n: ancestral(
            denoise, x_T, schedule, n, options=options
        ),
        "ancestral, analytic variance": lambda n: ancestral(
            denoise, x_T, schedule, n, "analytic", x_0_error, options
        ),
        "DDIM": lambda n: ddim(denoise, x_T, schedule, n),
        "DPM-Solver++(2M)": lambda n: dpm_solver(denoise, x_T, schedule, n),
    }
    return {
        name: {n: energy_distance(sample(n), data) for n in STEP_COUNTS}
        for name, sample in samplers.items()
    }

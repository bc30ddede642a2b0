"""The two-dimensional Swiss roll (Sohl-Dickstein et al. 2015, figure 1): train a small network,
sample it, measure it, draw it.

Knows nothing of images or of the pipeline. Reads nothing; writes `swiss_roll.png` into the folder
it is given.
Legend: B points; x (B, 2).
"""

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.console.progress import Progress
from infra.errors import CallerError
from training.diffusion.process import Denoise, Schedule, as_denoise, simple_loss, training_target
from training.diffusion.samplers import ancestral, ddim, dpm_solver
from training.diffusion.swiss_roll_plot import draw
from training.diffusion.variance import measure_x_0_error

RATES = (0.9999, 0.9, 0.5, 0.2, 0.1, 0.05, 0.02)
STEP_COUNTS = (2, 5, 10, 20, 50, 100)
BATCH, LEARNING_RATE, EMA_DECAY = 512, 4e-3, 0.999
Loss = Callable[["RollNetwork", Tensor, torch.Generator], Tensor]


def roll_points(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the roll, float32 (count, 2): r = angle from 1.5 pi to 4.5 pi, scaled to a
    radius of 2, noise 0.02.
    """
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 7
    return spiral + 0.02 * torch.randn(count, 2, generator=generator)


class RollNetwork(nn.Module):
    """A perceptron of four hidden layers over (x_t, log SNR); conditioned on log SNR it serves
    every schedule and diffusion rate.
    """

    def __init__(self, width: int = 96, waves: int = 16) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.linspace(0.05, 1.5, waves))
        self.enter = nn.Linear(2 + 2 * waves, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """x_t (B, 2), log_snr (B,) -> prediction (B, 2)."""
        phase = log_snr[:, None] * self.frequencies  # (B, waves)
        h = F.silu(self.enter(torch.cat([x_t, phase.sin(), phase.cos()], dim=1)))
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.leave(h)


def velocity_loss(schedule: Schedule) -> Loss:
    """The simple loss on v, which weighs fine and coarse noise alike (Salimans & Ho 2022)."""
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
    """Train until `steps` or `seconds` are used up, whichever comes first; returns the averaged
    network and the steps taken.

    The learning rate follows a cosine over that budget, so a result depends on the seed alone where
    only `steps` is given.
    """
    if steps is None and seconds is None:
        raise ValueError("neither steps nor seconds: give at least one budget")
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
            keep = min(EMA_DECAY, (1 + done) / (10 + done))  # forget the first steps soon
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast.detach(), 1 - keep)
            progress.update(done)


def denoise_with(network: RollNetwork, schedule: Schedule) -> Denoise:
    """Read a network that predicts v, under any schedule."""
    log_snr = schedule.log_snr.float()
    return as_denoise(lambda x_t, t: network(x_t, log_snr[t]), schedule, "v")


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| without bias (Székely & Rizzo 2013): 0 for equal
    distributions, below it by chance alone.
    """
    within = (torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def swiss_roll(
    out: Path, steps: int = 4000, seed: int = 0, count: int = 3000, rates: Sequence[float] = ()
) -> dict[str, Any]:
    """Train on the roll, sample it at several diffusion rates and step counts, and draw
    `out`/swiss_roll.png.

    count: points behind every energy distance. rates: diffusion rates, the beta of every step;
    RATES where none is given. Returns the distance of DPM-Solver++ in 50 steps to fresh data, what
    chance makes of data to data (root mean square of 8 draws), tables by diffusion rate and by step
    count, the seconds that training took, and the picture.
    """
    if steps < 1 or count < 100:
        raise CallerError(f"steps = {steps}, count = {count}: give at least 1 step and 100 points")
    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule.cosine()
    started_s = time.monotonic()
    network, steps_done = train(velocity_loss(schedule), steps, seed=seed)
    trained_s = time.monotonic() - started_s

    generator = torch.Generator().manual_seed(seed + 1)
    data, again = roll_points(count, generator), roll_points(count, generator)
    between = [energy_distance(roll_points(count, generator), data) for _ in range(8)]
    chance = math.sqrt(sum(distance**2 for distance in between) / len(between))
    x_T = torch.randn(count, 2, generator=generator)
    denoise = denoise_with(network, schedule)

    by_rate = []
    for rate in sorted(set(rates or RATES), reverse=True):
        constant = Schedule.constant(rate)
        samples = ancestral(denoise_with(network, constant), x_T, constant, generator=generator)
        by_rate.append(
            {"rate": rate, "steps": constant.T, "energy_distance": energy_distance(samples, data)}
        )

    x_0_error = measure_x_0_error(denoise, again, schedule, points=64, generator=generator)
    samplers: dict[str, Callable[[int], Tensor]] = {
        "ancestral, small variance": lambda n: ancestral(
            denoise, x_T, schedule, n, generator=generator
        ),
        "ancestral, analytic variance": lambda n: ancestral(
            denoise, x_T, schedule, n, "analytic", x_0_error, generator=generator
        ),
        "DDIM": lambda n: ddim(denoise, x_T, schedule, n),
        "DPM-Solver++(2M)": lambda n: dpm_solver(denoise, x_T, schedule, n),
    }
    by_steps = {
        name: {n: energy_distance(sample(n), data) for n in STEP_COUNTS}
        for name, sample in samplers.items()
    }

    picture = out / "swiss_roll.png"
    facts = {
        "seed": seed,
        "steps": steps_done,
        "points": count,
        "schedule": f"cosine, T = {schedule.T}",
    }
    draw(picture, denoise, schedule, data[:2000], by_rate, by_steps, chance, seed, facts)
    return {
        "energy_distance": by_steps["DPM-Solver++(2M)"][50],
        "data_to_data": chance,
        "seconds": trained_s,
        "steps": steps_done,
        "by_rate": by_rate,
        "by_steps": by_steps,
        "picture": str(picture),
    }

"""What a trained denoiser's x_0 is worth at every t: its best blend with the noised data itself,
fitted on training data.

A network that predicts x_0 and saw few nearly clean pictures gives them back blurred, where x_t
alone is all but the answer. The blend a_t x_0' + b_t x_t with the least squared error mends that
with two numbers a time. For what starts from real data and lives at small t (the likelihood); what
is sampled from noise has no detail there to keep.
Legend: B batch, T diffusion steps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.diffusion.noise import Noise, noise_like
from training.diffusion.process import Denoise, Prediction, Schedule, at, split
from training.diffusion.variance import probe_times


@dataclass(frozen=True, eq=False)
class Calibration:
    """Factors of the network's x_0 and of x_t in the blend, float64 (T + 1,) each; (0, 1) at t
    = 0.
    """

    of_x_0: Tensor
    of_x_t: Tensor

    def __call__(self, denoise: Denoise) -> Denoise:
        """Read `denoise` through the blend."""

        def blended(x_t: Tensor, t: Tensor) -> Prediction:
            x_0, fraction = split(denoise(x_t, t))
            x_0 = (at(self.of_x_0, t, x_0) * x_0).addcmul_(at(self.of_x_t, t, x_t), x_t)
            return x_0 if fraction is None else (x_0, fraction)

        return blended

    def faded(self, share: float) -> "Calibration":
        """Go this share of the way, 0 to 1, back to the denoiser alone: for samplers that add
        noise, which x_t then holds too.
        """
        return Calibration(
            self.of_x_0.lerp(torch.ones_like(self.of_x_0), share), self.of_x_t * (1 - share)
        )


@torch.no_grad()
def calibrate(
    denoise: Denoise, x_0: Tensor, schedule: Schedule, points: int = 32, generator: Noise = None
) -> Calibration:
    """Fit the blend on data x_0 (B, ...) at about `points` times; it is linear in log t between
    them.
    """
    times = probe_times(schedule.T, points)
    factors = np.empty((len(times), 2))
    for i, t in enumerate(times):
        t_batch = t.expand(len(x_0)).to(x_0.device)
        x_t = schedule.q_sample(x_0, t_batch, noise_like(x_0, generator))
        predicted = split(denoise(x_t, t_batch))[0]
        both = torch.stack([predicted.flatten(), x_t.flatten()]).double().cpu().numpy()
        factors[i] = np.linalg.lstsq(
            both @ both.T, both @ x_0.flatten().double().cpu().numpy(), rcond=1e-12
        )[0]
    log_t = np.log(np.maximum(np.arange(schedule.T + 1), 1))
    of_x_0, of_x_t = (
        torch.from_numpy(np.interp(log_t, times.log().numpy(), factors[:, column]))
        for column in (0, 1)
    )
    of_x_0[0], of_x_t[0] = 0.0, 1.0
    return Calibration(of_x_0, of_x_t)

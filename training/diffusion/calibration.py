"""Calibration of a trained denoiser: the best blend of its x_0 with x_t, fitted on training data.

A network that predicts x_0 and saw few nearly clean images returns them blurred, although x_t alone
is almost the answer at small t. The blend a_t x_0' + b_t x_t with the least squared error corrects
this with two numbers for each time. Use it where real data is the start and small t matters (the
likelihood, DDIM inversion). Samples that start from noise have no such detail to keep.
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
    """Factors of the network's x_0 and of x_t in the blend, float64 (T + 1,) each.

    At t = 0 they are (0, 1).
    """

    of_x_0: Tensor
    of_x_t: Tensor

    def __call__(self, denoise: Denoise) -> Denoise:
        """Return `denoise` with its x_0 replaced by the blend."""

        def blended(x_t: Tensor, t: Tensor) -> Prediction:
            x_0, fraction = split(denoise(x_t, t))
            x_0 = (at(self.of_x_0, t, x_0) * x_0).addcmul_(at(self.of_x_t, t, x_t), x_t)
            return x_0 if fraction is None else (x_0, fraction)

        return blended

    def faded(self, share: float) -> "Calibration":
        """Return a calibration that is moved towards the plain denoiser by `share`, from 0 to 1.

        Samplers that add noise need this: x_t then contains that noise too.
        """
        return Calibration(
            self.of_x_0.lerp(torch.ones_like(self.of_x_0), share), self.of_x_t * (1 - share)
        )


@torch.no_grad()
def calibrate(
    denoise: Denoise, x_0: Tensor, schedule: Schedule, points: int = 32, generator: Noise = None
) -> Calibration:
    """Fit the blend on data x_0 (B, ...).

    The factors are fitted at about `points` times and interpolated between them, linearly in log t.
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

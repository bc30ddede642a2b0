"""The figure of the Swiss roll: forward and reverse trajectories, the drift between them, and
energy distances.

Takes a denoiser over (B, 2) and the measured tables; writes one PNG. Uses only matplotlib's Figure,
so it shares no state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from training.diffusion.noise import generators, noise
from training.diffusion.process import Denoise, Schedule, posterior_coefficients, split
from training.diffusion.samplers import SamplerOptions, ancestral, ddim

TIMES = (0, 100, 250, 450, 700, 1000)  # of the cosine schedule's 1000
LIMIT = 2.7
INK, FAINT, BOX = "#22252b", "#8a909b", "#e4e6ea"
LINE_COLOURS = ("#7a5195", "#ef5675", "#ffa600", "#2f7ebc")
COLOURS, NEAREST, FARTHEST = "turbo", 0.6, 2.1  # a point's colour is its distance from the centre


class RateRow(TypedDict):
    """Energy distance of samples under a schedule of one constant diffusion rate."""

    rate: float
    steps: int
    energy_distance: float


@dataclass(frozen=True)
class Measurements:
    """Energy distances to the data, by diffusion rate and by sampler and step count."""

    by_rate: list[RateRow]
    by_steps: dict[str, dict[int, float]]
    data_to_data: float
    """Energy distance between two samples of the data, which is the noise of the estimate."""


def draw(
    path: Path,
    denoise: Denoise,
    schedule: Schedule,
    data: Tensor,
    measured: Measurements,
    seed: int,
    facts: Mapping[str, object],
) -> None:
    """Draw the roll's processes for the points `data` (N, 2), and the measurements below them.

    `facts` are stored as text in the PNG.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(15, 11.7), dpi=110, facecolor="white", layout=layout)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=[3, 1.45]))
    point_generators = generators(range(seed, seed + len(data)))
    eps = noise(data.shape, point_generators)
    reverse = reverse_trajectory(denoise, schedule, eps, point_generators)
    panels = above.subplots(3, len(TIMES))
    for column, t in enumerate(TIMES):
        panels[0, column].set_title("data, t = 0" if t == 0 else f"t = {t}", color=INK, fontsize=13)
        x_t = schedule.q_sample(data, torch.full((len(data),), t), eps)
        _points(panels[0, column], x_t, radius(data))
        _points(panels[1, column], reverse[t], radius(reverse[0]))
        _drift(panels[2, column], denoise, schedule, max(t, 20), data)
    _label_panels(panels)
    flow, left, right = below.subplots(1, 3, width_ratios=[1, 1.15, 1.15])
    _flow(flow, denoise, schedule, eps[:160], data)
    _by_rate(left, measured.by_rate, measured.data_to_data)
    _by_steps(right, measured.by_steps, measured.data_to_data)
    figure.savefig(path, metadata={name: str(value) for name, value in facts.items()})


def _label_panels(panels: np.ndarray) -> None:
    """Name the three rows, and the time of the first drift panel, which is not 0."""
    panels[2, 0].text(
        0.04,
        0.04,
        "t = 20",
        transform=panels[2, 0].transAxes,
        color=INK,
        fontsize=10,
        backgroundcolor="white",
        zorder=5,
    )
    names = (
        r"forward  $q(x_t\,|\,x_0)$  " "\u2192",
        "\u2190" r"  reverse  $p(x_{t-1}\,|\,x_t)$",
        "drift  $E[x_{t-1}] - x_t$",
    )
    for row, name in enumerate(names):
        panels[row, 0].set_ylabel(name, color=INK, fontsize=13)


def radius(points: Tensor) -> np.ndarray:
    """Return the distance from the centre, which gives a point its colour along the roll."""
    return points.norm(dim=1).numpy()


def reverse_trajectory(
    denoise: Denoise, schedule: Schedule, x_T: Tensor, point_generators: list[torch.Generator]
) -> dict[int, Tensor]:
    """Sample by Algorithm 2 of Ho et al. 2020 in 500 steps; return x_t by t, the end at t = 0."""
    x_t_by_time: dict[int, Tensor] = {}

    def store(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        x_t_by_time[t] = x_t.clone()

    options = SamplerOptions(generator=point_generators, callback=store)
    end = ancestral(denoise, x_T, schedule, 500, options=options)
    return x_t_by_time | {0: end}


def _points(axes: Axes, points: Tensor, colour: np.ndarray) -> None:
    axes.scatter(
        points[:, 0],
        points[:, 1],
        c=colour,
        s=3.5,
        cmap=COLOURS,
        vmin=NEAREST,
        vmax=FARTHEST,
        linewidths=0,
    )
    _square(axes)


def _square(axes: Axes) -> None:
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_color(BOX)


def _drift(axes: Axes, denoise: Denoise, schedule: Schedule, t: int, data: Tensor) -> None:
    """Draw lines along the mean of the reverse step at x_t; they are wider and darker for larger
    moves.
    """
    line = torch.linspace(-LIMIT, LIMIT, 61)
    x_t = torch.cartesian_prod(line, line)
    of_x_0, of_x_t, _ = posterior_coefficients(
        float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t - 1])
    )
    with torch.no_grad():
        x_0, _ = split(denoise(x_t, torch.full((len(x_t),), t)))
    drift = (
        (of_x_0 * x_0 + of_x_t * x_t - x_t).numpy().reshape(61, 61, 2).transpose(1, 0, 2)
    )  # (y, x, 2)
    length = np.linalg.norm(drift, axis=2)
    share = np.minimum(length / np.quantile(length, 0.9), 1)
    axes.scatter(data[:, 0], data[:, 1], s=1.5, color=BOX, linewidths=0, zorder=0)
    axes.streamplot(
        line.numpy(),
        line.numpy(),
        drift[..., 0],
        drift[..., 1],
        color=share,
        cmap="viridis_r",
        linewidth=0.4 + 1.1 * share,
        density=1.1,
        arrowsize=0.8,
    )
    _square(axes)


def _flow(axes: Axes, denoise: Denoise, schedule: Schedule, x_T: Tensor, data: Tensor) -> None:
    """Draw DDIM paths from the noise to the roll, coloured by their end points."""
    path: list[Tensor] = []

    def store(step: int, t: int, x_t: Tensor, x_0: Tensor) -> None:
        path.append(x_t.clone())

    path.append(ddim(denoise, x_T, schedule, 200, options=SamplerOptions(callback=store)))
    lines = torch.stack(path, dim=1).numpy()  # (N, steps + 1, 2)
    axes.add_collection(
        LineCollection(
            list(lines),
            array=radius(path[-1]),
            cmap=COLOURS,
            norm=Normalize(NEAREST, FARTHEST),
            linewidths=0.6,
            alpha=0.75,
        )
    )
    axes.scatter(lines[:, 0, 0], lines[:, 0, 1], s=5, color=FAINT, linewidths=0)
    axes.scatter(lines[:, -1, 0], lines[:, -1, 1], s=10, color=INK, linewidths=0, zorder=3)
    axes.set_title("DDIM carries noise (grey) to the roll (black)", color=INK, fontsize=11)
    _square(axes)


def _by_rate(axes: Axes, by_rate: list[RateRow], data_to_data: float) -> None:
    positions = list(range(len(by_rate)))
    axes.plot(
        positions,
        [_plotted(row["energy_distance"], data_to_data) for row in by_rate],
        color=LINE_COLOURS[3],
        marker="o",
    )
    axes.set_xticks(positions, [f"{row['rate']:g}\n{row['steps']}" for row in by_rate])
    _curve(
        axes,
        "by diffusion rate",
        "diffusion rate beta, and the steps it needs (ancestral)",
        data_to_data,
    )


def _by_steps(axes: Axes, by_steps: dict[str, dict[int, float]], data_to_data: float) -> None:
    for (name, row), colour in zip(by_steps.items(), LINE_COLOURS, strict=True):
        labels = [_plotted(distance, data_to_data) for distance in row.values()]
        axes.plot(
            [str(count) for count in row],
            labels,
            marker="o",
            markersize=4,
            label=name,
            color=colour,
        )
    _curve(axes, "by step count", "network calls (cosine schedule)", data_to_data)
    axes.legend(frameon=False, fontsize=9)


def _plotted(distance: float, data_to_data: float) -> float:
    # An estimate may be 0 or below by chance, which a logarithmic axis cannot show.
    return max(distance, data_to_data / 3)


def _curve(axes: Axes, title: str, x_label: str, data_to_data: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=data_to_data / 4)
    axes.axhspan(data_to_data / 4, data_to_data, color=BOX, alpha=0.6, linewidth=0)
    axes.text(
        0.02,
        data_to_data * 0.9,
        "data to data",
        transform=axes.get_yaxis_transform(),
        color=FAINT,
        fontsize=9,
        va="top",
    )
    axes.set_title(f"energy distance {title}", color=INK, fontsize=11)
    axes.set_xlabel(x_label, color=INK)
    axes.grid(True, color=BOX, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
